"""The fast blocks against their plain transcription, and the parts they are of."""

import operator
from collections.abc import Iterable
from copy import deepcopy
from io import BytesIO

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.models import DSFPN, DSBlock, DSNet, fuse_for_inference
from dsnet_mm.models.layers import pointwise
from dsnet_mm.models.layers.pointwise import FFN
from dsnet_mm.models.layers.reference import reference_net
from dsnet_mm.ops import runs_tiled

from .test_ds_net import TINY, VARIANTS

SMALL = dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
GN = dict(norm_cfg=dict(type='GN', num_groups=4))
# With widths that tiles are for.
WIDE = dict(embed_dims=(64, 128, 192, 256), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))
needs_onednn = pytest.mark.skipif(
    not pointwise._HAS_ONEDNN, reason='this PyTorch is built without oneDNN'
)

needs_tiles = pytest.mark.skipif(
    not runs_tiled(torch.zeros(1)), reason='no compiled projections'
)


def error(measured: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest error of any tensor, relative to its largest value.

    Or to 1: smaller ones are often sums that cancel, as the gradients of biases
    in front of norms, and have the rounding of their parts.
    """
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1)).item()
        for m, e in zip(measured, expected, strict=True)
    )


def trained(model: nn.Module) -> nn.Module:
    """Gives norms the statistics and weights that training could end with."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3)
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)  # negative ones among them
            nn.init.normal_(module.bias)
            module.weight.data[::4] = 1e-9
    return model


def build(options: dict, arch: dict = TINY) -> DSNet:
    torch.manual_seed(0)
    net = DSNet(**(dict(arch=arch, out_indices=(0, 1, 2, 3)) | options))
    return trained(net).double()


def pictures(height: int = 72, width: int = 104) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, height, width, dtype=torch.float64)


# ------------------------------------------------------------------- equations


@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('options', [*VARIANTS, GN], ids=str)
def test_network_equals_its_plain_transcription(options: dict, training: bool) -> None:
    net = build(options).train(training)
    results = []
    for forward in (type(net).forward, reference_net):
        model = deepcopy(net)
        # The streams' sizes are no multiples of one another.
        x = pictures().requires_grad_()
        outs = forward(model, x)
        sum((out * out.detach().cos()).sum() for out in outs).backward()
        grads = [param.grad for param in model.parameters()]
        results.append([*outs, x.grad, *grads, *model.buffers()])
    assert error(*results) < 1e-12


@pytest.mark.parametrize('model', ['net', 'block'])
def test_memory_format_of_the_input_changes_nothing(model: str) -> None:
    net = build({}).float()
    x = pictures().float()
    if model == 'block':
        net, x = net.stages[0][0], net.patch_embeds[0](x).contiguous()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outs = net(x), net(x.contiguous(memory_format=torch.channels_last))
        first, last = (out if model == 'block' else out[-1] for out in outs)
        assert torch.equal(first, last)


def test_names_of_the_parameters() -> None:
    names = DSNet('tiny').state_dict()
    layers = {name.removeprefix('stages.3.0.').rpartition('.')[0] for name in names
              if name.startswith('stages.3.0.')}  # fmt: skip
    assert layers == {
        *('pos_embed', 'norm1', 'proj_in', 'local_norm', 'local_conv'),
        *('global_norm', 'global_qkv', 'proj_out', 'norm2', 'ffn.fc1', 'ffn.fc2'),
        *('isa.local_norm', 'isa.local_qkv', 'isa.local_proj'),
        *('isa.global_norm', 'isa.global_qkv', 'isa.global_proj'),
    }
    rest = {name for name in names if not name.startswith(('stages.', 'norm3.'))}
    assert rest == {
        f'patch_embeds.{i}.projection.{kind}'
        for i in range(4)
        for kind in ('weight', 'bias')
    }


# ---------------------------------------------------------------- fused norms


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize(
    'options', [*VARIANTS, dict(norm_cfg=dict(type='SyncBN'))], ids=str
)
def test_fused_network_equals_the_network(options: dict) -> None:
    net = build(options)
    fused = deepcopy(net)
    assert fuse_for_inference(fused.train()) is fused
    assert not fused.training
    assert not batch_norms(fused.stages)
    with torch.no_grad():
        for size in ((33, 41), (72, 104)):
            x = pictures(*size)
            assert error(fused(x), net.eval()(x)) < 1e-12
        # A second time it changes nothing.
        assert error(fuse_for_inference(fused)(x), net(x)) < 1e-12


def test_group_norms_stay() -> None:
    net = build(GN).eval()
    fused = fuse_for_inference(deepcopy(net))
    count = sum(isinstance(module, nn.GroupNorm) for module in net.modules())
    assert count == 24  # four in each of five blocks, and one to each output
    assert sum(isinstance(module, nn.GroupNorm) for module in fused.modules()) == count
    with torch.no_grad():
        assert error(fused(pictures(33, 41)), net(pictures(33, 41))) < 1e-12


@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('statistics', [False, True])
def test_batch_norms_of_all_kinds(affine: bool, statistics: bool) -> None:
    norm_cfg = dict(type='BN', affine=affine, track_running_stats=statistics)
    torch.manual_seed(0)
    net = DSNet(TINY, out_indices=(0, 1, 2, 3), norm_cfg=norm_cfg)
    for module in net.modules():
        if isinstance(module, _BatchNorm) and statistics:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3)
    net = net.double().eval()
    fused = fuse_for_inference(deepcopy(net))
    assert bool(batch_norms(fused.stages)) != statistics
    with torch.no_grad():
        assert error(fused(pictures()), net(pictures())) < 1e-12


def test_fused_neck() -> None:
    torch.manual_seed(0)
    neck = DSFPN([8, 16, 16], 16, num_outs=4, norm_cfg=dict(type='BN'))
    neck = trained(neck).double().eval()
    maps = [
        torch.randn(2, c, side, side + 4, dtype=torch.float64)
        for c, side in ((8, 27), (16, 13), (16, 7))
    ]
    with torch.no_grad():
        expected = neck(maps)
        assert error(fuse_for_inference(neck)(maps), expected) < 1e-12
    assert not batch_norms(neck)


def test_fused_training_checkpoint() -> None:
    state = build({}).state_dict()
    net = DSNet(TINY, out_indices=(0, 1, 2, 3)).double()
    net.load_state_dict(state)
    with torch.no_grad():
        expected = net.eval()(pictures())
        assert error(fuse_for_inference(net)(pictures()), expected) < 1e-12


def test_only_ds_blocks_are_fused() -> None:
    with pytest.raises(ValueError, match=r'and Sequential has none; mmcv\.cnn\.fuse'):
        fuse_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_fusion_of_mmcv_does_no_harm(options: dict) -> None:
    """It folds a norm into the convolution that was registered before it."""
    net = build(options).eval()
    with torch.no_grad():
        expected = net(pictures(33, 41))
        assert error(fuse_conv_bn(net)(pictures(33, 41)), expected) < 1e-12


# ---------------------------------------------------------- packed projections


def packed_weights(net: nn.Module) -> list[list[Tensor] | None]:
    return [m._packed for m in net.modules() if isinstance(m, DSBlock)]


@needs_tiles
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_packed_network_equals_the_network(options: dict) -> None:
    net = build(options, WIDE).eval()
    fused = fuse_for_inference(deepcopy(net)).float()
    # The operator is for blocks with both streams in tiles, and ISA both ways or none.
    packs = [options.get('isa', True) in (True, False)] * 5
    if 'intra_scale' in options or 'alpha' in options:
        packs = [False] * 5
    if options.get('alpha') == 0.25:  # of 64, 128, 192, 192 and 256 channels
        packs = [False, True, False, False, True]
    assert packed_weights(fused) == [[] if p else None for p in packs]
    with torch.no_grad():
        for size in ((33, 41), (72, 104)):
            x = pictures(*size)
            expected = net(x)
            assert error(fused(x.float()), expected) < 1e-5
    assert [bool(weights) for weights in packed_weights(fused)] == packs
    # With gradients, or under autocast, others than packed weights are needed.
    assert error(fused(x.float()), expected) < 1e-5
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert {out.dtype for out in fused(x.float())} == {torch.bfloat16}


@pytest.mark.parametrize('chunk_bytes', [4096, 2**22])
@pytest.mark.parametrize('tiled', [False, True])
def test_fused_network_in_low_precision(tiled, chunk_bytes, monkeypatch) -> None:
    """Also by the products of oneDNN, in chunks of a few pixels and of all."""
    if not tiled:
        monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    monkeypatch.setattr(pointwise._ChunkedFFN, 'CHUNK_BYTES', chunk_bytes)
    net = build({}, WIDE).eval()
    with torch.no_grad():
        x = pictures(72, 104)
        exact = net(x)
        plain = reference_net(deepcopy(net).bfloat16(), x.bfloat16())
        fused = fuse_for_inference(net).float()
        assert error(fused(x.float()), exact) < 1e-5
        measured = fused.bfloat16()(x.bfloat16())
        for m, p, e in zip(measured, plain, exact, strict=True):
            assert (m - e).pow(2).mean() <= 4 * (p - e).pow(2).mean()
    packed = tiled and runs_tiled(x.bfloat16())
    assert all(bool(weights) == packed for weights in packed_weights(fused))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_packed_network_compiles_to_one_graph(dtype: torch.dtype) -> None:
    """With operators of ours in it."""
    torch._dynamo.reset()
    net = fuse_for_inference(build({}, WIDE)).to(dtype)
    x = pictures(64, 96).to(dtype)
    # Everything but inductor, which takes minutes to compile.
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        first, second, expected = compiled(x), compiled(x), net(x)
        exact = deepcopy(net).double()(x.double())
    for m, n, e, f in zip(first, second, expected, exact, strict=True):
        assert torch.equal(m, n)
        assert (m - f).pow(2).mean() <= 4 * (e - f).pow(2).mean()


def test_one_compiled_graph_for_pictures_of_any_size() -> None:
    torch._dynamo.reset()
    net = fuse_for_inference(build({}, WIDE)).float()
    first, second = pictures(136, 104).float(), pictures(168, 200).float()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager', dynamic=True)
    with torch.no_grad():
        expected = [out.double() for out in net(first)]
        assert error(compiled(first), expected) < 1e-5
        expected = [out.double() for out in net(second)]
        with torch.compiler.set_stance('fail_on_recompile'):
            assert error(compiled(second), expected) < 1e-5


@needs_tiles
def test_a_fused_block_as_one_operator() -> None:
    block = fuse_for_inference(DSBlock(64, 1, global_factor=2)).float()
    x = torch.randn(2, 64, 5, 6).contiguous(memory_format=torch.channels_last)
    op = torch.ops.dsnet_mm.ds_block
    with torch.no_grad():
        weights = block.pack()
        args = x, weights, 1, 2
        torch.library.opcheck(op.default, args)
        assert torch.equal(op(*args), block(x))
        assert block(x).is_contiguous(memory_format=torch.channels_last)
        # Channels-first maps, and one row where the factor leaves none.
        assert torch.equal(op(x.contiguous(), *args[1:]), block(x))
        for small in (x[:, :, :1], x[..., :1], x[:, :, :1, :1]):
            plain = deepcopy(block).double()(small.double())
            assert error([op(small, *args[1:])], [plain]) < 1e-5
        assert block(x[:0]).shape == (0, 64, 5, 6)
        with pytest.raises(RuntimeError, match='30, got 4 axes and 29 weights'):
            op(x, weights[1:], 1, 2)
    with pytest.raises(RuntimeError, match='no gradients'):
        op(*args)


@needs_tiles
def test_packed_weights_are_made_anew() -> None:
    x = pictures(33, 41).float()
    with torch.no_grad():
        net = fuse_for_inference(build({}, WIDE)).float()
        other = fuse_for_inference(build(dict(alpha=0.5), WIDE).train()).float()
        for param in other.parameters():
            param.mul_(1.5)
        expected, measured = other(x), net(x)
        assert error(measured, [e.double() for e in expected]) > 0.1
        net.load_state_dict(other.state_dict())
        assert all(map(torch.equal, net(x), expected))
        # To another type and back, which rounds.
        low = net.bfloat16()(x.bfloat16())
        assert {out.dtype for out in low} == {torch.bfloat16}
        other.load_state_dict(net.float().state_dict())
        assert all(map(torch.equal, net(x), other(x)))


@needs_tiles
def test_packed_network_can_be_copied_and_saved() -> None:
    x = pictures(33, 41).float()
    net = fuse_for_inference(build({}, WIDE)).float()
    with torch.no_grad():
        expected = net(x)
        file = BytesIO()
        torch.save(net, file)
        file.seek(0)
        for copy in (deepcopy(net), torch.load(file, weights_only=False)):
            assert not any(packed_weights(copy))
            assert all(map(torch.equal, copy(x), expected))
    assert all(packed_weights(net))


# ------------------------------------------------------- the feed-forward network


@pytest.fixture
def product_calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """Counts calls of the fused product, and makes the chunks small."""
    calls = []
    product = pointwise._product

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return product(*args, **kwargs)

    monkeypatch.setattr(pointwise, '_product', counted)
    monkeypatch.setattr(pointwise._ChunkedFFN, 'CHUNK_BYTES', 4096)
    return calls


def ffn_inputs(
    add: bool, batch: int = 2, width: int = 12, **options
) -> tuple[FFN, list[Tensor]]:
    """Two pictures of 91 pixels, whose hidden layer is 9 chunks in float32."""
    torch.manual_seed(0)
    ffn = FFN(width, 4 * width, dict(type='GELU') | options)
    maps = [torch.randn(batch, width, 7, 13) for _ in range(1 + add)]
    return ffn, maps


def ffn_results(forward, ffn: FFN, maps: list[Tensor]) -> list[Tensor]:
    """Output and all gradients."""
    maps = [x.detach().requires_grad_() for x in maps]
    out = forward(ffn, *maps)
    weight = torch.cos(torch.arange(out.numel()) / 3).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [*maps, *ffn.parameters()], weight)]


def plain_ffn(ffn: FFN, x: Tensor, add: Tensor | None = None) -> Tensor:
    x = ffn.fc2(ffn.act(ffn.fc1(x)))
    return x if add is None else x + add


@needs_onednn
@pytest.mark.parametrize('add', [False, True], ids=['alone', 'added'])
def test_chunked_ffn_equals_the_plain_one(add: bool, product_calls: list) -> None:
    ffn, maps = ffn_inputs(add)
    measured = ffn_results(FFN.forward, ffn, maps)
    # fc1 and fc2 of every chunk, and fc1 again in backward; the last is smaller.
    assert len(product_calls) == 3 * 9
    assert {shape[2] for shape in product_calls} == {21, 14}
    expected = ffn_results(
        plain_ffn, deepcopy(ffn).double(), [x.double() for x in maps]
    )
    assert error(measured, expected) < 1e-5
    with torch.no_grad():
        assert torch.equal(ffn(*maps), measured[0])


@needs_tiles
@needs_onednn
@pytest.mark.parametrize('keeps', [False, True], ids=['recomputed', 'kept'])
@pytest.mark.parametrize('add', [False, True], ids=['alone', 'added'])
def test_tiled_ffn_in_training_equals_the_plain_one(
    add: bool, keeps: bool, product_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise._ChunkedFFN, 'KEPT_WIDTH', 32 if keeps else 64)
    ffn, maps = ffn_inputs(add, width=32)
    kept = [x.clone() for x in maps]
    measured = ffn_results(FFN.forward, ffn, maps)
    assert not product_calls
    assert all(map(torch.equal, maps, kept))
    expected = ffn_results(
        plain_ffn, deepcopy(ffn).double(), [x.double() for x in maps]
    )
    assert error(measured, expected) < 1e-5


@pytest.mark.skipif(
    torch.bfloat16 not in pointwise._DTYPES, reason='oneDNN has no bfloat16 here'
)
@pytest.mark.parametrize('width', [12, 32])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('add', [False, True], ids=['alone', 'added'])
def test_chunked_ffn_under_autocast(
    add: bool, dtype: torch.dtype, width: int, product_calls: list
) -> None:
    ffn, maps = ffn_inputs(add, width=width)
    maps = [x.to(dtype) for x in maps]
    results = []
    for forward in (FFN.forward, plain_ffn):
        with torch.autocast('cpu', torch.bfloat16):
            results.append(ffn_results(forward, ffn, maps))
    if width == 12:
        assert len(product_calls) == 3 * 5
    exact = ffn_results(plain_ffn, deepcopy(ffn).double(), [x.double() for x in maps])
    for measured, plain, e in zip(*results, exact, strict=True):
        assert measured.dtype == plain.dtype
        assert (measured - e).abs().max() <= 2 * (plain - e).abs().max()


@pytest.mark.parametrize(
    'options',
    [dict(type='ReLU'), dict(type='GELU', approximate='tanh')],
    ids=str,
)
def test_ffn_with_another_activation(options: dict, product_calls: list) -> None:
    ffn, maps = ffn_inputs(True, **options)
    measured = ffn_results(FFN.forward, ffn, maps)
    assert not product_calls
    expected = ffn_results(
        plain_ffn, deepcopy(ffn).double(), [x.double() for x in maps]
    )
    assert error(measured, expected) < 1e-5


def test_ffn_of_no_pictures() -> None:
    ffn, maps = ffn_inputs(True, batch=0)
    out, grad_x, grad_add, *grads = ffn_results(FFN.forward, ffn, maps)
    assert out.shape == grad_x.shape == grad_add.shape == (0, 12, 7, 13)
    assert not any(grad.any() for grad in grads)


@needs_onednn
def test_ffn_does_not_keep_its_hidden_layer(product_calls: list) -> None:
    def largest_saved(options: dict) -> int:
        ffn, (x,) = ffn_inputs(False, **options)
        sizes = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        )
        with keep:
            ffn(x.requires_grad_())
        return max(sizes)

    pixels = 2 * 7 * 13
    assert largest_saved(dict(type='GELU')) == pixels * 12
    assert largest_saved(dict(type='ReLU')) == pixels * 48


# -------------------------------------------------- compile, export, autocast


@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
def test_compiles_to_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    net = build({}, SMALL).float().train(training)
    # Everything but inductor, whose first kernel takes minutes to compile.
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = pictures(64, 64).float()
    if not training:
        with torch.no_grad():
            assert error(compiled(x), net(x)) < 1e-5
        return
    grads = []
    for forward in (net, compiled):
        net.zero_grad()
        outs = forward(x)
        sum((out * out.detach().cos()).sum() for out in outs).backward()
        grads.append([param.grad for param in net.parameters()])
    assert error(*grads) < 1e-4


@pytest.mark.parametrize('fused', [False, True], ids=['as built', 'fused'])
def test_exports_to_operators_of_pytorch(fused: bool) -> None:
    net = build({}, SMALL).float().eval()
    if fused:
        fuse_for_inference(net)
    x = pictures(64, 64).float()
    program = torch.export.export(net, (x,))
    for node in program.graph.nodes:
        if node.op == 'call_function' and node.target is not operator.getitem:
            assert node.target.namespace == 'aten', node
    with torch.no_grad():
        assert error(program.module()(x), net(x)) < 1e-5


@pytest.mark.parametrize('grad', [False, True], ids=['no grad', 'grad'])
def test_autocast(grad: bool) -> None:
    net = build({}).eval()
    x = pictures()
    with torch.no_grad():
        exact = net(x)
    net.float()
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        measured, plain = net(x.float()), reference_net(net, x.float())
        # A map in float32, as other backbones give it, is projected in bfloat16.
        local = torch.randn(1, 16, 5, 5)
        assert net.stages[0][0].proj_in(local).dtype == torch.bfloat16
    assert {out.dtype for out in measured} == {torch.bfloat16}
    assert [out.dtype for out in plain] == [out.dtype for out in measured]
    for m, p, e in zip(measured, plain, exact, strict=True):
        assert (m - e).abs().max() <= 2 * (p - e).abs().max()


def test_shapes_are_told_without_computing() -> None:
    net = DSNet(TINY, out_indices=(0, 3)).to('meta')
    first, last = net(torch.empty(1, 3, 64, 96, device='meta'))
    assert first.shape == (1, 16, 16, 24) and last.shape == (1, 64, 2, 3)


def test_block_takes_float32_maps_under_autocast() -> None:
    torch.manual_seed(0)
    block = DSBlock(16, num_heads=2).eval()
    x = torch.randn(2, 16, 9, 11)
    with torch.no_grad():
        exact = block(x)
        with torch.autocast('cpu', torch.bfloat16):
            measured = block(x)
    assert measured.dtype == torch.float32  # the residual stream's
    assert (measured - exact).abs().max() < 0.03 * exact.abs().max()

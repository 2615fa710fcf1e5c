"""The inference form against the network it was made from."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from io import BytesIO

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.runner.checkpoint import load_state_dict
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.models import DSFPN, DSBlock, DSNet, fuse_for_inference
from dsnet_mm.models.fuse import FusedDSBlock
from dsnet_mm.models.reference import reference_net
from tests.conftest import (
    TINY,
    VARIANTS,
    WIDE,
    build,
    equal,
    error,
    images,
    needs_native,
    needs_packing,
    trained,
)

GN = dict(norm_cfg=dict(type='GN', num_groups=4))


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def fused_blocks(model: nn.Module) -> list[FusedDSBlock]:
    return [module for module in model.modules() if isinstance(module, FusedDSBlock)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators of this package that run."""
    names = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == 'dsnet_mm':
                names.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Mode():
        yield names


# ------------------------------------------------------------------- the outputs


@pytest.mark.parametrize(
    'options',
    [*VARIANTS, dict(norm_cfg=dict(type='SyncBN')), dict(output_norm=False)],
    ids=str,
)
def test_fused_network_equals_the_network(options: dict) -> None:
    net = build(options)
    fused = deepcopy(net)
    assert fuse_for_inference(fused.train()) is fused
    assert not any(module.training for module in fused.modules())
    assert not batch_norms(fused.stages)
    with torch.no_grad():
        for size in ((33, 41), (72, 104)):
            x = images(*size)
            assert error(fused(x), net.eval()(x)) < 1e-12
        # A second time it changes nothing.
        assert fuse_for_inference(fused) is fused
        assert error(fused(x), net(x)) < 1e-12


@needs_packing
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_blocks_that_are_one_operator(options: dict, threads: int) -> None:
    net = build(options, WIDE).eval()
    fused = fuse_for_inference(deepcopy(net)).float()
    # Blocks with both streams in numbers that can be packed, and ISA both ways or none.
    expected = [options.get('isa', True) in (True, False)] * 5
    if 'intra_scale' in options or 'alpha' in options:
        expected = [False] * 5
    if options.get('alpha') == 0.25:  # of 64, 128, 192, 192 and 256 channels
        expected = [False, True, False, False, True]
    assert [block.is_one_operator for block in fused_blocks(fused)] == expected
    with torch.no_grad():
        for size in ((33, 41), (72, 104)):
            x = images(*size)
            exact = net(x)
            assert error(fused(x.float()), exact) < 1e-5
    # Gradients of the input and autocast are for the forward of the block.
    out = fused(x.float().requires_grad_())
    assert all(o.requires_grad for o in out)
    assert error(out, exact) < 1e-5
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert {out.dtype for out in fused(x.float())} == {torch.bfloat16}


@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_runs_where_it_can(dtype, calls, monkeypatch) -> None:
    block = fuse_for_inference(DSBlock(64, 1, global_factor=2)).to(dtype)
    x = torch.randn(2, 64, 5, 6).to(dtype)
    with torch.no_grad():
        block(x)
        assert calls == [
            *('residual_conv', 'linear', 'linear', 'residual_conv', 'linear'),
            *('self_attention', 'linear', 'linear', 'co_attention', 'linear_'),
            *('linear', 'resize_add_', 'merge_'),
        ]
        calls.clear()
        monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
        block(x)
        deepcopy(block).double()(x.double())
    assert not calls


@needs_packing
def test_outputs_are_equal_with_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    block = fuse_for_inference(trained(DSBlock(64, 1, global_factor=2)))
    x = torch.randn(2, 64, 33, 41)
    with torch.no_grad():
        measured = block(x)
        torch.set_num_threads(1)  # the fixture restores the number
        assert torch.equal(measured, block(x))


@needs_packing
def test_a_fused_block_as_one_operator() -> None:
    block = fuse_for_inference(trained(DSBlock(64, 1, global_factor=2)))
    x = torch.randn(2, 64, 5, 6).contiguous(memory_format=torch.channels_last)
    op = torch.ops.dsnet_mm.ds_block
    weights = {name: layer._buffers[key] for name, layer, key in block._weights}
    args = weights, 1, 2
    with torch.no_grad():
        assert torch.equal(op(x, *args), block(x))
        assert block(x).is_contiguous(memory_format=torch.channels_last)
        # Channels-first maps, and one row where the factor leaves none.
        assert torch.equal(op(x.contiguous(), *args), block(x))
        for small in (x[:, :, :1], x[..., :1], x[:, :, :1, :1]):
            exact = deepcopy(block).double()(small.double())
            assert error([op(small, *args)], [exact]) < 1e-5
        assert block(x[:0]).shape == (0, 64, 5, 6)
        del weights['ffn.fc2.packed']
        with pytest.raises(RuntimeError, match=r'ffn\.fc2\.packed is not among them'):
            op(x, *args)
        with pytest.raises(RuntimeError, match='takes a map'):
            op(x[0], *args)
    with pytest.raises(RuntimeError, match='no gradients'):
        op(x.requires_grad_(), *args)


@pytest.mark.parametrize('native', [False, True])
def test_fused_network_in_low_precision(native, monkeypatch) -> None:
    if not native:
        monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    net = build({}, WIDE).eval()
    with torch.no_grad():
        x = images(72, 104)
        exact = net(x)
        plain = reference_net(deepcopy(net).bfloat16(), x.bfloat16())
        fused = fuse_for_inference(net).float()
        assert error(fused(x.float()), exact) < 1e-5
        measured = fused.bfloat16()(x.bfloat16())
        for m, p, e in zip(measured, plain, exact, strict=True):
            assert (m - e).pow(2).mean() <= 4 * (p - e).pow(2).mean()


def test_group_norms_stay() -> None:
    net = build(GN).eval()
    fused = fuse_for_inference(deepcopy(net))
    count = sum(isinstance(module, nn.GroupNorm) for module in net.modules())
    assert count == 24  # four in each of five blocks, and one to each output
    assert sum(isinstance(module, nn.GroupNorm) for module in fused.modules()) == count
    with torch.no_grad():
        assert error(fused(images(33, 41)), net(images(33, 41))) < 1e-12


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
        assert error(fused(images()), net(images())) < 1e-12


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


def test_a_block_alone() -> None:
    block = trained(DSBlock(16, 2)).double().eval()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
    fused = fuse_for_inference(block)
    with torch.no_grad():
        assert error([fused(x)], [block(x)]) < 1e-12
    assert fuse_for_inference(fused) is fused
    # The block itself is left as it is.
    assert all(torch.equal(block.state_dict()[name], before[name]) for name in before)


def test_only_ds_blocks_are_fused() -> None:
    with pytest.raises(ValueError, match=r'and Sequential has none; mmcv\.cnn\.fuse'):
        fuse_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def test_a_subclass_is_refused() -> None:
    class Block(DSBlock):
        pass

    for model in (Block(16, 2), nn.Sequential(Block(16, 2))):
        with pytest.raises(ValueError, match='Block is a subclass'):
            fuse_for_inference(model)


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_fusion_of_mmcv_does_no_harm(options: dict) -> None:
    """It folds a norm into the convolution that was registered before it."""
    net = build(options).eval()
    with torch.no_grad():
        expected = net(images(33, 41))
        assert error(fuse_conv_bn(net)(images(33, 41)), expected) < 1e-12


# -------------------------------------------------------------------- the weights


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> DSNet:
    torch.manual_seed(seed)
    net = trained(DSNet(WIDE, out_indices=(0, 1, 2, 3)))
    if seed:
        for parameter in net.parameters():
            parameter.data *= 0.9
    return net.to(dtype).eval()


def test_all_weights_are_buffers() -> None:
    net = fuse_for_inference(network())
    fused = (net.patch_embeds, net.stages)
    assert not any(list(module.parameters()) for module in fused)
    assert not any(buffer.requires_grad for buffer in net.buffers())


def test_memory_formats() -> None:
    net = fuse_for_inference(network())
    last = torch.channels_last
    for patch_embed in net.patch_embeds:
        assert patch_embed.folded.projection.weight.is_contiguous(memory_format=last)
    x = images(33, 41).float()
    with torch.no_grad():
        assert equal(deepcopy(net).to(memory_format=last)(x), net(x))
        low = deepcopy(net).bfloat16()
        x = x.bfloat16()
        assert equal(deepcopy(low).to(memory_format=last)(x), low(x))


def test_only_blocks_that_are_one_operator_are_packed() -> None:
    names = {
        name
        for options in (
            dict(isa='global_to_local'),
            GN,
            dict(act_cfg=dict(type='ReLU')),
        )
        for name, _ in fuse_for_inference(build(options, WIDE).float()).named_buffers()
    }
    assert names
    assert not any(name.endswith('packed') for name in names)


def test_exporting_changes_nothing() -> None:
    net = fuse_for_inference(network())
    x = images(64, 64).float()
    with torch.no_grad():
        expected = net(x)
        for strict in (False, True):
            program = torch.export.export(net, (x,), strict=strict)
            assert equal(net(x), expected)
            assert error(program.module()(x), [e.double() for e in expected]) < 1e-5
            assert 'dsnet_mm' not in str(program.graph)


def test_forward_mode_derivatives_are_refused() -> None:
    block = fuse_for_inference(DSBlock(64, 1))
    x = torch.randn(1, 64, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises((RuntimeError, NotImplementedError), match=r'forward|jvp'):
            block(dual)


def test_it_cannot_be_trained() -> None:
    net = fuse_for_inference(network())
    for model in (net, nn.Sequential(net), net.stages[0][0], net.patch_embeds[0]):
        with pytest.raises(ValueError, match='fused for inference cannot be trained'):
            model.train()
    assert net.eval() is net
    assert net.train(False) is net


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('by', ['torch', 'mmengine'])
def test_state_dicts_of_another_form_are_refused(by: str, strict: bool) -> None:
    load = nn.Module.load_state_dict if by == 'torch' else load_state_dict
    net = network()
    fused = fuse_for_inference(deepcopy(net))
    with torch.no_grad():
        expected = fused(images().float())
        with pytest.raises(ValueError, match='state dict is of one that was not'):
            load(fused, net.state_dict(), strict=strict)
        assert equal(fused(images().float()), expected)
    for part in ('stages.1.0', 'patch_embeds.1'):
        with pytest.raises(ValueError, match='state dict is of one that was not'):
            state = net.get_submodule(part).state_dict()
            load(fused.get_submodule(part), state, strict=strict)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_state_dicts_of_fused_networks(dtype: torch.dtype) -> None:
    x = images(33, 41)
    with torch.no_grad():
        source = fuse_for_inference(network(seed=1))
        target = fuse_for_inference(network()).to(dtype)
        target.load_state_dict(source.state_dict())
        expected = source.to(dtype)(x.to(dtype))
        assert equal(target(x.to(dtype)), expected)
    weight = source.state_dict()['stages.0.0.folded.proj_in.weight']
    assert weight.shape == (64, 64, 1, 1)


def test_a_changed_weight_changes_the_output() -> None:
    """In place, by a child's state dict, and by functional_call: no stale copies."""
    x = images(33, 41).float()
    with torch.no_grad():
        fused = fuse_for_inference(network())
        other = fuse_for_inference(network(seed=1))
        expected = other(x)
        first = fused(x)
        named = dict(other.named_buffers()) | dict(other.named_parameters())
        measured = torch.func.functional_call(fused, named, (x,))
        assert equal(measured, expected)
        assert equal(fused(x), first)
        children = deepcopy(fused)
        for name, child in other.named_children():
            getattr(children, name).load_state_dict(child.state_dict())
        assert equal(children(x), expected)
        for name, tensor in fused.named_buffers():
            tensor.copy_(named[name])
        for name, tensor in fused.named_parameters():
            tensor.copy_(named[name])
        assert equal(fused(x), expected)


def test_types_and_devices() -> None:
    x = images(33, 41)
    net = network()
    with torch.no_grad():
        fused = fuse_for_inference(deepcopy(net))
        expected = fused(x.float())
        there = fused.double()(x)
        exact = net.double()(x)
        assert error(there, exact) < 1e-5  # folded in float32
        assert equal(fused.float()(x.float()), expected)
        low = fused.bfloat16()(x.bfloat16())
        assert {out.dtype for out in low} == {torch.bfloat16}
        assert [out.shape for out in fused.to('meta')(x.bfloat16().to('meta'))] == [
            out.shape for out in low
        ]


def test_it_can_be_copied_and_saved() -> None:
    x = images(33, 41).float()
    net = fuse_for_inference(network())
    with torch.no_grad():
        expected = net(x)
        file = BytesIO()
        torch.save(net, file)
        file.seek(0)
        for copy in (deepcopy(net), torch.load(file, weights_only=False)):
            assert equal(copy(x), expected)
            for buffer in copy.stages.buffers():
                buffer.mul_(0.5)
            assert not equal(copy(x), expected)
        assert equal(net(x), expected)


def test_python_threads_share_it() -> None:
    net = fuse_for_inference(network())
    maps = [images(33, 41).float() * i for i in range(1, 5)]

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return net(x)

    with ThreadPoolExecutor(4) as pool:
        for x, measured in zip(maps * 3, pool.map(run, maps * 3), strict=True):
            assert equal(measured, run(x))


# ----------------------------------------------------------------------- compilers


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_to_one_graph(dtype: torch.dtype) -> None:
    """With operators of ours in it."""
    torch._dynamo.reset()
    net = fuse_for_inference(build({}, WIDE)).to(dtype)
    x = images(64, 96).to(dtype)
    # Everything but inductor, which takes minutes to compile.
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        first, second, expected = compiled(x), compiled(x), net(x)
        exact = deepcopy(net).double()(x.double())
    for m, n, e, f in zip(first, second, expected, exact, strict=True):
        assert torch.equal(m, n)
        assert (m - f).pow(2).mean() <= 4 * (e - f).pow(2).mean()


@needs_packing
def test_the_compiled_graph_has_the_operator() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(str(module.graph))
        return module

    net = fuse_for_inference(network())
    with torch.no_grad():
        torch.compile(net, fullgraph=True, backend=backend)(images().float())
    assert sum(graph.count('dsnet_mm.ds_block') for graph in graphs) == 5


def test_one_compiled_graph_for_images_of_any_size() -> None:
    torch._dynamo.reset()
    net = fuse_for_inference(build({}, WIDE)).float()
    first, second = images(136, 104).float(), images(168, 200).float()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager', dynamic=True)
    with torch.no_grad():
        expected = [out.double() for out in net(first)]
        assert error(compiled(first), expected) < 1e-5
        expected = [out.double() for out in net(second)]
        with torch.compiler.set_stance('fail_on_recompile'):
            assert error(compiled(second), expected) < 1e-5

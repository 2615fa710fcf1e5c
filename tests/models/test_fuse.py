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


def norms(model: nn.Module, kind: type = _BatchNorm) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> DSNet:
    torch.manual_seed(seed)
    net = trained(DSNet(WIDE, out_indices=(0, 1, 2, 3)))
    if seed:
        for parameter in net.parameters():
            parameter.data *= 0.9
    return net.to(dtype).eval()


@pytest.fixture
def calls() -> Iterator[list[str]]:
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
    [*VARIANTS, dict(norm_cfg=dict(type='SyncBN')), dict(output_norm=False), GN],
    ids=str,
)
def test_fused_network_equals_the_network(options: dict) -> None:
    net = build(options)
    fused, x = deepcopy(net), images(33, 41)
    assert fuse_for_inference(fused.train()) is fused
    assert not any(module.training for module in fused.modules())
    assert not norms(fused.stages)
    assert len(norms(fused, nn.GroupNorm)) == len(norms(net, nn.GroupNorm))
    with torch.no_grad():
        expected = net.eval()(x)
        assert error(fused(x), expected) < 1e-12
        assert fuse_for_inference(fused) is fused  # a second time changes nothing
        assert error(fused(x), expected) < 1e-12
        # MMCV takes a norm for that of the convolution registered before it.
        assert error(fuse_conv_bn(net)(x), expected) < 1e-12


@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('statistics', [False, True])
def test_batch_norms_of_all_kinds(affine: bool, statistics: bool) -> None:
    norm_cfg = dict(type='BN', affine=affine, track_running_stats=statistics)
    torch.manual_seed(0)
    net = DSNet(TINY, out_indices=(0, 1, 2, 3), norm_cfg=norm_cfg)
    for module in norms(net) if statistics else []:
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.1, 3)
    net = net.double().eval()
    fused = fuse_for_inference(deepcopy(net))
    assert bool(norms(fused.stages)) != statistics
    with torch.no_grad():
        assert error(fused(images(33, 41)), net(images(33, 41))) < 1e-12


def test_fused_neck_and_a_block_alone() -> None:
    torch.manual_seed(0)
    neck = DSFPN([8, 16, 16], 16, num_outs=4, norm_cfg=dict(type='BN'))
    neck = trained(neck).double().eval()
    sides = (8, 27), (16, 13), (16, 7)
    maps = [torch.randn(2, c, s, s + 4, dtype=torch.float64) for c, s in sides]
    block = trained(DSBlock(16, 2)).double().eval()
    before = deepcopy(block.state_dict())
    with torch.no_grad():
        expected = neck(maps)
        assert error(fuse_for_inference(neck)(maps), expected) < 1e-12
        assert not norms(neck)
        fused = fuse_for_inference(block)
        assert error([fused(maps[1])], [block(maps[1])]) < 1e-12
    assert fuse_for_inference(fused) is fused
    # The block itself is left as it is.
    assert equal(block.state_dict().values(), before.values())


def test_networks_of_timm_stay_as_they_are() -> None:
    """Folding a norm of EfficientNet would drop the activation that is in it."""
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    backbone = timm.create_model('test_efficientnet', num_classes=0, global_pool='')
    neck = DSFPN([backbone.num_features], 32, num_outs=2, norm_cfg=dict(type='BN'))
    net = trained(nn.ModuleDict(dict(backbone=backbone, neck=neck))).double().eval()
    fused, x = fuse_for_inference(deepcopy(net)), images(64, 96)
    assert len(norms(net)) > len(norms(fused)) == len(norms(backbone))
    before, after = (n['neck']([n['backbone'](x)]) for n in (net, fused))
    assert error(after, before) < 1e-9


@needs_packing
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_blocks_that_are_one_operator(options: dict) -> None:
    net = build(options, WIDE).eval()
    fused = fuse_for_inference(deepcopy(net)).float()
    # Blocks with both streams in numbers that can be packed, and ISA both ways or none.
    expected = [options.get('isa', True) in (True, False)] * 5
    if 'intra_scale' in options or 'alpha' in options:
        expected = [False] * 5
    if options.get('alpha') == 0.25:  # of 64, 128, 192, 192 and 256 channels
        expected = [False, True, False, False, True]
    found = [block.is_one_operator for block in norms(fused, FusedDSBlock)]
    assert found == expected
    x = images(33, 41)
    with torch.no_grad():
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
        assert {'residual_conv', 'co_attention', 'merge_'} <= set(calls)
        calls.clear()
        monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
        block(x)
        deepcopy(block).double()(x.double())
    assert not calls


@needs_packing
def test_a_fused_block_as_one_operator() -> None:
    torch.manual_seed(0)
    block = fuse_for_inference(trained(DSBlock(64, 1, global_factor=2)))
    x = torch.randn(2, 64, 33, 41).contiguous(memory_format=torch.channels_last)
    op = torch.ops.dsnet_mm.ds_block
    weights = {name: layer._buffers[key] for name, layer, key in block._weights}
    size, threads = (16, 20), torch.get_num_threads()
    with torch.no_grad():
        expected = block(x)
        assert expected.is_contiguous(memory_format=torch.channels_last)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(op(x, weights, 1, size), expected)
        torch.set_num_threads(threads)
        # Channels-first maps, and one row where the factor leaves none.
        assert torch.equal(op(x.contiguous(), weights, 1, size), expected)
        for small in (x[:, :, :1], x[..., :1], x[:, :, :1, :1]):
            exact = deepcopy(block).double()(small.double())
            size = [max(side // 2, 1) for side in small.shape[2:]]
            assert error([op(small, weights, 1, size)], [exact]) < 1e-5
        assert block(x[:0]).shape == (0, 64, 33, 41)
        del weights['ffn.fc2.packed']
        with pytest.raises(RuntimeError, match=r'ffn\.fc2\.packed'):
            op(x, weights, 1, size)
        with pytest.raises(RuntimeError, match='map'):
            op(x[0], weights, 1, size)
    with pytest.raises(RuntimeError, match='gradients'):
        op(x.requires_grad_(), weights, 1, size)


@pytest.mark.parametrize('native', [False, True])
def test_fused_network_in_low_precision(native, monkeypatch) -> None:
    if not native:
        monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    net = build({}, WIDE).eval()
    with torch.no_grad():
        x = images(72, 104)
        exact = net(x)
        plain = reference_net(deepcopy(net).bfloat16(), x.bfloat16())
        measured = fuse_for_inference(net).float().bfloat16()(x.bfloat16())
        for m, p, e in zip(measured, plain, exact, strict=True):
            assert (m - e).pow(2).mean() <= 4 * (p - e).pow(2).mean()


# -------------------------------------------------------------------- refusals


def test_what_is_no_ds_block_is_refused() -> None:
    with pytest.raises(ValueError, match='Sequential'):
        fuse_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))

    class Block(DSBlock):
        pass

    for model in (Block(16, 2), nn.Sequential(Block(16, 2))):
        with pytest.raises(ValueError, match=r'\bBlock\b.*subclass'):
            fuse_for_inference(model)


def test_it_cannot_be_trained() -> None:
    net = fuse_for_inference(network())
    assert not any(list(part.parameters()) for part in (net.patch_embeds, net.stages))
    for model in (net, nn.Sequential(net), net.stages[0][0], net.patch_embeds[0]):
        with pytest.raises(ValueError, match='fused'):
            model.train()
    assert net.eval() is net.train(False) is net
    block, x = fuse_for_inference(DSBlock(64, 1)), torch.randn(1, 64, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises((RuntimeError, NotImplementedError), match=r'forward|jvp'):
            block(dual)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
def test_state_dicts_of_another_form_are_refused(load, strict: bool) -> None:
    net, x = network(), images(33, 41).float()
    fused = fuse_for_inference(deepcopy(net))
    with torch.no_grad():
        expected = fused(x)
        for part in ('', 'stages.1.0', 'patch_embeds.1'):
            state = net.get_submodule(part).state_dict()
            with pytest.raises(ValueError, match=next(iter(state))):
                load(fused.get_submodule(part), state, strict=strict)
        assert equal(fused(x), expected)


# -------------------------------------------------------------------- the weights


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_state_dicts_of_fused_networks(dtype: torch.dtype) -> None:
    x = images(33, 41).to(dtype)
    with torch.no_grad():
        source = fuse_for_inference(network(seed=1))
        target = fuse_for_inference(network()).to(dtype)
        target.load_state_dict(source.state_dict())
        assert equal(target(x), source.to(dtype)(x))
    weight = source.state_dict()['stages.0.0.folded.proj_in.weight']
    assert weight.shape == (64, 64, 1, 1)


def test_a_changed_weight_changes_the_output() -> None:
    """In place, by a child's state dict, and by functional_call: no stale copies."""
    x = images(33, 41).float()
    with torch.no_grad():
        fused, other = (fuse_for_inference(network(seed=i)) for i in (0, 1))
        expected, first = other(x), fused(x)
        named = dict(other.named_buffers()) | dict(other.named_parameters())
        assert equal(torch.func.functional_call(fused, named, (x,)), expected)
        assert equal(fused(x), first)
        children = deepcopy(fused)
        for name, child in other.named_children():
            getattr(children, name).load_state_dict(child.state_dict())
        assert equal(children(x), expected)
        for name, tensor in (*fused.named_buffers(), *fused.named_parameters()):
            tensor.copy_(named[name])
        assert equal(fused(x), expected)


def test_types_devices_and_memory_formats() -> None:
    x, net = images(33, 41), network()
    with torch.no_grad():
        fused = fuse_for_inference(deepcopy(net))
        expected = fused(x.float())
        assert error(fused.double()(x), net.double()(x)) < 1e-5  # folded in float32
        assert equal(fused.float()(x.float()), expected)
        fused.to(memory_format=torch.channels_last)
        assert equal(fused(x.float()), expected)
        low = fused.bfloat16()(x.bfloat16())
        assert {out.dtype for out in low} == {torch.bfloat16}
        shapes = [out.shape for out in fused.to('meta')(x.bfloat16().to('meta'))]
        assert shapes == [out.shape for out in low]
    weight = fuse_for_inference(network()).patch_embeds[0].folded.projection.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_it_can_be_copied_saved_and_shared_by_threads() -> None:
    x, net = images(33, 41).float(), fuse_for_inference(network())
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
    run = torch.no_grad()(lambda i: net(x * i))
    with ThreadPoolExecutor(4) as pool:
        for i, measured in enumerate(pool.map(run, range(1, 9)), 1):
            assert equal(measured, run(i))


# ------------------------------------------------------------- compilers, export


def test_one_compiled_graph_for_images_of_any_size() -> None:
    """With our operator in it. Everything but inductor, which takes minutes."""
    torch._dynamo.reset()
    net, graphs = fuse_for_inference(network()), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        graphs.append(str(module.graph))
        return module

    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for size, stance in (
            ((136, 104), 'default'),
            ((168, 200), 'fail_on_recompile'),
        ):
            x = images(*size).float()
            with torch.compiler.set_stance(stance):
                assert equal(compiled(x), net(x))
    if any(block.is_one_operator for block in norms(net, FusedDSBlock)):
        assert graphs[0].count('dsnet_mm.ds_block') == 5


def test_exporting_changes_nothing() -> None:
    net, x = fuse_for_inference(network()), images(64, 64).float()
    with torch.no_grad():
        expected = net(x)
        program = torch.export.export(net, (x,), strict=True)
        assert equal(net(x), expected)
        assert error(program.module()(x), [e.double() for e in expected]) < 1e-5
        assert 'dsnet_mm' not in str(program.graph)

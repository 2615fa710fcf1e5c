"""The modules of DS-Net against their plain transcription."""

import operator
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.parametrize import register_parametrization

from dsnet_mm.models import DSBlock, DSNet, InterScaleAlignment, fuse_for_inference
from dsnet_mm.models.reference import reference_block, reference_net
from dsnet_mm.ops import feed_forward, resize
from tests.conftest import TINY, VARIANTS, WIDE, build, error, images

GN = dict(norm_cfg=dict(type='GN', num_groups=4))


# ------------------------------------------------------------------- equations


@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('options', [*VARIANTS, GN], ids=str)
def test_network_equals_its_plain_transcription(options: dict, training: bool) -> None:
    net = build(options).train(training)
    results = []
    for forward in (type(net).forward, reference_net):
        model = deepcopy(net)
        # The streams' sizes are no multiples of one another.
        x = images().requires_grad_()
        outs = forward(model, x)
        sum((out * out.detach().cos()).sum() for out in outs).backward()
        grads = [param.grad for param in model.parameters()]
        results.append([*outs, x.grad, *grads, *model.buffers()])
    assert error(*results) < 1e-12


@pytest.mark.parametrize('model', ['net', 'block'])
def test_memory_format_of_the_input_changes_nothing(model: str) -> None:
    net = build({}).float()
    x = images().float()
    if model == 'block':
        net, x = net.stages[0][0], net.patch_embeds[0](x).contiguous()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outs = net(x), net(x.contiguous(memory_format=torch.channels_last))
        first, last = (out if model == 'block' else out[-1] for out in outs)
        assert torch.equal(first, last)


# ------------------------------------------- layers that do more than their weights


class Double(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class LoRA(nn.Module):
    """A layer and a product of rank 1 beside it; the weight alone is not its output."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        c_out, c_in = layer.weight.shape[:2]
        self.down = nn.Conv2d(c_in, 1, 1, bias=False, dtype=layer.weight.dtype)
        self.up = nn.Conv2d(1, c_out, 1, bias=False, dtype=layer.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def double_output(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def double_weight(layer: nn.Module) -> nn.Module:
    return register_parametrization(layer, 'weight', Double())


def results(block: DSBlock, forward: Callable = DSBlock.forward) -> list[torch.Tensor]:
    x = images(9, 13)[:, :1].expand(-1, 16, -1, -1).cos().requires_grad_()
    out = forward(block, x)
    (out * out.detach().cos()).sum().backward()
    return [out, x.grad, *(param.grad for param in block.parameters())]


@pytest.mark.parametrize('change', [double_output, double_weight, LoRA])
@pytest.mark.parametrize('name', ['proj_in', 'proj_out', 'ffn.fc1', 'ffn.fc2'])
def test_hooks_and_other_layers_work(name: str, change: Callable) -> None:
    torch.manual_seed(0)
    options = [dict(), dict(isa=False, alpha=0.0), dict(isa=False, alpha=1.0)]
    for option in options:
        block = DSBlock(16, 2, global_factor=2, **option).double()
        plain = block(images(9, 13)[:, :1].expand(-1, 16, -1, -1).cos())
        block.set_submodule(name, change(block.get_submodule(name)))
        # The transcription calls each layer.
        expected, measured = results(deepcopy(block), reference_block), results(block)
        assert error(measured, expected) < 1e-12
        assert error(measured[:1], [plain]) > 1e-3
        with pytest.raises(ValueError, match=name):
            fuse_for_inference(block)


def test_hooks_see_what_the_layers_compute() -> None:
    """Forward and backward hooks, on all layers at once."""
    torch.manual_seed(0)
    block = DSBlock(16, 2).double()
    expected = results(deepcopy(block), reference_block)
    seen, grads = {}, set()
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GELU):
            layer.register_forward_hook(
                lambda layer, args, out, name=name: seen.update({name: (args[0], out)})
            )
            layer.register_full_backward_hook(lambda *args, name=name: grads.add(name))
    assert error(results(block), expected) < 1e-12
    assert grads == seen.keys() and len(seen) == 12
    for layer in block.modules():
        layer._forward_hooks.clear()
    for name, (given, out) in seen.items():  # nothing has changed it later
        torch.testing.assert_close(block.get_submodule(name)(given), out)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('hooks', [False, True])
def test_blocks_compile_and_export(hooks: bool, strict: bool) -> None:
    """To one graph; an exported one has operators of PyTorch only."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = DSBlock(8, 2, global_factor=2).eval()
    for name in ('proj_in', 'ffn.fc2') if hooks else ():
        double_output(block.get_submodule(name))
    x = torch.randn(1, 8, 6, 8)
    with torch.no_grad():
        expected = [block(x).double()]
        program = torch.export.export(block, (x,), strict=strict)
        assert error([program.module()(x)], expected) < 1e-5
        # Everything but inductor, whose first kernel takes minutes to compile.
        compiled = torch.compile(block, fullgraph=True, backend='aot_eager')
        assert error([compiled(x)], expected) < 1e-5
    for node in program.graph.nodes:
        if node.op == 'call_function' and node.target is not operator.getitem:
            assert node.target.namespace == 'aten', node


def test_one_exported_program_with_and_without_a_cap_in_effect() -> None:
    torch.manual_seed(0)
    block = DSBlock(8, 2, global_factor=2, max_global_tokens=12).eval()
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    x = torch.randn(2, 8, 10, 14)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=(sizes,))
        for size in ((10, 14), (6, 8), (50, 40)):  # 3 x 4 tokens in the second
            x = torch.randn(2, 8, *size)
            assert error([program.module()(x)], [block(x).double()]) < 1e-5


@pytest.mark.parametrize('width', [16, 64])
def test_inputs_are_left_alone(width: int) -> None:
    """Also without gradients, where an operator might use their memory."""
    torch.manual_seed(0)
    x = torch.randn(2, width, 9, 11).contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(2, 12, width)
    w1, b1 = torch.randn(width, width, 1, 1), torch.randn(width)
    isa = InterScaleAlignment(width, 2).eval()
    block = DSBlock(width, 2).eval()
    calls = [
        (isa, (x, tokens)),
        (block, (x,)),
        (block.ffn, (x,)),
        (fuse_for_inference(block), (x,)),
        (feed_forward, (x, w1, b1, w1, b1)),
        (resize, (x, (9, 11))),
        (resize, (x, (4, 5))),
    ]
    for call, args in calls:
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        with torch.no_grad():
            call(*args)
        for arg, kept in zip(args, before, strict=True):
            assert torch.equal(arg, kept) if isinstance(arg, torch.Tensor) else True


def test_float32_in_any_number_of_threads(threads: int) -> None:
    """The compiled operators are in it; float64 runs without most of them."""
    net = build({}, WIDE).train()
    x = images()
    results = []
    for model, forward in ((net.float(), type(net).forward), (net, reference_net)):
        model = deepcopy(model)
        model = model.double() if forward is reference_net else model
        outs = forward(model, x.to(next(model.parameters()).dtype))
        sum((out * out.detach().double().cos()).sum() for out in outs).backward()
        results.append([*outs, *(param.grad for param in model.parameters())])
    assert error(*results) < 5e-4


# -------------------------------------------------------------------- autocast


@pytest.mark.parametrize('grad', [False, True], ids=['no grad', 'grad'])
def test_autocast(grad: bool) -> None:
    net = build({}).eval()
    x = images()
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
        # The largest error is that of one place, and differs with the libraries.
        assert (m - e).square().mean() <= 2 * (p - e).square().mean()


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

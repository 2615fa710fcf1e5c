"""The feed-forward network against its plain form, with all gradients."""

import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dsnet_mm.models.layers.ds_block import FFN
from dsnet_mm.ops.packing import PACKED_DTYPES
from tests.conftest import error, needs_packing

# Not by attribute: in the package the function has the name of the module.
module = sys.modules['dsnet_mm.ops.feed_forward']
pytestmark = pytest.mark.usefixtures('threads')


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the pixels that the compiled operator takes."""
    types, apply = [], module._FeedForward.apply
    monkeypatch.setattr(
        module._FeedForward,
        'apply',
        lambda x, *args: types.append(x.dtype) or apply(x, *args),
    )
    return types


def inputs(batch: int = 2, width: int = 12, **options) -> tuple[FFN, Tensor]:
    """Two images of 91 pixels."""
    torch.manual_seed(0)
    ffn = FFN(width, 4 * width, dict(type='GELU') | options)
    return ffn, torch.randn(batch, width, 7, 13)


def results(forward, ffn: FFN, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    out = forward(ffn, x)
    weight = torch.cos(torch.arange(out.numel()) / 3).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *ffn.parameters()], weight)]


def plain(ffn: FFN, x: Tensor) -> Tensor:
    return ffn.fc2(ffn.act(ffn.fc1(x)))


def exact(ffn: FFN, x: Tensor) -> list[Tensor]:
    return results(plain, deepcopy(ffn).double(), x.double())


@needs_packing
def test_by_the_compiled_operator(compiled: list[torch.dtype]) -> None:
    ffn, x = inputs(width=32)
    measured = results(FFN.forward, ffn, x)
    assert compiled == [torch.float32]
    assert error(measured, exact(ffn, x)) < 1e-5
    with torch.no_grad():
        assert torch.equal(ffn(x), measured[0])


def test_not_by_the_compiled_operator_where_it_is_not_wanted(
    compiled: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    ffn, x = inputs(width=32)
    measured = results(FFN.forward, ffn, x)
    assert not compiled
    assert error(measured, exact(ffn, x)) < 1e-5


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('width', [12, 32])
def test_one_image(width: int, layout: torch.memory_format) -> None:
    ffn, x = inputs(batch=1, width=width)
    x = x.contiguous(memory_format=layout)
    assert error(results(FFN.forward, ffn, x), exact(ffn, x)) < 1e-5


@pytest.mark.parametrize(('hidden', 'outputs'), [(64, 32), (64, 96), (64, 48)])
def test_other_numbers_of_channels(hidden: int, outputs: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 64, 5, 5), torch.randn(hidden, 64, 1, 1) / 8]
    tensors += [torch.randn(hidden), torch.randn(outputs, hidden, 1, 1) / 8]
    tensors += [torch.randn(outputs)]

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = module.feed_forward(*leaves)
        return [out, *torch.autograd.grad(out.cos().sum(), leaves)]

    assert error(run(torch.float32), run(torch.float64)) < 1e-4


@pytest.mark.parametrize('width', [12, 32])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(
    dtype: torch.dtype, width: int, compiled: list[torch.dtype]
) -> None:
    ffn, x = inputs(width=width)
    x = x.to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        measured, of_pytorch = (results(f, ffn, x) for f in (FFN.forward, plain))
    runs = width == 32 and torch.bfloat16 in PACKED_DTYPES
    assert compiled == [torch.bfloat16] * runs
    for m, p, e in zip(measured, of_pytorch, exact(ffn, x), strict=True):
        assert m.dtype == p.dtype
        assert (m - e).abs().max() <= 2 * (p - e).abs().max()
    # PyTorch's gradients of the weights were bfloat16 once, those of the operator not.
    rounded = [torch.equal(g, g.bfloat16().float()) for g in measured[2:]]
    assert rounded == [not runs] * 4


@pytest.mark.parametrize('autocast', [False, True])
def test_weights_of_another_type_only_under_autocast(autocast: bool) -> None:
    ffn, x = inputs(width=32)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        if autocast:
            assert ffn(x.bfloat16()).dtype == torch.bfloat16
        else:
            with pytest.raises(RuntimeError, match='type'):
                ffn(x.bfloat16())


@pytest.mark.parametrize(
    'options', [dict(type='ReLU'), dict(type='GELU', approximate='tanh')], ids=str
)
def test_another_activation(options: dict, compiled: list[torch.dtype]) -> None:
    ffn, x = inputs(width=32, **options)
    measured = results(FFN.forward, ffn, x)
    assert not compiled
    assert error(measured, exact(ffn, x)) < 1e-5


def test_no_images() -> None:
    ffn, x = inputs(batch=0)
    out, grad_x, *grads = results(FFN.forward, ffn, x)
    assert out.shape == grad_x.shape == (0, 12, 7, 13)
    assert not any(grad.any() for grad in grads)


@needs_packing
def test_the_hidden_layer_is_not_kept() -> None:
    width = 32

    def largest_saved(options: dict) -> int:
        ffn, x = inputs(width=width, **options)
        sizes = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        )
        with keep:
            ffn(x.requires_grad_())
        return max(sizes)

    pixels = 2 * 7 * 13
    weight = 4 * width**2
    assert largest_saved(dict(type='GELU')) == max(pixels * width, weight)
    assert largest_saved(dict(type='ReLU')) == pixels * 4 * width


@needs_packing
def test_a_second_derivative_is_refused() -> None:
    ffn, x = inputs(width=32)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ffn(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.square().sum().backward()


def test_on_another_device_it_is_plain(compiled: list[torch.dtype]) -> None:
    ffn, x = inputs(width=32)
    assert ffn.to('meta')(x.to('meta')).shape == x.shape
    assert not compiled

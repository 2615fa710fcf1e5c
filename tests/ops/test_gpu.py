"""Tests of the co-attention and of the networks on a GPU.

``make test-gpu`` runs them, and fails if the ops are not compiled for CUDA. With
DSNET_MM_TEST_DEVICE=cpu they run on the CPU.
"""

import os
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dsnet_mm.models import fuse_for_inference
from dsnet_mm.ops import (
    co_attention,
    dropout_mask,
    native,
    reference_co_attention,
)
from tests.conftest import build, error, images
from tests.ops.conftest import (
    SHAPES,
    VIEWS,
    native_op,
    outputs_and_gradients,
    seed,
    streams,
    worst,
)

DEVICE = os.environ.get('DSNET_MM_TEST_DEVICE', 'cuda')
WHY_NOT = native.why_not_cuda() if DEVICE == 'cuda' else native.WHY_NOT
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f'{WHY_NOT}')
LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _float32_products() -> Iterator[None]:
    """Turns TF32 off, which cuDNN uses for float32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def inputs_on_device(*args, **kwargs) -> list[Tensor]:
    """The streams of conftest.py, on the device."""
    return [
        x.detach().to(DEVICE).requires_grad_(x.requires_grad)
        for x in streams(*args, **kwargs)
    ]


def exact(inputs: list[Tensor], *args) -> tuple[Tensor, ...]:
    """Outputs and gradients by explicit softmax in float64."""
    doubles = [x.double() for x in inputs]
    return outputs_and_gradients(reference_co_attention, *doubles, *args)


# ------------------------------------------------------------------ co-attention


@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_native_equals_reference(shape: tuple, dropout_p: float) -> None:
    inputs = inputs_on_device(*shape, torch.float32)
    args = shape[3], dropout_p, seed().to(DEVICE)
    measured = outputs_and_gradients(native_op, *inputs, *args)
    assert worst(measured, exact(inputs, *args)) < 2e-5


@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('dtype', LOW, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_rounding_in_low_precision_is_that_of_plain_pytorch(
    shape: tuple, dtype: torch.dtype, dropout_p: float
) -> None:
    inputs = inputs_on_device(*shape, dtype)
    args = shape[3], dropout_p, seed().to(DEVICE)
    measured = outputs_and_gradients(native_op, *inputs, *args)
    plain = outputs_and_gradients(reference_co_attention, *inputs, *args)
    for m, p, e in zip(measured, plain, exact(inputs, *args), strict=True):
        assert m.dtype == dtype
        # A gradient that is exactly 0, as that of a softmax over one score, may have
        # a rounding error of eps.
        rounding = torch.finfo(dtype).eps * e.abs().max().clamp(min=1)
        assert (m - e).abs().max() <= 2 * (p - e).abs().max() + rounding


def test_large_scores_neither_overflow_nor_vanish() -> None:
    # The scores are about +-5000.
    inputs = [30 * x for x in inputs_on_device(1, 100, 80, 1, 32, torch.float32)]
    measured = native_op(*inputs, 1, at=seed().to(DEVICE))
    expected = reference_co_attention(*(x.double() for x in inputs), 1)
    assert worst(measured, expected) < 1e-3


@pytest.mark.parametrize('needed', [0, 1])
def test_gradient_of_one_output_for_one_input(needed: int) -> None:
    inputs = inputs_on_device(1, 12, 6, 1, 8, torch.float32)
    grads = [
        torch.autograd.grad(path(*inputs)[needed].sum(), inputs[1 - needed])[0]
        for path in (
            lambda *x: native_op(*x, 1, at=seed().to(DEVICE)),
            lambda *x: reference_co_attention(*x, 1),
        )
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_dropped_weights_are_those_of_dropout_mask() -> None:
    # With one-hot values the output is the attention weights. All scores are equal.
    n, length, rest, heads = 2, 70, 16, 2
    local = torch.zeros(n, length, 3 * heads * 16, device=DEVICE)
    global_ = torch.zeros(n, rest, 3 * heads * 16, device=DEVICE)
    global_[..., 64:] = torch.eye(16).repeat(1, heads)
    h_l, _ = native_op(local, global_, heads, 0.5, seed().to(DEVICE))
    weights = h_l.unflatten(-1, (heads, 16)).transpose(1, 2).cpu()
    shape = torch.Size([n, heads, length, rest])
    expected = dropout_mask(shape, 0.5, seed())
    assert torch.equal(weights > 0, expected)
    torch.testing.assert_close(weights, expected * (2 / rest))
    assert torch.equal(dropout_mask(shape, 0.5, seed().to(DEVICE)).cpu(), expected)


def test_dropout_depends_on_manual_seed() -> None:
    inputs = inputs_on_device(1, 20, 10, 1, 8, torch.float32, grad=False)
    outs = []
    for number in (0, 1, 0):
        torch.manual_seed(number)
        outs.append(native.co_attention(*inputs, 1, 0.5)[0])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_strided_inputs(view) -> None:
    inputs = [view(x.detach()) for x in inputs_on_device(2, 70, 20, 2, 8)]
    inputs = [x.float() for x in inputs]
    measured = outputs_and_gradients(native_op, *inputs, 2, 0.0, seed().to(DEVICE))
    assert worst(measured, exact(inputs, 2)) < 2e-5


def test_strided_gradients() -> None:
    inputs = inputs_on_device(1, 20, 10, 1, 8, torch.float32)
    h_l, h_g = native_op(*inputs, 1, at=seed().to(DEVICE))
    # The gradient of a sum is an expanded tensor, with strides of 0.
    measured = torch.autograd.grad(h_l.sum() + h_g.sum(), inputs)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(
        sum(out.sum() for out in reference_co_attention(*doubles, 1)), doubles
    )
    assert worst(measured, expected) < 2e-5


def test_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', 'native')
    local, global_ = inputs_on_device(0, 6, 4, 2, 8, torch.float32)
    h_l, h_g = co_attention(local, global_, 2)
    assert h_l.shape == (0, 6, 16) and h_g.shape == (0, 4, 16)
    (h_l.sum() + h_g.sum()).backward()
    assert local.grad.shape == local.shape


@pytest.mark.parametrize('grad', [False, True], ids=['no grad', 'grad'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, grad: bool) -> None:
    local, global_ = inputs_on_device(2, 10, 6, 2, 8, dtype, grad)
    rest = seed().to(DEVICE), 2, 0.1
    op = torch.ops.dsnet_mm.co_attention.default
    torch.library.opcheck(op, (local, global_, *rest))
    outs = [x.detach() for x in op(local, global_, *rest)]
    torch.library.opcheck(
        torch.ops.dsnet_mm.co_attention_backward.default,
        (*outs[:2], local.detach(), global_.detach(), *outs, *rest),
    )


def test_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', 'native')
    torch._dynamo.reset()
    inputs = inputs_on_device(1, 20, 10, 2, 8, torch.float32)
    compiled = torch.compile(co_attention, fullgraph=True, backend='aot_eager')
    measured = outputs_and_gradients(compiled, *inputs, 2)
    assert worst(measured, exact(inputs, 2)) < 2e-5
    torch.manual_seed(0)
    assert not torch.equal(compiled(*inputs, 2, 0.5)[0], measured[0])


@pytest.mark.parametrize('dtype', LOW, ids=str)
def test_autocast_runs_the_op_in_its_dtype(dtype: torch.dtype) -> None:
    local, global_ = inputs_on_device(1, 20, 10, 2, 8, torch.float32)
    at = seed().to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        outs = native_op(local, global_.to(dtype), 2, at=at)
    assert {out.dtype for out in outs} == {dtype}
    expected = native_op(local.to(dtype), global_.to(dtype), 2, at=at)
    assert all(map(torch.equal, outs, expected))
    sum(out.sum() for out in outs).backward()
    assert local.grad.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float32, *LOW], ids=str)
def test_two_runs_give_identical_results(dtype: torch.dtype) -> None:
    inputs = inputs_on_device(1, 1100, 300, 2, 32, dtype)
    args = 2, 0.1, seed().to(DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [outputs_and_gradients(native_op, *inputs, *args) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


# ------------------------------------------------------------------- the network


@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('path', ['native', 'sdpa'])
def test_network_equals_the_network_in_float64(
    path: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', path)
    net = build({}).train(training)
    results = []
    for model, x in (
        (deepcopy(net).float().to(DEVICE), images().float().to(DEVICE)),
        (net, images()),
    ):
        x.requires_grad_()
        outs = model(x)
        weights = [torch.cos(torch.arange(o.numel()).view(o.shape)) for o in outs]
        torch.autograd.backward(
            outs, [w.to(o) for w, o in zip(weights, outs, strict=True)]
        )
        grads = [param.grad for param in model.parameters()]
        results.append([tensor.cpu() for tensor in (*outs, x.grad, *grads)])
    # The error is relative to the largest value. A gradient sums over thousands of
    # pixels.
    assert error(*results) < 1e-3


@pytest.mark.parametrize('dtype', [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize('path', ['native', 'sdpa'])
def test_fused_network(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', path)
    net = build({}).eval()
    with torch.no_grad():
        expected = net(images(33, 41))
        fused = fuse_for_inference(net.to(dtype).to(DEVICE))
        outs = fused(images(33, 41).to(dtype).to(DEVICE))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert error([out.cpu() for out in outs], expected) < tolerance

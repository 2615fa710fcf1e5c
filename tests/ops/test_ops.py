"""Co-attention and self-attention: every path against the softmax in float64."""

import sys

import pytest
import torch

from dsnet_mm.models import DSBlock, fuse_for_inference
from dsnet_mm.ops import (
    attention,
    co_attention,
    dropout_mask,
    native,
    reference_co_attention,
    sdpa_co_attention,
    self_attention,
    split_heads,
)
from dsnet_mm.ops.packing import PACKED_DTYPES
from tests.conftest import needs_native
from tests.ops.conftest import (
    SHAPES,
    SHAPES_AND_DROPOUT,
    TOLERANCE,
    VIEWS,
    native_op,
    outputs_and_gradients,
    seed,
    streams,
    worst,
)

pytestmark = pytest.mark.usefixtures('threads')


@needs_native
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES)
def test_native_equals_reference(shape, dtype, dropout_p):
    heads = shape[3]
    inputs = streams(*shape, dtype)
    measured = outputs_and_gradients(native_op, *inputs, heads, dropout_p)
    expected = outputs_and_gradients(
        reference_co_attention, *(x.double() for x in inputs), heads, dropout_p, seed()
    )
    assert worst(measured, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize('shape', SHAPES)
def test_sdpa_equals_reference(shape):
    inputs = streams(*shape)
    measured = outputs_and_gradients(sdpa_co_attention, *inputs, shape[3])
    expected = outputs_and_gradients(reference_co_attention, *inputs, shape[3])
    assert worst(measured, expected) < 1e-12


def assert_as_exact_as_plain(measured, plain, exact, dtype):
    for m, p, e in zip(measured, plain, exact, strict=True):
        assert m.dtype == dtype
        # One rounding of the largest number is in either.
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (m - e).abs().max() <= 2 * (p - e).abs().max() + rounding


@needs_native
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(('shape', 'dropout_p'), SHAPES_AND_DROPOUT)
def test_low_precision_is_as_exact_as_plain_pytorch(shape, dtype, dropout_p):
    inputs = streams(*shape, dtype)
    args = shape[3], dropout_p, seed()
    measured = outputs_and_gradients(native_op, *inputs, *args)
    plain = outputs_and_gradients(reference_co_attention, *inputs, *args)
    exact = outputs_and_gradients(
        reference_co_attention, *(x.double() for x in inputs), *args
    )
    assert_as_exact_as_plain(measured, plain, exact, dtype)


def self_op(qkv, heads, dropout_p=0.0, at=None):
    """The operator of one stream, with a seed of our own."""
    at = seed() if at is None else at
    return torch.ops.dsnet_mm.self_attention(qkv, at, heads, dropout_p)[:1]


def reference_self_attention(qkv, heads, dropout_p=0.0, at=None):
    at = seed() if at is None else at
    return reference_co_attention(qkv, qkv, heads, dropout_p, at)[:1]


def output_and_gradient(path, qkv, *args):
    """As :func:`outputs_and_gradients`, of one stream."""
    return outputs_and_gradients(lambda x, _: path(x, *args), qkv, None)


@needs_native
@pytest.mark.parametrize('dtype', [*TOLERANCE, torch.bfloat16])
@pytest.mark.parametrize(('shape', 'dropout_p'), SHAPES_AND_DROPOUT)
def test_self_attention(shape, dtype, dropout_p):
    n, _, length, heads, width = shape
    torch.manual_seed(0)
    qkv = torch.randn(n, length, 3 * heads * width).to(dtype)
    args = heads, dropout_p
    exact = output_and_gradient(reference_self_attention, qkv.double(), *args)
    plain = output_and_gradient(reference_self_attention, qkv, *args)
    measured = output_and_gradient(self_op, qkv, *args)
    if dtype in TOLERANCE:
        assert worst(measured, exact) < TOLERANCE[dtype]
        return
    assert_as_exact_as_plain(measured, plain, exact, dtype)


@needs_native
@pytest.mark.parametrize('view', VIEWS)
def test_self_attention_of_strided_tokens(view):
    qkv = VIEWS[view](torch.randn(1, 9, 48, dtype=torch.float64))
    measured = output_and_gradient(self_op, qkv, 2)
    assert worst(measured, output_and_gradient(self_op, qkv.clone(), 2)) < 1e-13


@needs_native
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
def test_self_attention_passes_opcheck(dropout_p, grad):
    qkv = torch.randn(2, 9, 48, requires_grad=grad)
    op = torch.ops.dsnet_mm.self_attention.default
    torch.library.opcheck(op, (qkv, seed(), 2, dropout_p))


@needs_native
def test_self_attention_is_the_operator_of_either_path(monkeypatch):
    qkv = torch.randn(2, 9, 48, dtype=torch.float64)
    expected = attention(*split_heads(qkv, 2, 3))
    for path in ('native', 'sdpa', 'reference'):
        monkeypatch.setenv('DSNET_MM_OPS', path)
        assert worst([self_attention(qkv, 2)], [expected]) < 1e-13
    assert not self_attention(qkv[:0], 2).numel()


@needs_native
def test_self_attention_refuses_what_does_not_fit():
    op = torch.ops.dsnet_mm.self_attention
    x = torch.zeros(1, 5, 24)
    for qkv, heads in ((x[0], 1), (x, 3), (x, 0), (x[:, :0], 1)):
        with pytest.raises(RuntimeError, match='self_attention takes'):
            op(qkv, seed(), heads, 0.0)
    with pytest.raises(RuntimeError, match='self_attention takes'):
        op(x, seed(), 1, 1.0)
    out, lse = op(x, seed(), 1, 0.0)
    backward = torch.ops.dsnet_mm.self_attention_backward
    for change in (out[:, :3], out.double(), out[..., :4]):
        with pytest.raises(RuntimeError, match='self_attention_backward takes'):
            backward(change, x, change, lse, seed(), 1, 0.0)
    with pytest.raises(RuntimeError, match='self_attention_backward takes'):
        backward(out, x, out, lse[..., :3], seed(), 1, 0.0)


@pytest.mark.parametrize('path', [pytest.param('native', marks=needs_native), 'sdpa'])
def test_self_attention_under_autocast(path, monkeypatch):
    monkeypatch.setenv('DSNET_MM_OPS', path)
    with torch.autocast('cpu', torch.bfloat16):
        assert self_attention(torch.randn(1, 5, 24), 1).dtype == torch.bfloat16


@needs_native
def test_large_scores_neither_overflow_nor_vanish():
    local, global_ = streams(1, 100, 80, 1, 32, torch.float32, grad=False)
    inputs = local * 30, global_ * 30  # scores of +-5000
    measured = native_op(*inputs, 1)
    expected = reference_co_attention(*(x.double() for x in inputs), 1)
    assert worst(measured, expected) < 1e-3


@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nan_reaches_what_reads_it(dtype):
    local, global_ = streams(1, 70, 80, 1, 8, dtype, grad=False)
    local[0, 69, 0] = torch.nan  # the query of the last local token
    h_l, h_g = native_op(local, global_, 1)
    assert h_l[0, 69].isnan().all()
    assert not h_l[0, :69].isnan().any() and not h_g.isnan().any()


@needs_native
@pytest.mark.parametrize('dropout_p', [0.0, 0.4])
def test_gradcheck(dropout_p):
    inputs = streams(2, 9, 4, 2, 8)
    assert torch.autograd.gradcheck(
        lambda a, b: native_op(a, b, 2, dropout_p), inputs, fast_mode=True
    )


@needs_native
@pytest.mark.parametrize('needed', [0, 1])
def test_one_output_and_one_input_with_gradient(needed):
    local, global_ = streams(1, 12, 6, 1, 8)
    (measured,) = torch.autograd.grad(
        native_op(local, global_, 1)[needed].sum(), (local, global_)[1 - needed]
    )
    (expected,) = torch.autograd.grad(
        reference_co_attention(local, global_, 1)[needed].sum(),
        (local, global_)[1 - needed],
    )
    torch.testing.assert_close(measured, expected)


@needs_native
@pytest.mark.parametrize('name', ['co_attention', 'self_attention'])
def test_a_second_derivative_is_refused(name):
    """And not zero, as for an operator without autograd."""
    inputs = streams(1, 12, 6, 1, 8)[: 2 if name == 'co_attention' else 1]
    out = getattr(torch.ops.dsnet_mm, name)(*inputs, seed(), 1, 0.0)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f'{name}_backward is not implemented'):
        torch.autograd.grad(grad.square().sum(), inputs)


@needs_native
@pytest.mark.parametrize('grad', [False, True])
def test_no_operator_calls_python(grad):
    local, global_ = streams(1, 12, 6, 1, 8, grad=grad)
    frames = []

    def profile(frame, event, arg):
        if event == 'call':
            frames.append(f'{frame.f_code.co_filename}:{frame.f_code.co_name}')

    ops = torch.ops.dsnet_mm
    calls = [
        (ops.co_attention.default._op, (local, global_, seed(), 1, 0.0)),
        (ops.self_attention.default._op, (local, seed(), 1, 0.0)),
    ]
    if torch.float32 in PACKED_DTYPES and not grad:
        block = fuse_for_inference(DSBlock(64, 1))
        weights = {name: layer._buffers[key] for name, layer, key in block._weights}
        x = torch.randn(1, 64, 4, 4)
        calls.append((ops.ds_block.default._op, (x, weights, 1, (2, 2))))
        ops.ds_block(x, weights, 1, (2, 2))  # looks the other operators up
    for op, args in calls:
        sys.setprofile(profile)
        try:
            op(*args)
        finally:
            sys.setprofile(None)
    assert not frames


@needs_native
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_opcheck(dtype, grad):
    local, global_ = streams(2, 10, 6, 2, 8, dtype, grad)
    op = torch.ops.dsnet_mm.co_attention.default
    torch.library.opcheck(op, (local, global_, seed(), 2, 0.1))
    outs = [x.detach() for x in op(local, global_, seed(), 2, 0.1)]
    torch.library.opcheck(
        torch.ops.dsnet_mm.co_attention_backward.default,
        (*outs[:2], local.detach(), global_.detach(), *outs, seed(), 2, 0.1),
    )


@needs_native
@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_strided_inputs(view):
    inputs = [view(x.detach()) for x in streams(2, 70, 20, 2, 8)]
    expected = outputs_and_gradients(reference_co_attention, *inputs, 2)
    measured = outputs_and_gradients(native_op, *inputs, 2)
    assert worst(measured, expected) < 1e-13


@needs_native
def test_strided_gradients():
    local, global_ = streams(1, 20, 10, 1, 8)
    h_l, h_g = native_op(local, global_, 1)
    # Of a sum over channels: expanded, with strides of 0.
    measured = torch.autograd.grad(h_l.sum() + h_g.sum(), (local, global_))
    expected = torch.autograd.grad(
        [o for o in reference_co_attention(local, global_, 1)],
        (local, global_),
        [torch.ones_like(h_l), torch.ones_like(h_g)],
    )
    assert worst(measured, expected) < 1e-13


@pytest.mark.parametrize('path', ['reference', 'sdpa', 'native'])
def test_empty_batch(path, monkeypatch):
    if path == 'native' and native.WHY_NOT:
        pytest.skip(native.WHY_NOT)
    monkeypatch.setenv('DSNET_MM_OPS', path)
    local, global_ = streams(0, 6, 4, 2, 8)
    h_l, h_g = co_attention(local, global_, 2)
    assert h_l.shape == (0, 6, 16) and h_g.shape == (0, 4, 16)
    (h_l.sum() + h_g.sum()).backward()
    assert local.grad.shape == local.shape


# -------------------------------------------------------------------- dropout


def test_dropout_mask_is_random_in_every_direction():
    mask = dropout_mask(torch.Size([2, 2, 256, 256]), 0.25, seed()).double()
    # Four standard deviations of a mean of 256 draws are 0.11.
    for dim in (2, 3):
        means = mask.mean(dim)
        assert (means - 0.75).abs().max() < 0.15
    assert abs(mask.mean() - 0.75) < 4 * 0.433 / mask.numel() ** 0.5
    rows = (mask - 0.75).view(1024, 256)
    correlation = rows @ rows.T / (256 * 0.1875) - torch.eye(1024)
    assert correlation.abs().max() < 0.45  # seven standard deviations
    columns = rows.T @ rows / (1024 * 0.1875) - torch.eye(256)
    assert columns.abs().max() < 0.22
    other = dropout_mask(torch.Size([2, 2, 256, 256]), 0.25, seed(1)).double()
    assert abs(((mask - 0.75) * (other - 0.75)).mean()) < 4 * 0.1875 / 512


@needs_native
def test_dropped_weights_are_those_of_the_mask():
    # One-hot values and equal scores show the weights themselves.
    n, length, rest, heads = 2, 70, 16, 2
    local = torch.zeros(n, length, 3 * heads * 16)
    global_ = torch.zeros(n, rest, 3 * heads * 16)
    global_[..., 64:] = torch.eye(16).repeat(1, heads)
    h_l, _ = native_op(local, global_, heads, 0.5)
    weights = h_l.unflatten(-1, (heads, 16)).transpose(1, 2)
    expected = dropout_mask(torch.Size([n, heads, length, rest]), 0.5, seed())
    assert torch.equal(weights > 0, expected)
    torch.testing.assert_close(weights, expected * (2 / rest))


@needs_native
def test_dropout_draws_from_the_generator_of_torch():
    local, global_ = streams(1, 20, 10, 1, 8, grad=False)
    torch.manual_seed(0)
    first = native.co_attention(local, global_, 1, 0.5)
    second = native.co_attention(local, global_, 1, 0.5)
    torch.manual_seed(0)
    again = native.co_attention(local, global_, 1, 0.5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])

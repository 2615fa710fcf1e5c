"""The co-attention: every path against the explicit softmax in float64."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
import torch.nn.functional as F
from torch.utils import cpp_extension
from torch.utils.flop_counter import FlopCounterMode

from dsnet_mm.ops import (
    attention,
    co_attention,
    depthwise_conv,
    dropout_mask,
    ffn_backward,
    ffn_hidden,
    native,
    reference_co_attention,
    resize,
    resize_add,
    runs_tiled,
    sdpa_co_attention,
    select_path,
    self_attention,
    split_heads,
    tiled_ffn,
    to_tiles,
)

REPO = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(
    native.WHY_NOT is not None, reason=f'no compiled op: {native.WHY_NOT}'
)
# N, L, G, heads, width of a head: one token, fewer tokens than a vector has
# lanes, more than a panel (64) and a block (72) and multiples of nothing, all
# heads and widths at their extremes, chunks of either stream in backward.
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 7, 5, 3, 8),
    (2, 64, 72, 1, 16),
    (1, 150, 67, 2, 24),
    (1, 49, 196, 5, 32),
    (1, 1100, 40, 1, 40),
    (1, 30, 1300, 2, 64),
    (1, 33, 65, 16, 128),
]
# Not one token with dropout, whose gradients are differences of equal numbers.
SHAPES_AND_DROPOUT = [
    *((shape, 0.0) for shape in SHAPES),
    *((shape, 0.3) for shape in SHAPES[1:]),
]
VIEWS = {
    'channels-first': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'part of the tokens': lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    'every other row': lambda x: torch.stack([x, x], 2)[:, :, 0],
    'expanded': lambda x: x[:1].expand(2, -1, -1),
}
# Relative to the largest value; the backward sums up to 1300 of them.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def streams(n, length, rest, heads, width, dtype=torch.float64, grad=True):
    torch.manual_seed(length * rest)
    local = torch.randn(n, length, 3 * heads * width, dtype=dtype)
    global_ = torch.randn(n, rest, 3 * heads * width, dtype=dtype)
    return local.requires_grad_(grad), global_.requires_grad_(grad)


def seed(number=-(3**39)):
    return torch.tensor([number])


def native_op(local, global_, heads, dropout_p=0.0, at=None):
    """The op itself, with a seed of our own."""
    at = seed() if at is None else at
    return torch.ops.dsnet_mm.co_attention(local, global_, at, heads, dropout_p)[:2]


def outputs_and_gradients(path, local, global_, *args):
    """What ``path`` returns, and the gradients of a weighted sum of it."""
    inputs = [
        None if x is None else x.detach().requires_grad_() for x in (local, global_)
    ]
    outs = path(*inputs, *args)
    weights = [torch.cos(torch.arange(o.numel()).view(o.shape) / 3) for o in outs]
    grads = torch.autograd.grad(
        outs,
        [x for x in inputs if x is not None],
        [w.to(o) for w, o in zip(weights, outs, strict=True)],
    )
    return *outs, *grads


def worst(measured, expected):
    """Largest error of any tensor, relative to its largest value."""
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item()
        if e.abs().max() > 1e-12
        else (m.double() - e).abs().max().item()
        for m, e in zip(measured, expected, strict=True)
    )


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
    for m, p, e in zip(measured, plain, exact, strict=True):
        assert m.dtype == dtype
        # One rounding of the largest number is in either.
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (m - e).abs().max() <= 2 * (p - e).abs().max() + rounding


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
    for m, p, e in zip(measured, plain, exact, strict=True):
        assert m.dtype == dtype
        rounding = torch.finfo(dtype).eps * e.abs().max()
        assert (m - e).abs().max() <= 2 * (p - e).abs().max() + rounding


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


# ------------------------------------------------------ memory, threads, FLOPs


@needs_native
def test_no_allocation_is_near_the_attention_matrix():
    length, rest = 16800, 1050
    local, global_ = streams(1, length, rest, 1, 32, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        h_l, h_g = native.co_attention(local, global_, 1, 0.1)
        (h_l.sum() + h_g.sum()).backward()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    inputs = 4 * (local.numel() + global_.numel())
    matrix = 4 * length * rest
    # What is allocated, whether freed or not: outputs and gradients among it.
    assert inputs < sum(size for size in sizes if size > 0) < 3 * inputs < matrix / 3
    assert max(sizes) <= inputs


@needs_native
def test_peak_of_the_process_is_linear_in_the_tokens():
    done = python(
        'import torch; from resource import *; from tests.test_ops import *\n'
        'def run(*shape):\n'
        '    outs = native.co_attention(*streams(*shape, torch.float32), shape[3])\n'
        '    sum(o.sum() for o in outs).backward()\n'
        'run(1, 64, 64, 1, 32)\n'
        'before = getrusage(RUSAGE_SELF).ru_maxrss\n'
        'run(1, 16800, 1050, 4, 32)\n'
        'print(getrusage(RUSAGE_SELF).ru_maxrss - before)'
    )
    assert done.returncode == 0, done.stderr
    # In KiB; one matrix of attention weights of one direction takes 275625.
    assert int(done.stdout) < 275625 / 2


@needs_native
def test_result_does_not_depend_on_the_number_of_threads():
    local, global_ = streams(1, 1500, 600, 2, 32, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(native_op, local, global_, 2, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@needs_native
@pytest.mark.skipif(sys.platform != 'linux', reason='OpenMP is linked on Linux only')
def test_the_library_has_threads():
    # Compiled without OpenMP, at::parallel_for runs on one thread and says nothing.
    library = sys.modules['dsnet_mm.ops._C'].__file__
    assert b'GOMP_parallel' in Path(library).read_bytes()


@needs_native
def test_flops_are_those_of_sdpa():
    local, global_ = streams(2, 50, 20, 2, 8)
    counts = []
    for path in (native_op, sdpa_co_attention):
        with FlopCounterMode(display=False) as counter:
            sum(o.sum() for o in path(local, global_, 2)).backward()
        counts.append(counter.get_total_flops())
    # The counter knows no formula of the CPU's own attention kernel.
    assert counts[0] == 8 * 2 * 50 * 20 * 16 * 7 // 2
    assert counts[1] in (0, counts[0])


@needs_native
@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_older_instruction_sets(capability):
    code = (
        'import torch; from tests.test_ops import *\n'
        'for shape in SHAPES[2:6]:\n'
        '    for dtype in TOLERANCE:\n'
        '        test_native_equals_reference(shape, dtype, 0.3)\n'
        'for channels in (24, 37):\n'
        '    for dtype in (torch.float32, torch.bfloat16):\n'
        '        test_depthwise_conv(channels, (11, 14), dtype)\n'
        'if runs_tiled(torch.zeros(1)):\n'
        '    for widths in WIDTHS:\n'
        '        test_linear(*widths, torch.float32)\n'
        '        test_ffn(*widths, torch.float32)\n'
        '    test_merge(True, torch.float32)\n'
        '    for keeps in (False, True):\n'
        '        test_ffn_backward(300, 64, 96, 2, keeps)\n'
        '    test_gelu(torch.float32)\n'
        '    test_gelu_far_from_zero(-50, torch.float32)\n'
        '    test_what_is_no_number_stays_so(torch.float32)\n'
        'print(torch.backends.cpu.get_cpu_capability())'
    )
    done = python(code, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    if capability.upper() not in done.stdout:
        pytest.skip(f'this machine runs {done.stdout.strip()}')


@needs_native
def test_products_of_others_are_left_alone():
    """The bfloat16 kernel sets AMX's tiles, which oneDNN's products use too."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 200, 200).bfloat16()
    local, global_ = streams(1, 300, 100, 1, 32, torch.bfloat16, grad=False)
    product, attended = a @ b, native_op(local, global_, 1)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        for measured, expected in zip(
            native_op(local, global_, 1), attended, strict=True
        ):
            assert torch.equal(measured, expected)


# ---------------------------------------------------------------------- resizing


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ('size', 'to'),
    [((7, 7), (56, 56)), ((3, 5), (7, 4)), ((1, 1), (3, 1)), ((4, 6), (4, 6))],
)
@pytest.mark.parametrize('channels', [3, 24, 37])
def test_resize_add(channels, size, to, dtype):
    torch.manual_seed(0)
    layout = torch.channels_last
    x = torch.randn(2, channels, *size, dtype=dtype).contiguous(memory_format=layout)
    add = torch.randn(2, channels, *to, dtype=dtype).contiguous(memory_format=layout)
    exact = resize(x.double(), to) + add.double()
    plain = resize(x, to) + add
    assert torch.equal(resize_add(x, add.clone().requires_grad_()), plain)
    with torch.no_grad():
        assert torch.equal(resize_add(x, add.clone().contiguous()), plain)
        kept = add.clone()
        measured = resize_add(x.contiguous(), kept)
    compiled = native.WHY_NOT is None and dtype != torch.float64
    assert (measured is kept) == compiled
    error = (measured - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + 1e-6 * compiled


@needs_native
def test_resize_add_refuses_what_does_not_fit():
    op = torch.ops.dsnet_mm.resize_add_
    add = torch.zeros(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    for wrong in (add[0], add[:, :1], add.double(), torch.zeros(1, 2, 4, 4)):
        with pytest.raises(RuntimeError, match='takes channels-last maps'):
            op(add, wrong)
    with pytest.raises(RuntimeError, match='takes float32 and bfloat16, got Double'):
        op(add.double(), add.double())
    torch.library.opcheck(op.default, (add, add[:, :, :2, :2].contiguous(
        memory_format=torch.channels_last)))  # fmt: skip


# ------------------------------------------------------- depth-wise convolution


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (7, 1), (2, 2), (11, 14)])
@pytest.mark.parametrize('channels', [3, 24, 37, 96])
def test_depthwise_conv(channels, size, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size).to(dtype)
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    bias, border = torch.randn(channels).to(dtype), torch.randn(8, channels).to(dtype)
    for edges in (border, None):
        tensors = [t if t is None else t.double() for t in (x, weight, bias, edges)]
        exact = depthwise_conv(*tensors)
        plain = depthwise_conv(x.requires_grad_(), weight, bias, edges)
        with torch.no_grad():
            measured = depthwise_conv(x, weight, bias, edges)
        assert measured.shape == plain.shape
        error = (measured - exact).abs().max()
        assert error <= 2 * (plain - exact).abs().max() + 1e-6


def test_border_is_what_a_padded_norm_lacks():
    """A convolution of shifted pixels and its border, and one of 1 in each pixel."""
    torch.manual_seed(0)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    taps, bias = weight[:, 0], torch.zeros(5, dtype=torch.float64)
    edges = [-taps[:, i].sum(1) for i in (0, -1)]
    edges += [-taps[:, :, j].sum(1) for j in (0, -1)]
    corners = [taps[:, i, j] for i in (0, -1) for j in (0, -1)]
    for size in ((1, 4), (3, 1), (4, 3)):
        zeros = torch.zeros(1, 5, *size, dtype=torch.float64)
        expected = F.conv2d(zeros + 1, weight, padding=1, groups=5)
        measured = depthwise_conv(
            zeros, weight, bias + taps.sum((1, 2)), torch.stack(edges + corners)
        )
        # Where a side is one pixel, both of its edges are taken from it.
        torch.testing.assert_close(measured, expected, rtol=0, atol=1e-12)


@needs_native
def test_depthwise_conv_refuses_what_does_not_fit():
    op = torch.ops.dsnet_mm.depthwise_conv
    x = torch.zeros(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias, border = torch.zeros(2, 1, 3, 3), torch.zeros(2), torch.zeros(8, 2)
    for wrong in (
        (x[0], weight, bias, border),
        (x.contiguous(), weight, bias, border),
        (x.double(), weight.double(), bias.double(), border.double()),
        (x, weight[:1], bias, border),
        (x, weight, bias.bfloat16(), border),
        (x, weight, bias, border[:4]),
    ):
        with pytest.raises(RuntimeError, match='takes a channels-last map'):
            op(*wrong)
    torch.library.opcheck(op.default, (x, weight, bias, border))
    torch.library.opcheck(op.default, (x, weight, bias, None))


# -------------------------------------------------------------------- projections


def for_type(dtype):
    usable = native.WHY_NOT is None and runs_tiled(torch.zeros(1, dtype=dtype))
    reason = f'no compiled projections in {dtype} here'
    return pytest.param(dtype, marks=pytest.mark.skipif(not usable, reason=reason))


needs_tiles = pytest.mark.skipif(
    not runs_tiled(torch.zeros(1)), reason='no compiled projections'
)
for_types = pytest.mark.parametrize(
    'dtype', [for_type(torch.float32), for_type(torch.bfloat16)], ids=str
)
# Pixels, which go in blocks of 12 or 32 and about 256 on one thread; inputs, and
# hidden channels, which go in blocks of 256; outputs.
WIDTHS = [
    (0, 32, 32, 32),
    (5, 32, 64, 96),
    (33, 160, 288, 32),
    (255, 64, 256, 64),
    (700, 96, 544, 160),
    (700, 96, 320, 96),
]


def layer(inputs, outputs, dtype):
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return weight.to(dtype), torch.randn(outputs).to(dtype)


def tiled_linear(x, w, b, add=None):
    """W x + b, or W x + b + add in the memory of ``add``."""
    if add is None:
        return torch.ops.dsnet_mm.linear(x, w, b)
    if add.dim() == 4:
        add = add.contiguous(memory_format=torch.channels_last)
    torch.ops.dsnet_mm.linear_(add, x, w, b)
    return add


def assert_as_exact(measured, plain, exact):
    """At most twice the error of plain PyTorch, on average and at most."""
    for norm in (lambda x: x.abs().max(), lambda x: x.pow(2).mean().sqrt()):
        if exact.numel():
            assert norm(measured - exact) <= 2 * norm(plain - exact)


@for_types
@pytest.mark.parametrize(('pixels', 'inputs', 'hidden', 'outputs'), WIDTHS)
def test_linear(pixels, inputs, hidden, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(pixels, inputs).to(dtype)
    out = torch.randn(pixels, outputs).to(dtype)
    weight, bias = layer(inputs, outputs, dtype)
    for b in (bias, None):
        for add in (False, True):
            kept = out.clone() if add else None
            measured = tiled_linear(x, to_tiles(weight), b, kept)
            assert (measured is kept) == add
            double = None if b is None else b.double()
            exact = F.linear(x.double(), weight.double(), double)
            plain = F.linear(x, weight, b)
            assert_as_exact(measured, plain + add * out, exact + add * out.double())


@for_types
@pytest.mark.parametrize(('pixels', 'inputs', 'hidden', 'outputs'), WIDTHS)
def test_ffn(pixels, inputs, hidden, outputs, dtype):
    def plain(x, w1, b1, w2, b2, add=0):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2) + add

    torch.manual_seed(0)
    x, add = torch.randn(2, pixels, inputs).to(dtype)
    weights = *layer(inputs, hidden, dtype), *layer(hidden, inputs, dtype)
    tiles = [to_tiles(w) if w.dim() == 2 else w for w in weights]
    exact = plain(*(t.double() for t in (x, *weights)))
    assert_as_exact(tiled_ffn(x, *tiles), plain(x, *weights), exact)
    kept = add.clone()
    assert tiled_ffn(x, *tiles, kept) is kept
    assert_as_exact(kept, plain(x, *weights, add), exact + add.double())
    kept = x.clone()
    tiled_ffn(kept, *tiles, kept)  # in its own memory
    assert_as_exact(kept, plain(x, *weights, x), exact + x.double())


@for_types
@pytest.mark.parametrize('reads', [False, True])
def test_merge(reads, dtype):
    """It is the projections one after the other."""
    torch.manual_seed(0)
    x, f_l, h_l = (torch.randn(700, c).to(dtype) for c in (96, 64, 64))
    (w, b), (w_out, _) = layer(64, 64, dtype), layer(64, 96, dtype)
    (w1, b1), (w2, b2) = layer(96, 288, dtype), layer(288, 96, dtype)
    w, w_out, w1, w2 = map(to_tiles, (w, w_out, w1, w2))
    read = (h_l, w, b) if reads else (None, None, None)
    args = x, f_l, *read, w_out, w1, b1, w2, b2
    merged, local = x.clone(), f_l.clone()
    torch.ops.dsnet_mm.merge_(merged, local, *args[2:])
    if reads:
        torch.ops.dsnet_mm.linear_(f_l, h_l, w, b)
    torch.ops.dsnet_mm.linear_(x, f_l, w_out, None)
    assert torch.equal(merged, tiled_ffn(x, w1, b1, w2, b2, x))
    torch.library.opcheck(torch.ops.dsnet_mm.merge_.default, args)
    for wrong in ((x[:5], *args[1:]), (x, f_l[:5], *args[2:]), (x, x, *args[2:])):
        with pytest.raises(RuntimeError, match='merge_ takes a map, its local stream'):
            torch.ops.dsnet_mm.merge_(*wrong)
    with pytest.raises(RuntimeError, match='merge_ takes a weight and a bias'):
        torch.ops.dsnet_mm.merge_(x, f_l, h_l, None, None, *args[5:])


@needs_tiles
@pytest.mark.parametrize('keeps', [False, True], ids=['recomputed', 'kept'])
@pytest.mark.parametrize('threads', [1, 2, 7])
@pytest.mark.parametrize(
    ('pixels', 'width', 'hidden'),
    # One pixel, more pixels than are taken at a time, more channels than are, and
    # fewer of either than threads would take.
    [(1, 32, 32), (300, 64, 96), (23, 96, 416), (1000, 32, 64)],
)
def test_ffn_backward(pixels, width, hidden, threads, keeps):
    torch.manual_seed(0)
    x, grad = torch.randn(2, pixels, width)
    w1, b1 = layer(width, hidden, torch.float32)
    w2, b2 = layer(hidden, width, torch.float32)

    def plain(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w1, b1, w2)]
        out = F.linear(F.gelu(F.linear(*inputs[:3])), inputs[3])
        return torch.autograd.grad(out, inputs, grad.to(dtype))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tiles = to_tiles(w1), b1, to_tiles(w2), b2
        out, kept = ffn_hidden(x, *tiles)
        measured = ffn_backward(grad, x, w1, b1, w2, *[kept] * keeps)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, tiled_ffn(x, *tiles))
    linear = F.linear(x, w1, b1), F.linear(x.double(), w1.double(), b1.double())
    assert_as_exact(kept, *linear)
    for m, p, e in zip(measured, plain(x.dtype), plain(torch.float64), strict=True):
        assert_as_exact(m, p, e)


@needs_tiles
def test_ffn_passes_opcheck():
    x, w1, b1 = torch.randn(5, 32), torch.randn(64, 32), torch.randn(64)
    w2 = w1.t().contiguous()
    ops = torch.ops.dsnet_mm
    hidden = torch.randn(5, 64)
    for kept in (None, hidden):
        torch.library.opcheck(ops.ffn_backward.default, (x, x, w1, b1, w2, kept))
    tiles = to_tiles(w1), b1, to_tiles(w2), torch.zeros(32)
    torch.library.opcheck(ops.ffn.default, (x, *tiles))
    torch.library.opcheck(ops.ffn_hidden.default, (x, *tiles))
    torch.library.opcheck(ops.ffn_.default, (x.clone(), x, *tiles))


@needs_tiles
def test_ffn_backward_refuses_what_does_not_fit():
    x, w1, b1 = torch.zeros(3, 32), torch.zeros(64, 32), torch.zeros(64)
    for change in (
        dict(grad=x[:2]),
        dict(x=x[:, :16], grad=x[:, :16]),
        dict(w1=w1[:40], b1=b1[:40], w2=w1[:40].t()),
        dict(b1=b1[:3]),
        dict(w2=w1),
        dict(x=x[:0], grad=x[:0]),
        dict(hidden=x),
    ):
        with pytest.raises(RuntimeError, match='ffn_backward takes'):
            ffn_backward(**dict(grad=x, x=x, w1=w1, b1=b1, w2=w1.t()) | change)
    with pytest.raises(RuntimeError, match='contiguous'):
        ffn_backward(x, x.t().contiguous().t(), w1, b1, w1.t().contiguous())
    with pytest.raises(RuntimeError, match='one type, Float'):
        ffn_backward(x.double(), x, w1, b1, w1.t().contiguous())


def gelu_by_ffn(x):
    """GELU of (..., 32)."""
    one = to_tiles(torch.eye(32).to(x.dtype))
    zero = torch.zeros(32, dtype=x.dtype)
    return tiled_ffn(x, one, zero, one, zero)


@for_types
def test_gelu(dtype):
    x = torch.linspace(-7, 7, 64000).to(dtype).view(-1, 32)
    exact = F.gelu(x.double())
    bound = 3e-7 * x.double().abs() if dtype == torch.float32 else 1.5e-4
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((gelu_by_ffn(x) - exact).abs() <= bound + rounding).all()


@for_types
@pytest.mark.parametrize('value', [-1e30, -50, -9, 9, 50, 1e30])
def test_gelu_far_from_zero(value, dtype):
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 0] = value
    out = gelu_by_ffn(x)
    bound = 3e-7 if dtype == torch.float32 else 2e-5
    assert abs(out[0, 0] - x[0, 0].clamp(min=0)) <= bound * abs(value)
    assert not out[0, 1:].any()


@for_types
def test_what_is_no_number_stays_so(dtype):
    x = torch.full((1, 32), torch.nan, dtype=dtype)
    assert gelu_by_ffn(x).isnan().all()


@for_types
def test_projections_refuse_what_does_not_fit(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    weight, bias = layer(32, 64, dtype)
    tiles = to_tiles(weight)
    out = torch.zeros(3, 64, dtype=dtype)
    op = torch.ops.dsnet_mm.linear_
    for wrong in ((out, x[:2]), (out[:, :32], x), (out, out), (out[0], x)):
        with pytest.raises(RuntimeError, match='projections from 32 to 64 channels'):
            op(*wrong, tiles, bias)
    for wrong in ((out.half(), x), (out.t().contiguous().t(), x)):
        with pytest.raises(RuntimeError, match='take tensors of one type'):
            op(*wrong, tiles, bias)
    with pytest.raises(RuntimeError, match='float32 with AVX2 and bfloat16 with AMX'):
        op(out, x.half(), tiles, bias)
    with pytest.raises(RuntimeError, match='take weights'):
        op(out, x, weight, bias)
    with pytest.raises(RuntimeError, match='take biases of as many'):
        op(out, x, tiles, bias[:32])
    with pytest.raises(RuntimeError, match='maps or tokens, got a number'):
        torch.ops.dsnet_mm.linear(x[0, 0], tiles, bias)
    with pytest.raises(RuntimeError, match='ffn_hidden takes AVX2'):
        floats = to_tiles(weight.float()), bias.float()
        torch.ops.dsnet_mm.ffn_hidden(x.float(), *floats, *floats)
    with pytest.raises(RuntimeError, match='the hidden layer has 64 or 32'):
        torch.ops.dsnet_mm.ffn_(out, x, tiles, bias, tiles, bias)
    torch.library.opcheck(op.default, (out, x, tiles, bias))
    maps = x.new_zeros(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    for pixels in (x, maps):
        torch.library.opcheck(torch.ops.dsnet_mm.linear.default, (pixels, tiles, None))


@for_types
@pytest.mark.parametrize('count', [1, 2, 13])
def test_few_pixels_are_projected_as_among_many(count, dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64).to(dtype)
    (w1, b1), (w2, b2) = layer(64, 96, dtype), layer(96, 64, dtype)
    w1, w2 = to_tiles(w1), to_tiles(w2)
    for project in (
        lambda x: tiled_linear(x, w1, b1),
        lambda x: tiled_ffn(x, w1, b1, w2, b2, x.clone()),
    ):
        assert torch.equal(project(x[:count]), project(x)[:count])


@for_types
def test_maps_are_projected_as_their_pixels(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 3, 5).to(dtype)
    (w1, b1), (w2, b2) = layer(32, 64, dtype), layer(64, 32, dtype)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    w1, w2 = to_tiles(w1), to_tiles(w2)
    for project in (
        lambda x: tiled_linear(x, w1, b1),
        lambda x: tiled_linear(tiled_linear(x, w1, b1), w2, b2, x.clone()),
        lambda x: tiled_ffn(x, w1, b1, w2, b2),
        lambda x: tiled_ffn(x, w1, b1, w2, b2, x.clone()),
    ):
        out = project(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        measured = out.permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(measured, project(pixels))


@for_types
def test_projections_are_left_out_where_they_are_not_wanted(dtype, monkeypatch):
    monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    assert not runs_tiled(torch.zeros(1, dtype=dtype))


# ------------------------------------------------- compile, export, autocast


@needs_native
def test_compiles_to_one_graph():
    torch._dynamo.reset()
    inputs = streams(1, 20, 10, 2, 8, torch.float32)
    # Everything but inductor, whose first kernel takes minutes to compile.
    compiled = torch.compile(co_attention, fullgraph=True, backend='aot_eager')
    measured = outputs_and_gradients(compiled, *inputs, 2)
    expected = outputs_and_gradients(co_attention, *inputs, 2)
    assert worst(measured, [e.double() for e in expected]) < 1e-6
    torch.manual_seed(0)
    dropped = compiled(*inputs, 2, 0.5)
    assert not torch.equal(dropped[0], measured[0])


class Module(torch.nn.Module):
    def forward(self, local, global_):
        return co_attention(local, global_, 2)


def test_exports_to_operators_of_pytorch():
    inputs = streams(1, 20, 10, 2, 8, torch.float32, grad=False)
    program = torch.export.export(Module(), inputs)
    assert 'dsnet_mm' not in str(program.graph)
    for m, e in zip(program.module()(*inputs), co_attention(*inputs, 2), strict=True):
        torch.testing.assert_close(m, e)


@needs_native
def test_autocast_runs_the_op_in_its_dtype():
    local, global_ = streams(1, 20, 10, 2, 8, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        outs = co_attention(local, global_.bfloat16(), 2)
    assert {o.dtype for o in outs} == {torch.bfloat16}
    expected = native_op(local.bfloat16(), global_.bfloat16(), 2)
    assert all(map(torch.equal, outs, expected))
    sum(o.sum() for o in outs).backward()
    assert local.grad.dtype == torch.float32


# --------------------------------------------------------- selection, messages


def python(code, **environment):
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, 'PYTHONPATH': str(REPO), **environment},
    )


HIDE = 'import sys; sys.modules["dsnet_mm.ops._C"] = None\n'


def test_without_extension():
    done = python(
        HIDE + 'import dsnet_mm, dsnet_mm.ops as ops, torch\n'
        'local, rest = torch.randn(1, 6, 48), torch.randn(1, 4, 48)\n'
        'ops.co_attention(local, rest, 2, 0.1)\n'
        'print(*ops.select_path("cpu"))'
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert done.stdout.startswith('sdpa the compiled op is not there: ')


def test_native_without_extension():
    done = python(
        HIDE + 'import dsnet_mm.ops; dsnet_mm.ops.select_path("cpu")',
        DSNET_MM_OPS='native',
    )
    assert 'pip install --no-build-isolation -e .' in done.stderr.splitlines()[-1]


def test_extension_of_another_torch_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(native, '__file__', str(tmp_path / 'native.py'))
    (tmp_path / 'build_info.json').write_text(json.dumps(dict(torch='1.0.0')))
    assert native._load() == f'built for torch 1.0.0, you have {torch.__version__}'


@needs_native
def test_forced_paths(monkeypatch):
    local, global_ = streams(1, 6, 4, 2, 8)
    operators = dict(reference='aten::softmax', sdpa='scaled_dot', native='dsnet_mm::')
    for path, operator in operators.items():
        monkeypatch.setenv('DSNET_MM_OPS', path)
        with torch.profiler.profile() as profile:
            co_attention(local, global_, 2)
        ran = {name for name in operators.values() for e in profile.events()
               if name in e.name}  # fmt: skip
        assert operator in ran
        assert path == 'sdpa' or ran == {operator}
        assert select_path('cpu') == (path, f'DSNET_MM_OPS={path}')
    monkeypatch.setenv('DSNET_MM_OPS', 'fast')
    with pytest.raises(ValueError, match=r"one of reference, sdpa, native, got 'fast'"):
        co_attention(local, global_, 2)


@needs_native
def test_native_is_chosen(monkeypatch):
    monkeypatch.delenv('DSNET_MM_OPS', raising=False)
    assert select_path('cpu') == ('native', 'compiled')
    assert select_path('meta')[0] == 'sdpa'


@needs_native
def test_a_library_of_older_sources_is_not_taken(monkeypatch):
    assert native._load() is None
    monkeypatch.setattr(native, '_OPS', (*native._OPS, 'of_tomorrow'))
    assert native._load() == 'built from older sources'


@pytest.mark.parametrize(
    ('info', 'why_not', 'sentence'),
    [
        (dict(torch='2'), None, 'compiled for the CPU'),
        (dict(torch='2', cuda=None), None, 'compiled for the CPU'),
        (dict(torch='2', cuda='13.0'), None, 'compiled for CPU and CUDA 13.0'),
        (dict(reason='no compiler'), 'not compiled (no compiler)', 'not compiled (no'),
    ],
)
def test_doctor_tells_what_the_op_is_compiled_for(
    info, why_not, sentence, tmp_path, monkeypatch
):
    from dsnet_mm.environment import ops_build

    (tmp_path / 'build_info.json').write_text(json.dumps(info))
    monkeypatch.setattr(native, '__file__', str(tmp_path / 'native.py'))
    monkeypatch.setattr(native, 'WHY_NOT', why_not)
    assert ops_build().startswith(sentence)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    if info.get('cuda'):
        assert native.why_not_cuda() is None
    else:
        reason = re.escape(f'not for it ({why_not or "CPU only"}); ')
        assert re.match(f'there is a GPU.*{reason}.*pip install', native.why_not_cuda())


@pytest.mark.parametrize('cuda', [None, '13.0'])
def test_the_build_notes_what_it_is_for(cuda, tmp_path, monkeypatch):
    arguments = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'dsnet_mm' / 'ops').mkdir(parents=True)
    monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(cpp_extension, 'CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(cpp_extension.BuildExtension, 'run', lambda self: None)
    monkeypatch.setattr(setuptools, 'setup', arguments.update)
    runpy.run_path(str(REPO / 'setup.py'))
    if 'ext_modules' not in arguments:
        pytest.skip('nothing to build the ops with')
    arguments['cmdclass']['build_ext'](setuptools.Distribution()).run()
    info = json.loads((tmp_path / 'dsnet_mm/ops/build_info.json').read_text())
    assert info == dict(torch=torch.__version__, cuda=cuda)


def test_doctor_tells_the_path_and_why(monkeypatch):
    from dsnet_mm.environment import co_attention_path

    monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    assert co_attention_path('cpu') == 'sdpa (DSNET_MM_OPS=sdpa)'
    monkeypatch.setenv('DSNET_MM_OPS', 'none')
    assert co_attention_path('cpu').startswith('DSNET_MM_OPS is one of')


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (lambda a, b: (a[0], b, 2), ValueError, r'takes projections of shape'),
        (lambda a, b: (a[:1], b, 2), ValueError, r'different batch sizes'),
        (lambda a, b: (a[..., :24], b, 2), ValueError, r'different widths'),
        (lambda a, b: (a, b, 3), ValueError, r'num_heads=3 heads'),
        (lambda a, b: (a, b, 0), ValueError, r'num_heads=0 heads'),
        (lambda a, b: (a, b[:, :0], 2), ValueError, r'one token at least'),
        (lambda a, b: (a, b, 2, 1.0), ValueError, r'lies in \[0, 1\), got 1.0'),
        (lambda a, b: (a, b.to('meta'), 2), ValueError, r'on different devices'),
        (lambda a, b: (a, b.float(), 2), TypeError, r'different dtypes'),
        (lambda a, b: (a.int(), b.int(), 2), TypeError, r'floating point'),
    ],
)
def test_wrong_inputs(change, error, message):
    with pytest.raises(error, match=message):
        co_attention(*change(*streams(2, 6, 4, 2, 8, grad=False)))


@needs_native
@pytest.mark.parametrize(
    ('shapes', 'message'),
    [
        ([(1, 6, 48), (1, 4, 24)], 'takes'),
        ([(1, 6, 48), (2, 4, 48)], 'takes'),
        ([(1, 0, 48), (1, 4, 48)], 'takes'),
    ],
)
def test_the_op_itself_checks_shapes(shapes, message):
    with pytest.raises(RuntimeError, match=message):
        native_op(*(torch.randn(shape) for shape in shapes), 2)

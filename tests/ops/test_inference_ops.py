"""The operators of inference and of the feed-forward network, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.ops import can_pack, pack, resize, unpack
from dsnet_mm.ops.packing import PACKED_DTYPES
from tests.conftest import (
    needs_native,
    needs_packing,
    run_python,
    run_with_instructions,
)

pytestmark = pytest.mark.usefixtures('threads')
ops = torch.ops.dsnet_mm
LAYOUT = dict(memory_format=torch.channels_last)


def assert_as_exact(measured, plain, exact):
    """At most twice the error of plain PyTorch, on average and at most."""
    for norm in (lambda x: x.abs().max(), lambda x: x.pow(2).mean().sqrt()):
        if exact.numel():
            assert norm(measured - exact) <= 2 * norm(plain - exact)


# ---------------------------------------------------------------------- resizing


@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ('size', 'to'),
    [((7, 7), (56, 56)), ((3, 5), (7, 4)), ((1, 1), (3, 1)), ((4, 6), (4, 6))],
)
@pytest.mark.parametrize('channels', [3, 24, 37])
def test_resize_add(channels, size, to, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, dtype=dtype).contiguous(**LAYOUT)
    out = torch.randn(2, channels, *to, dtype=dtype).contiguous(**LAYOUT)
    exact = resize(x.double(), to) + out.double()
    plain = resize(x, to) + out
    ops.resize_add_(out, x)
    error = (out - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + 1e-6


@needs_native
def test_resize_add_refuses_what_does_not_fit():
    add = torch.zeros(1, 2, 4, 4).contiguous(**LAYOUT)
    for wrong in (add[0], add[:, :1], add.double(), torch.zeros(1, 2, 4, 4)):
        with pytest.raises(RuntimeError, match='takes channels-last maps'):
            ops.resize_add_(add, wrong)
    with pytest.raises(RuntimeError, match=r'float32 .* bfloat16, got Double'):
        ops.resize_add_(add.double(), add.double())
    small = add[:, :, :2, :2].contiguous(**LAYOUT)
    torch.library.opcheck(ops.resize_add_.default, (add, small))


# ------------------------------------------------------- depth-wise convolution


def residual_conv(x, weight, bias, scale=None, shift=None):
    """x + conv(scale * x + shift) by PyTorch."""
    normed = x if scale is None else x * scale[:, None, None]
    normed = normed if shift is None else normed + shift[:, None, None]
    return x + F.conv2d(normed, weight, bias, padding=1, groups=len(weight))


@needs_native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (7, 1), (2, 2), (11, 14)])
@pytest.mark.parametrize('channels', [3, 24, 37, 96])
def test_residual_conv(channels, size, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size).to(dtype).contiguous(**LAYOUT)
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    bias, scale, shift = torch.randn(3, channels).to(dtype)
    for norm in ((scale, shift), (None, None), (scale, None), (None, shift)):
        args = x, weight, bias, *norm
        exact = residual_conv(*(t if t is None else t.double() for t in args))
        plain = residual_conv(*args)
        measured = ops.residual_conv(*args)
        assert measured.is_contiguous(**LAYOUT)
        error = (measured - exact).abs().max()
        assert error <= 2 * (plain - exact).abs().max() + 1e-6


@needs_native
def test_residual_conv_refuses_what_does_not_fit():
    x = torch.zeros(1, 2, 4, 4).contiguous(**LAYOUT)
    weight, bias = torch.zeros(2, 1, 3, 3), torch.zeros(2)
    for wrong in (
        (x[0], weight, bias, bias, bias),
        (x.contiguous(), weight, bias, bias, bias),
        (x.double(), weight.double(), *[bias.double()] * 3),
        (x, weight[:1], bias, bias, bias),
        (x, weight.view(9, 2), bias, bias, bias),
        (x, weight, bias.bfloat16(), bias, bias),
        (x, weight, bias, bias[:1], bias),
        (x, weight, bias, bias, bias[:1]),
    ):
        with pytest.raises(RuntimeError, match='takes a channels-last map'):
            ops.residual_conv(*wrong)
    torch.library.opcheck(ops.residual_conv.default, (x, weight, bias, bias, bias))
    torch.library.opcheck(ops.residual_conv.default, (x, weight, bias, None, None))


# -------------------------------------------------------------------- projections

for_types = pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                dtype not in PACKED_DTYPES,
                reason=f'no compiled projections in {dtype} here',
            ),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=str,
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


def plain_ffn(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


@for_types
def test_weights_are_packed_and_unpacked(dtype):
    weight = torch.randn(96, 64).to(dtype)
    assert can_pack(weight)
    assert not torch.equal(pack(weight).flatten(), weight.flatten())
    assert torch.equal(unpack(pack(weight)), weight)


def test_what_cannot_be_packed():
    assert not can_pack(torch.zeros(64, 48))
    assert not can_pack(torch.zeros(40, 64))
    assert not can_pack(torch.zeros(64, 64).double())
    assert not can_pack(torch.zeros(64, 64, device='meta'))


@for_types
@pytest.mark.parametrize(('pixels', 'inputs', 'hidden', 'outputs'), WIDTHS)
def test_linear(pixels, inputs, hidden, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(pixels, inputs).to(dtype)
    out = torch.randn(pixels, outputs).to(dtype)
    weight, bias = layer(inputs, outputs, dtype)
    for b in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        plain = F.linear(x, weight, b)
        assert_as_exact(ops.linear(x, pack(weight), b), plain, exact)
        measured = out.clone()
        ops.linear_(measured, x, pack(weight), b)
        assert_as_exact(measured, plain + out, exact + out.double())


@for_types
def test_parts_of_a_weight(dtype):
    """Some of its outputs, and some of its inputs, without a copy."""
    torch.manual_seed(0)
    weight, _ = layer(96, 128, dtype)
    x = torch.randn(40, 96).to(dtype)
    packed = pack(weight)
    panel, depth = (32, 1) if dtype == torch.float32 else (16, 32)
    measured = ops.linear(x, packed[64 // panel :], None)
    assert torch.equal(measured, ops.linear(x, packed, None)[:, 64:])
    part = packed[:, 32 // depth : 96 // depth]
    measured = ops.linear(x[:, 32:].contiguous(), part, None)
    expected = ops.linear(x[:, 32:].contiguous(), pack(weight[:, 32:]), None)
    assert torch.equal(measured, expected)


@for_types
@pytest.mark.parametrize(('pixels', 'inputs', 'hidden', 'outputs'), WIDTHS)
def test_ffn(pixels, inputs, hidden, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(pixels, inputs).to(dtype)
    w1, b1, w2, b2 = *layer(inputs, hidden, dtype), *layer(hidden, outputs, dtype)
    exact = plain_ffn(*(t.double() for t in (x, w1, b1, w2, b2)))
    measured = ops.ffn(x, pack(w1), b1, pack(w2), b2)
    assert_as_exact(measured, plain_ffn(x, w1, b1, w2, b2), exact)


@for_types
@pytest.mark.parametrize('aligned', [False, True])
def test_merge(aligned, dtype):
    """f_l += W h_l + b, x += W_out f_l and x += FFN(x)."""
    torch.manual_seed(0)
    x, f_l, h_l = (torch.randn(700, c).to(dtype) for c in (96, 64, 64))
    (w, b), (w_out, _) = layer(64, 64, dtype), layer(64, 96, dtype)
    (w1, b1), (w2, b2) = layer(96, 288, dtype), layer(288, 96, dtype)

    def plain(x, f_l, h_l, w, b, w_out, *ffn):
        f_l = f_l + F.linear(h_l, w, b) if aligned else f_l
        x = x + F.linear(f_l, w_out)
        return x + plain_ffn(x, *ffn)

    tensors = x, f_l, h_l, w, b, w_out, w1, b1, w2, b2
    exact = plain(*(t.double() for t in tensors))
    w, w_out, w1, w2 = map(pack, (w, w_out, w1, w2))
    isa = (h_l, w, b) if aligned else (None, None, None)
    args = x, f_l, *isa, w_out, w1, b1, w2, b2
    merged = x.clone()
    ops.merge_(merged, f_l.clone(), *args[2:])
    assert_as_exact(merged, plain(*tensors), exact)
    torch.library.opcheck(ops.merge_.default, args)
    names = ['x', 'f_l', 'h_l', 'w', 'b', 'w_out', 'w1', 'b1', 'w2', 'b2']
    before = x.clone(), f_l.clone()
    for change in (
        dict(x=x[:5]),
        dict(f_l=f_l[:5]),
        dict(f_l=x.clone()),
        dict(f_l=f_l.view(70, 10, 64)),  # as many pixels
        dict(h_l=h_l.clone(), w=None, b=None),
        dict(h_l=f_l, w=w, b=b),
        dict(w1=w1[:0], b1=b1[:0], w2=w2[:, :0]),  # was a division by zero
    ):
        with pytest.raises(RuntimeError, match=r'merge_|projections|memory'):
            ops.merge_(**dict(zip(names, args, strict=True)) | change)
    assert torch.equal(x, before[0]) and torch.equal(f_l, before[1])


@for_types
@pytest.mark.parametrize(
    ('pixels', 'width', 'hidden'),
    # One pixel, more pixels than are taken at a time, more channels than are, and
    # fewer of either than threads would take.
    [(1, 32, 32), (300, 64, 96), (23, 96, 416), (1000, 32, 64)],
)
def test_ffn_backward(pixels, width, hidden, dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(2, pixels, width).to(dtype)
    (w1, b1), (w2, _) = layer(width, hidden, dtype), layer(hidden, width, dtype)

    def plain(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, w1, b1, w2)]
        out = plain_ffn(*inputs, torch.zeros(width, dtype=dtype))
        return torch.autograd.grad(out, inputs, grad.to(dtype))

    measured = ops.ffn_backward(grad, x, w1, b1, w2)
    assert {m.dtype for m in measured[1:]} == {torch.float32}
    for m, p, e in zip(measured, plain(x.dtype), plain(torch.float64), strict=True):
        assert_as_exact(m, p, e)


@needs_packing
def test_ffn_passes_opcheck():
    x, w1, b1 = torch.randn(5, 32), torch.randn(64, 32), torch.randn(64)
    w2 = w1.t().contiguous()
    torch.library.opcheck(ops.ffn_backward.default, (x, x, w1, b1, w2))
    packed = pack(w1), b1, pack(w2), torch.zeros(32)
    torch.library.opcheck(ops.ffn.default, (x, *packed))


@needs_packing
def test_ffn_backward_refuses_what_does_not_fit():
    x, w1, b1 = torch.zeros(3, 32), torch.zeros(64, 32), torch.zeros(64)
    right = dict(grad=x, x=x, w1=w1, b1=b1, w2=w1.t().contiguous())
    for change in (
        dict(grad=x[:2]),
        dict(x=x[:, :16], grad=x[:, :16]),
        dict(w1=w1[:40], b1=b1[:40], w2=w1[:40].t()),
        dict(b1=b1[:3]),
        dict(w2=w1),
        dict(x=x[:0], grad=x[:0]),
        dict(w1=w1[:0], b1=b1[:0], w2=w1[:0].t()),  # was a division by zero
    ):
        with pytest.raises(RuntimeError, match='ffn_backward takes'):
            ops.ffn_backward(**right | change)
    with pytest.raises(RuntimeError, match='contiguous'):
        ops.ffn_backward(**right | dict(x=x.t().contiguous().t()))
    with pytest.raises(RuntimeError, match='one type, Float'):
        ops.ffn_backward(**right | dict(grad=x.double()))


def gelu_by_ffn(x):
    """GELU of (..., 32)."""
    one = pack(torch.eye(32).to(x.dtype))
    zero = torch.zeros(32, dtype=x.dtype)
    return ops.ffn(x, one, zero, one, zero)


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
def test_nan_stays_nan(dtype):
    x = torch.full((1, 32), torch.nan, dtype=dtype)
    assert gelu_by_ffn(x).isnan().all()


@for_types
def test_projections_refuse_what_does_not_fit(dtype):
    x = torch.zeros(3, 32, dtype=dtype)
    weight, bias = layer(32, 64, dtype)
    packed = pack(weight)
    out = torch.zeros(3, 64, dtype=dtype)
    strided = packed.transpose(0, -1).contiguous().transpose(0, -1)
    for op, *wrong in (
        (ops.linear_, out, x[:2], packed, bias),
        (ops.linear_, out[:, :32], x, packed, bias),
        (ops.linear_, out, out.clone(), packed, bias),
        (ops.linear_, out[0], x, packed, bias),
        (ops.linear_, out.half(), x, packed, bias),
        (ops.linear_, out.t().contiguous().t(), x, packed, bias),
        (ops.linear_, out, x.half(), packed, bias),
        (ops.linear_, out, x, strided, bias),
        (ops.linear_, out, x, packed, bias[:32]),
        (ops.linear, x[0, 0], packed, bias),
        (ops.ffn, x, weight, bias, weight, bias),
        (ops.ffn, x, packed, bias, packed, bias),
    ):
        with pytest.raises(RuntimeError, match=r'projections|hidden layer'):
            op(*wrong)
    torch.library.opcheck(ops.linear_.default, (out, x, packed, bias))
    maps = x.new_zeros(2, 32, 3, 5).contiguous(**LAYOUT)
    for pixels in (x, maps):
        torch.library.opcheck(ops.linear.default, (pixels, packed, None))


@for_types
@pytest.mark.parametrize('count', [1, 2, 13])
def test_few_pixels_are_projected_as_among_many(count, dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64).to(dtype)
    (w1, b1), (w2, b2) = layer(64, 96, dtype), layer(96, 64, dtype)
    w1, w2 = pack(w1), pack(w2)
    for project in (
        lambda x: ops.linear(x, w1, b1),
        lambda x: ops.ffn(x, w1, b1, w2, b2),
    ):
        assert torch.equal(project(x[:count]), project(x)[:count])


@for_types
def test_as_many_pixels_of_another_shape_are_refused(dtype):
    weight, bias = layer(32, 32, dtype)
    weight = pack(weight)
    ffn = weight, bias, weight, bias
    maps = [torch.zeros(2, 32, *size, dtype=dtype) for size in ((3, 5), (5, 3))]
    maps = [x.contiguous(**LAYOUT) for x in maps]
    tokens = torch.zeros(2, 3, 32, dtype=dtype), torch.zeros(3, 2, 32, dtype=dtype)
    # The last one reads what it writes.
    for out, x in (maps, tokens, maps[:1] * 2):
        with pytest.raises(RuntimeError, match=r'got|memory'):
            ops.linear_(out, x, weight, bias)
        with pytest.raises(RuntimeError, match=r'got|memory'):
            ops.merge_(out, x, None, None, None, weight, *ffn)


@for_types
def test_tokens_are_merged_into_a_map(dtype):
    """And a map as its tokens."""
    torch.manual_seed(0)
    weight, bias = layer(32, 32, dtype)
    weight = pack(weight)
    x, f_l, h_l = torch.randn(3, 2, 32, 3, 5).to(dtype)
    h_l = h_l.contiguous(**LAYOUT)
    results = []
    for h in (h_l, h_l.permute(0, 2, 3, 1).flatten(1, 2)):
        results.append([x.contiguous(**LAYOUT), f_l.contiguous(**LAYOUT)])
        isa = h, weight, bias
        ops.merge_(*results[-1], *isa, weight, weight, bias, weight, bias)
    assert all(map(torch.equal, *results))


@for_types
def test_maps_are_projected_as_their_pixels(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 3, 5).to(dtype)
    (w1, b1), (w2, b2) = layer(32, 64, dtype), layer(64, 32, dtype)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    w1, w2 = pack(w1), pack(w2)

    def add(x):
        out = torch.ones_like(x)
        ops.linear_(out, ops.linear(x, w1, b1), w2, b2)
        return out

    projections = [
        lambda x: ops.linear(x, w1, b1),
        add,
        lambda x: ops.ffn(x, w1, b1, w2, b2),
    ]
    x = x.contiguous(**LAYOUT)
    for project in projections:
        out = project(x)
        assert out.is_contiguous(**LAYOUT)
        measured = out.permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(measured, project(pixels))


# ---------------------------------------------------------------- all of them


def samples(dtype=torch.float32):
    """Arguments of each operator, by name."""
    torch.manual_seed(0)
    x = torch.randn(40, 64).to(dtype)
    (w, b), (w1, b1), (w2, b2) = (
        layer(*widths, dtype) for widths in ((64, 64), (64, 96), (96, 64))
    )
    w, w1, w2 = map(pack, (w, w1, w2))
    maps = torch.randn(2, 1, 64, 4, 5).to(dtype)
    maps = [m.contiguous(**LAYOUT) for m in maps]
    return dict(
        ffn=(x, w1, b1, w2, b2),
        linear=(x, w, b),
        linear_=(x.clone(), x, w, b),
        merge_=(x.clone(), x.clone(), x, w, b, w, w1, b1, w2, b2),
        residual_conv=(maps[0], torch.randn(64, 1, 3, 3).to(dtype), b, b, b),
        resize_add_=(*maps,),
    )


@needs_packing
@pytest.mark.parametrize('name', samples() if torch.float32 in PACKED_DTYPES else ())
def test_gradients_are_refused_and_not_dropped(name):
    args = samples()[name]
    op = getattr(ops, name)
    for i, arg in enumerate(args):
        needs_grad = [*args[:i], arg.clone().requires_grad_(), *args[i + 1 :]]
        with pytest.raises(RuntimeError, match=rf'{name} has no backward'):
            op(*needs_grad)
    with torch.no_grad():
        op(*needs_grad)


@needs_packing
@pytest.mark.parametrize('name', ['linear_', 'merge_', 'resize_add_'])
def test_autograd_detects_what_is_written(name):
    """Of a tensor that another operator saved for its backward."""
    out, *args = samples()[name]
    weight = torch.ones(1, requires_grad=True)
    product = (weight * out).sum()
    getattr(ops, name)(out, *args)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        product.backward()


@needs_packing
@pytest.mark.parametrize('name', samples() if torch.float32 in PACKED_DTYPES else ())
def test_results_do_not_depend_on_the_threads(name, threads):
    def results():
        args = samples()[name]
        out = getattr(ops, name)(*args)
        return args if out is None else out if isinstance(out, tuple) else (out,)

    measured = results()
    torch.set_num_threads(1)  # the fixture restores the number
    assert all(map(torch.equal, measured, results()))


@needs_native
@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_older_instruction_sets(capability, threads):
    if threads != 2:
        pytest.skip('one number of threads will do')
    code = (
        'import torch; from tests.ops.test_inference_ops import *\n'
        'for channels in (24, 37):\n'
        '    for dtype in (torch.float32, torch.bfloat16):\n'
        '        test_residual_conv(channels, (11, 14), dtype)\n'
        'if torch.float32 in PACKED_DTYPES:\n'
        '    for widths in WIDTHS:\n'
        '        test_linear(*widths, torch.float32)\n'
        '        test_ffn(*widths, torch.float32)\n'
        '    test_merge(True, torch.float32)\n'
        '    test_ffn_backward(300, 64, 96, torch.float32)\n'
        '    test_gelu(torch.float32)\n'
        '    test_gelu_far_from_zero(-50, torch.float32)\n'
        '    test_nan_stays_nan(torch.float32)\n'
    )
    run_with_instructions(capability, code)


def test_without_the_library_nothing_is_packed():
    code = (
        'import sys; sys.modules["dsnet_mm.ops._C"] = None\n'
        'import torch; from dsnet_mm.ops import can_pack\n'
        'assert not can_pack(torch.zeros(64, 64))'
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr

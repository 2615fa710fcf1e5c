"""Random calls of every operator: it refuses them, or computes what PyTorch computes.

Hypothesis draws shapes, types and strides, and spoils one argument or none. A size may
be zero. A call whose arguments fit is not refused, and one that is refused has written
nothing. The calls run in another process, because a crash would end this one.
"""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsnet_mm.models import DSBlock, fuse_for_inference
from dsnet_mm.ops import pack, reference_co_attention, resize, unpack
from dsnet_mm.ops.packing import PACKED_DTYPES
from tests.conftest import needs_native, run_python

pytestmark = needs_native
# Largest error, relative to the largest number or to 1.
ERROR = {
    torch.float64: 1e-12,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
few = st.sampled_from((0, 1, 2, 3, 5))
flag = st.booleans()

# ----------------------------------------------------------------- fitting arguments


class Call:
    """Draws the arguments of a call."""

    def __init__(self, draw, dtypes):
        self.draw = draw
        self.dtype = draw(st.sampled_from(dtypes))
        self.sizes = draw(st.lists(few, max_size=4))

    def random(self, *shape):
        return torch.randn(shape).to(self.dtype)

    def width(self):
        return self.draw(st.sampled_from((32, 64, 320)))

    def map(self, n, channels, height, width):
        x = self.random(n, channels, height, width)
        return x.contiguous(memory_format=torch.channels_last)

    def pixels(self, channels):
        """A map, if the sizes are three, or tokens."""
        if len(self.sizes) == 3:
            return self.map(self.sizes[0], channels, *self.sizes[1:])
        return self.random(*self.sizes, channels)

    def layer(self, inputs, outputs, packed=True):
        weight = self.random(outputs, inputs) / inputs**0.5
        return [pack(weight) if packed else weight, self.random(outputs)]

    def optional(self, x):
        return x if self.draw(flag) else None

    def attention(self, streams):
        heads, width = self.draw(st.integers(1, 3)), self.draw(st.integers(1, 9))
        tokens = st.sampled_from((1, 2, 5, 70))
        n, dropout_p = self.draw(few), self.draw(st.sampled_from((0.0, 0.3)))
        qkv = [
            self.random(n, self.draw(tokens), 3 * heads * width) for _ in range(streams)
        ]
        return [*qkv, torch.tensor([7]), heads, dropout_p]


def attention_backward(call, streams):
    name = 'self_attention' if streams == 1 else 'co_attention'
    *qkv, seed, heads, dropout_p = call.attention(streams)
    outs = getattr(torch.ops.dsnet_mm, name)(*qkv, seed, heads, dropout_p)
    grads = [call.random(*out.shape) for out in outs[: len(qkv)]]
    return [*grads, *qkv, *outs, seed, heads, dropout_p]


def linear(call):
    inputs, outputs = call.width(), call.width()
    weight, bias = call.layer(inputs, outputs)
    return [call.pixels(inputs), weight, call.optional(bias)]


def linear_(call):
    inputs, outputs = call.width(), call.width()
    weight, bias = call.layer(inputs, outputs)
    return [call.pixels(outputs), call.pixels(inputs), weight, call.optional(bias)]


def ffn(call):
    inputs, hidden, outputs = (call.width() for _ in range(3))
    first, second = call.layer(inputs, hidden), call.layer(hidden, outputs)
    return [call.pixels(inputs), *first, *second]


def ffn_backward(call):
    width, hidden = call.width(), call.width()
    x, grad = call.random(2, call.draw(st.sampled_from((1, 5, 300))), width)
    (w1, b1), (w2, _) = (
        call.layer(*s, False) for s in ((width, hidden), (hidden, width))
    )
    return [grad, x, w1, b1, w2]


def merge_(call):
    width, local_width, hidden = call.width(), call.width(), call.width()
    h_l = call.pixels(local_width)
    if h_l.dim() == 4 and call.draw(flag):
        h_l = h_l.permute(0, 2, 3, 1).flatten(1, 2)
    isa = [h_l, *call.layer(local_width, local_width)]
    isa = isa if call.draw(flag) else [None] * 3
    w_out, _ = call.layer(local_width, width)
    first, second = call.layer(width, hidden), call.layer(hidden, width)
    return [call.pixels(width), call.pixels(local_width), *isa, w_out, *first, *second]


def residual_conv(call):
    n, channels, *size = (call.draw(few) for _ in range(4))
    norm = [call.optional(call.random(channels)) for _ in range(2)]
    weight, bias = call.random(channels, 1, 3, 3), call.random(channels)
    return [call.map(n, channels, *size), weight, bias, *norm]


def resize_add_(call):
    n, channels, *size = (call.draw(few) for _ in range(4))
    of = [call.draw(st.integers(1, 5)) for _ in range(2)]
    return [call.map(n, channels, *size), call.map(n, channels, *of)]


def ds_block(call):
    torch.manual_seed(0)
    block = fuse_for_inference(DSBlock(64, 1).to(call.dtype).eval())
    weights = {name: layer._buffers[key] for name, layer, key in block._weights}
    size = [call.draw(st.integers(1, 9)) for _ in range(2)]
    call.names = list(weights)
    return [call.map(call.draw(few), 64, *size), *weights.values(), 1, [2, 1]]


# ------------------------------------------------------------- what PyTorch computes


def last(x):
    """A map or tokens with the channels as last axis."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def rows(x):
    return last(x).unsqueeze(0).flatten(0, -2).double()


def like(values, x):
    values = values.view(*last(x).shape[:-1], values.shape[-1])
    return values.permute(0, 3, 1, 2) if x.dim() == 4 else values


def project(x, weight, bias):
    weight = unpack(weight) if weight.dim() == 3 else weight
    assert bias is None or bias.shape == weight.shape[:1]
    return F.linear(x, weight.double(), None if bias is None else bias.double())


def check_pixels(x, y):
    """Both are maps or tokens of one shape, or a map and its tokens (N, H * W, C)."""
    if (x.dim(), y.dim()) == (4, 3):
        assert last(x).flatten(1, 2).shape[:-1] == y.shape[:-1]
    else:
        assert last(x).shape[:-1] == last(y).shape[:-1]


def plain_linear(x, weight, bias):
    return [like(project(rows(x), weight, bias), x)]


def plain_linear_(out, x, weight, bias):
    check_pixels(out, x)
    product = project(rows(x), weight, bias)
    assert product.shape == rows(out).shape
    return [like(rows(out) + product, out)]


def plain_ffn(x, w1, b1, w2, b2):
    hidden = project(rows(x), w1, b1)
    return [like(project(F.gelu(hidden), w2, b2), x)]


def plain_ffn_backward(grad, x, w1, b1, w2):
    grad, x, w1, b1, w2 = (t.double() for t in (grad, x, w1, b1, w2))
    assert grad.shape == x.shape and b1.shape == w1.shape[:1]
    assert w2.shape == w1.t().shape
    hidden = F.linear(x, w1, b1).requires_grad_()
    out = F.gelu(hidden)
    (grad_hidden,) = torch.autograd.grad(out, hidden, grad @ w2)
    grads = grad_hidden @ w1, grad_hidden.t() @ x, grad_hidden.sum(0), grad.t() @ out
    return [g.detach() for g in grads]


def plain_merge_(x, f_l, h_l, w, b, w_out, w1, b1, w2, b2):
    check_pixels(x, f_l)
    local = rows(f_l)
    if h_l is not None:
        check_pixels(f_l, h_l)
        product = project(rows(h_l), w, b)
        assert product.shape == local.shape
        local = local + product
    product = project(local, w_out, None)
    assert product.shape == rows(x).shape
    y = rows(x) + product
    product = project(F.gelu(project(y, w1, b1)), w2, b2)
    assert product.shape == y.shape
    return [like(y + product, x), like(local, f_l)]


def plain_residual_conv(x, weight, bias, scale, shift):
    x, *rest = (t if t is None else t.double() for t in (x, weight, bias, scale, shift))
    weight, *vectors = rest
    assert x.dim() == 4 and weight.shape == (x.shape[1], 1, 3, 3)
    assert all(v is None or v.shape == x.shape[1:2] for v in vectors)
    bias, scale, shift = vectors
    normed = x if scale is None else x * scale[:, None, None]
    normed = normed if shift is None else normed + shift[:, None, None]
    if not x.numel():
        return [x]
    return [x + F.conv2d(normed, weight, bias, padding=1, groups=len(weight))]


def plain_resize_add_(out, x):
    assert out.dim() == x.dim() == 4 and out.shape[:2] == x.shape[:2]
    assert x.shape[2] and x.shape[3]
    if not out.numel():
        return [out]
    return [out.double() + resize(x.double(), tuple(out.shape[2:]))]


def plain_attention(*args):
    *qkv, seed, heads, dropout_p = args
    assert seed.numel() == 1 and seed.dtype == torch.int64
    assert all(x.shape[1] and x.shape[2] for x in qkv)
    qkv = [x.double() for x in qkv]
    assert qkv[0].shape[::2] == qkv[-1].shape[::2]
    outs = reference_co_attention(qkv[0], qkv[-1], heads, dropout_p, seed.view(1))
    return list(outs[: len(qkv)])


def plain_attention_backward(*args):
    """Of outputs and log-sum-exps that are those of the forward."""
    streams = (len(args) - 3) // 4
    grads, qkv = args[:streams], args[streams : 2 * streams]
    qkv = [x.double().requires_grad_() for x in qkv]
    outs = plain_attention(*qkv, *args[-3:])
    return torch.autograd.grad(outs, qkv, [g.double() for g in grads])


def plain_ds_block(x, *weights):
    """Its shape alone; tests/models has the numbers."""
    return [torch.empty_like(x)]


# ------------------------------------------------------------------------- the calls

ALL, FLOATS = tuple(ERROR), (torch.float32, torch.bfloat16)
PACKED = tuple(dtype for dtype in FLOATS if dtype in PACKED_DTYPES)
# For each operator its types, how fitting arguments are drawn, and what is right.
OPERATORS = {
    'co_attention': (ALL, lambda call: call.attention(2), plain_attention),
    'self_attention': (ALL, lambda call: call.attention(1), plain_attention),
    'co_attention_backward': (
        ALL,
        lambda call: attention_backward(call, 2),
        plain_attention_backward,
    ),
    'self_attention_backward': (
        ALL,
        lambda call: attention_backward(call, 1),
        plain_attention_backward,
    ),
    'linear': (PACKED, linear, plain_linear),
    'linear_': (PACKED, linear_, plain_linear_),
    'ffn': (PACKED, ffn, plain_ffn),
    'ffn_backward': (PACKED, ffn_backward, plain_ffn_backward),
    'merge_': (PACKED, merge_, plain_merge_),
    'residual_conv': (FLOATS, residual_conv, plain_residual_conv),
    'resize_add_': (FLOATS, resize_add_, plain_resize_add_),
    'ds_block': (PACKED, ds_block, plain_ds_block),
}
WRITTEN = {'linear_': 1, 'merge_': 2, 'resize_add_': 1}
# What is right depends on more than the arguments: only those that were drawn fit.
FIXED = ('co_attention_backward', 'self_attention_backward')

# What may happen to an argument; the numbers are axes of it.
SPOILT = {
    'of another type': lambda x, i, j: x.to(FLOATS[x.dtype == FLOATS[0]]),
    'of integers': lambda x, i, j: x.long(),
    'of an axis more': lambda x, i, j: x[None],
    'of an axis less': lambda x, i, j: x.sum(i).to(x.dtype),
    'empty': lambda x, i, j: x.narrow(i, 0, 0),
    'half': lambda x, i, j: x.narrow(i, 0, (x.shape[i] + 1) // 2),
    'twice as long': lambda x, i, j: torch.cat([x, x], i),
    'a transposed view': lambda x, i, j: x.transpose(i, j),
    'transposed': lambda x, i, j: x.transpose(i, j).contiguous(),
    'strided': lambda x, i, j: torch.stack([x, x], -1)[..., 0],
    'expanded': lambda x, i, j: x.narrow(i, 0, min(1, x.shape[i])).expand(x.shape),
    'a number': lambda x, i, j: x.sum().to(x.dtype),
}


def spoil(draw, args):
    """Returns the arguments with another one, and what was done."""
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    place = draw(st.sampled_from(places))
    x = args[place]
    axis = st.integers(0, max(x.dim() - 1, 0))
    others = [args[i] for i in places if i < place and args[i].shape == x.shape]
    what = draw(st.sampled_from([*SPOILT, *['another argument'] * bool(others)]))
    spoilt = (
        others[0] if what not in SPOILT else SPOILT[what](x, draw(axis), draw(axis))
    )
    return [*args[:place], spoilt, *args[place + 1 :]], f'argument {place}: {what}'


def same(one, other, compare=torch.equal):
    return all(
        compare(x, y) for x, y in zip(one, other, strict=True) if isinstance(x, Tensor)
    )


def check(draw, name):
    dtypes, fitting, plain = OPERATORS[name]
    torch.manual_seed(draw(st.integers(0, 9)))
    call = Call(draw, dtypes)
    drawn = fitting(call)
    args, what = spoil(draw, drawn) if draw(flag) else (drawn, '')
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
    print(name, call.dtype, *shapes, what, flush=True)
    before = [x.clone() if isinstance(x, Tensor) else x for x in args]
    passed = args
    if name == 'ds_block':
        passed = [args[0], dict(zip(call.names, args[1:-2], strict=True)), *args[-2:]]
    try:
        out = getattr(torch.ops.dsnet_mm, name)(*passed)
    except (RuntimeError, IndexError) as error:
        assert what, error
        assert same(args, before), f'it is refused after it wrote: {error}'
        return
    outs = args[: WRITTEN[name]] if name in WRITTEN else out
    outs = [outs] if isinstance(outs, Tensor) else outs
    if name in FIXED:
        seed = torch.int64  # of any shape
        assert same(args, drawn, lambda x, y: x.dtype == seed or x.shape == y.shape)
        if not same(before, drawn):
            return  # of another forward
    elif 'attention' not in name and name != 'ds_block':
        assert len({x.dtype for x in before if isinstance(x, Tensor)}) == 1
    for measured, expected in zip(outs, plain(*before), strict=False):
        assert measured.shape == expected.shape
        if expected.numel() and name != 'ds_block':
            worst = (measured.double() - expected).abs().max()
            assert worst <= ERROR[call.dtype] * expected.abs().max().clamp(min=1)


def check_all(examples):
    for name, (dtypes, *_) in OPERATORS.items():
        if dtypes:
            check_random(name, examples)


def check_random(name, examples):
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def run(data):
        check(data.draw, name)

    run()


def test_random_calls():
    done = run_python(
        'from tests.ops.test_random_calls import check_all; check_all(100)'
    )
    assert done.returncode == 0, f'{done.stdout.splitlines()[-1:]} {done.stderr}'

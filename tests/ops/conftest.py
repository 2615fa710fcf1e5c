"""Inputs and outputs of the operators."""

import torch

# Batch size, local tokens, global tokens, heads, channels of a head. The shapes cover
# a single token, fewer tokens than a vector has lanes, numbers of tokens below, at and
# above the sizes of a panel (64) and a block (72), few and many heads and channels, and
# backward passes that split either stream.
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
# Without the shape of one token, whose gradients with dropout are rounding errors.
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
# Relative to the largest value. A gradient is a sum of up to 1300 terms.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def streams(n, length, rest, heads, width, dtype=torch.float64, grad=True):
    torch.manual_seed(length * rest)
    local = torch.randn(n, length, 3 * heads * width, dtype=dtype)
    global_ = torch.randn(n, rest, 3 * heads * width, dtype=dtype)
    return local.requires_grad_(grad), global_.requires_grad_(grad)


def seed(number=-(3**39)):
    return torch.tensor([number])


def native_op(local, global_, heads, dropout_p=0.0, at=None):
    """Calls the compiled co-attention with a fixed seed."""
    at = seed() if at is None else at
    return torch.ops.dsnet_mm.co_attention(local, global_, at, heads, dropout_p)[:2]


def outputs_and_gradients(path, local, global_, *args):
    """Returns the outputs of ``path``, and the gradients of a weighted sum of them."""
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
    """Returns the largest error of all tensors, relative to their largest values."""
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item()
        if e.abs().max() > 1e-12
        else (m.double() - e).abs().max().item()
        for m, e in zip(measured, expected, strict=True)
    )

"""The feed-forward network of a block, W2 GELU(W1 x + b1) + b2 for each pixel."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .packing import can_pack, pack
from .paths import select_path

# Of the hidden layer of a chunk of pixels; the fastest of 1 to 16 MiB.
CHUNK_BYTES = 4 * 2**20
# The hidden layer is kept for the backward if pixels have this many channels. To read
# it is then faster than to compute it again.
KEPT_CHANNELS = 256


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Computes W2 GELU(W1 x + b1) + b2, with the exact GELU.

    On the CPU, pixels are computed in chunks, and the backward computes the hidden
    layer again. This is faster, although it multiplies more, and takes less memory. In
    float32 and from 256 channels on, the compiled operator keeps the hidden layer for
    the backward.

    Args:
        x: Map of shape (N, C, H, W).
        w1: Weight of shape (C_hidden, C, 1, 1).
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C_out, C_hidden, 1, 1).
        b2: Bias of shape (C_out,).

    Returns:
        Map of shape (N, C_out, H, W), channels-last if ``x`` is.
    """
    tensors = [x, w1, b1, w2, b2]
    if x.is_cpu and torch.is_autocast_enabled('cpu') and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype('cpu')
        tensors = [tensor.to(dtype) for tensor in tensors]
    if not _runs_in_chunks(*tensors[:2]):
        return F.conv2d(F.gelu(F.conv2d(x, w1, b1)), w2, b2)
    x, w1, b1, w2, b2 = tensors
    n, channels, height, width = x.shape
    # Of one channels-first image the reshape is a strided view.
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    args = pixels, w1.flatten(1), b1, w2.flatten(1), b2
    # Without gradients nothing is to be kept.
    if torch.is_grad_enabled():
        out = _FeedForward.apply(*args)
    else:
        out, _ = _forward(*args, keep_hidden=False)
    return out.view(n, height, width, -1).permute(0, 3, 1, 2)


def _runs_in_chunks(x: Tensor, w1: Tensor) -> bool:
    # A compiler fuses the plain form itself.
    return (
        x.is_cpu
        and x.dtype == w1.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() * w1.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _runs_compiled(w1: Tensor, w2: Tensor) -> bool:
    return (
        can_pack(w1) and w2.shape == w1.t().shape and select_path('cpu')[0] == 'native'
    )


class _FeedForward(torch.autograd.Function):
    """:func:`feed_forward` of pixels (P, C) and weights (C_out, C_in)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        keep_hidden = x.dtype == torch.float32 and x.shape[1] >= KEPT_CHANNELS
        out, hidden = _forward(
            x, w1, b1, w2, b2, keep_hidden and any(ctx.needs_input_grad)
        )
        ctx.save_for_backward(x, w1, b1, w2, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        grads = _backward(grad.contiguous(), *ctx.saved_tensors)
        return *grads, grad.sum(0)


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the output and, if it is kept, the hidden layer W1 x + b1."""
    if _runs_compiled(w1, w2):
        ops = torch.ops.dsnet_mm
        args = x, pack(w1), b1, pack(w2), b2
        return ops.ffn_hidden(*args) if keep_hidden else (ops.ffn(*args), None)
    out = x.new_empty(len(x), len(w2))
    for x_part, out_part in _chunks(b1, x, out):
        hidden = F.gelu(F.linear(x_part, w1, b1))
        torch.addmm(b2, hidden, w2.t(), out=out_part)
        del hidden  # so that the next chunk's takes its place in the cache
    return out, None


def _backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, W1, b1 and W2."""
    if _runs_compiled(w1, w2):
        return torch.ops.dsnet_mm.ffn_backward(grad, x, w1, b1, w2, hidden)
    grad_x = torch.empty_like(x)
    # In float32: sums over chunks lose the digits of lower precisions.
    grad_w1, grad_b1, grad_w2 = (
        torch.zeros_like(weight, dtype=torch.float32) for weight in (w1, b1, w2)
    )
    for x_part, grad_part, grad_x_part in _chunks(b1, x, grad, grad_x):
        hidden = F.linear(x_part, w1, b1)
        grad_w2 += grad_part.t() @ F.gelu(hidden)
        grad_hidden = torch.ops.aten.gelu_backward(grad_part @ w2, hidden)
        torch.mm(grad_hidden, w1, out=grad_x_part)
        grad_w1 += grad_hidden.t() @ x_part
        grad_b1 += grad_hidden.sum(0)
    return grad_x, grad_w1.to(w1.dtype), grad_b1.to(b1.dtype), grad_w2.to(w2.dtype)


def _chunks(b1: Tensor, *pixels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    count = -(-len(pixels[0]) * b1.nbytes // CHUNK_BYTES)
    return zip(*(x.chunk(count) for x in pixels), strict=True)

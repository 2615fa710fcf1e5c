"""The feed-forward network of a block, W2 GELU(W1 x + b1) + b2 for each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .packing import PACKED_DTYPES, can_pack, pack
from .paths import select_path


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Computes W2 GELU(W1 x + b1) + b2, with the exact GELU.

    The compiled operator computes it where it takes the weights
    (:func:`dsnet_mm.ops.can_pack`) and :func:`dsnet_mm.ops.select_path` says
    ``'native'``. Its backward computes the hidden layer again. This takes less memory
    than to keep it, and less time than PyTorch's operators take.

    Args:
        x: Map of shape (N, C, H, W).
        w1: Weight of shape (C_hidden, C, 1, 1).
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C_out, C_hidden, 1, 1).
        b2: Bias of shape (C_out,).

    Returns:
        Map of shape (N, C_out, H, W), channels-last if ``x`` is.
    """
    cast = x.is_cpu and x.dtype != torch.float64 and torch.is_autocast_enabled('cpu')
    if cast:
        x = x.to(torch.get_autocast_dtype('cpu'))
    fits = cast or all(tensor.dtype == x.dtype for tensor in (w1, b1, w2, b2))
    if not (fits and _runs_compiled(x, w1, w2)):
        return F.conv2d(F.gelu(F.conv2d(x, w1, b1)), w2, b2)
    n, channels, height, width = x.shape
    # Of one channels-first image the reshape is a strided view.
    pixels = x.permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
    out = _FeedForward.apply(pixels, w1.flatten(1), b1, w2.flatten(1), b2)
    return out.view(n, height, width, -1).permute(0, 3, 1, 2)


def _runs_compiled(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    # A compiler fuses the plain form itself.
    return (
        x.is_cpu
        and x.dtype in PACKED_DTYPES
        and x.numel() * w1.numel() > 0
        and can_pack(w1.flatten(1))
        and w2.shape[:2] == (w1.shape[1], w1.shape[0])
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and select_path('cpu')[0] == 'native'
    )


class _FeedForward(torch.autograd.Function):
    """:func:`feed_forward` of pixels (P, C) and weights (C_out, C_in).

    It takes weights of another type, those of autocast, and returns their gradients in
    float32. So these are not rounded to bfloat16.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        w1, b1, w2, b2 = (tensor.to(x.dtype) for tensor in (w1, b1, w2, b2))
        ctx.save_for_backward(x, w1, b1, w2)
        return torch.ops.dsnet_mm.ffn(x, pack(w1), b1, pack(w2), b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        grad = grad.contiguous()
        grads = torch.ops.dsnet_mm.ffn_backward(grad, *ctx.saved_tensors)
        # PyTorch converts gradients to the types of the inputs.
        return *grads, grad.sum(0, dtype=torch.float32)

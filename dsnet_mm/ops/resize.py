"""Bilinear resizing of maps."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .paths import is_exporting


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map bilinearly to (H, W), without anti-aliasing.

    Args:
        x: Map of shape (N, C, H_in, W_in).
        size: Height and width of the result.

    Returns:
        Map of shape (N, C, H, W); ``x`` itself if it has that size.
    """
    # A compiled or exported graph always resizes: it is one graph for all sizes.
    if not torch.compiler.is_compiling() and x.shape[-2:] == size:
        return x
    if torch.compiler.is_compiling() and not is_exporting() and x.requires_grad:
        return _resize(x, *size)
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


# PyTorch's compiler takes bilinear resizing apart. It may run the parts of its backward
# in a wrong order on the CPU (torch 2.13, docs/export.md). In a compiled training step
# resizing is therefore one operator.


@torch.library.custom_op('dsnet_mm::resize', mutates_args=())
def _resize(x: Tensor, height: int, width: int) -> Tensor:
    out = F.interpolate(x, (height, width), mode='bilinear', align_corners=False)
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op('dsnet_mm::resize_backward', mutates_args=())
def _resize_backward(grad: Tensor, height: int, width: int) -> Tensor:
    grad = torch.ops.aten.upsample_bilinear2d_backward(
        grad, grad.shape[-2:], (*grad.shape[:2], height, width), align_corners=False
    )
    return grad.contiguous(memory_format=torch.channels_last)


@_resize.register_fake
@_resize_backward.register_fake
def _fake(x: Tensor, height: int, width: int) -> Tensor:
    shape, layout = (*x.shape[:2], height, width), torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.size = inputs[0].shape[-2:]


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _resize_backward(grad, *ctx.size), None, None


_resize.register_autograd(_backward, setup_context=_setup_context)

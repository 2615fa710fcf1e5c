"""Depth-wise convolution with a batch norm folded into it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .paths import runs_natively


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, border: Tensor | None = None
) -> Tensor:
    """Convolves each channel with a 3x3 kernel, padded with zeros.

    On the CPU and without gradients it is one compiled pass over the map.

    Args:
        x: Map of shape (N, C, H, W).
        weight: Kernels of shape (C, 1, 3, 3).
        bias: Bias of shape (C,).
        border: Added to the pixels along the top, the bottom, the left and the right
            edge, and to those in the corners, top left, top right, bottom left and
            bottom right, of shape (8, C); or None.

    Returns:
        Map of shape (N, C, H, W).
    """
    if _runs_compiled(x, weight):
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.dsnet_mm.depthwise_conv(x, weight, bias, border)
    y = F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    if border is None:
        return y
    top, bottom, left, right, *corners = border[..., None].unbind()
    y[:, :, 0] += top
    y[:, :, -1] += bottom
    y[..., 0] += left
    y[..., -1] += right
    for (i, j), missing in zip(
        ((0, 0), (0, -1), (-1, 0), (-1, -1)), corners, strict=True
    ):
        y[:, :, i, j] += missing[:, 0]
    return y


def _runs_compiled(x: Tensor, weight: Tensor) -> bool:
    return (
        runs_natively(x)
        and not torch.is_autocast_enabled('cpu')
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
    )


if native.WHY_NOT is None:
    torch.library.register_fake(
        'dsnet_mm::depthwise_conv', lambda x, *args: torch.empty_like(x)
    )

"""Bilinear resizing of maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .paths import runs_natively


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map bilinearly to (H, W), without anti-aliasing."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


def resize_add(x: Tensor, add: Tensor) -> Tensor:
    """Computes resize(x) + add.

    On the CPU and without gradients it is one compiled pass over ``add``, in its
    memory, if that is channels-last.

    Args:
        x: Map of shape (N, C, H_in, W_in).
        add: Map of shape (N, C, H, W).

    Returns:
        Map of shape (N, C, H, W).
    """
    if _runs_compiled(x, add):
        x = x.contiguous(memory_format=torch.channels_last)
        torch.ops.dsnet_mm.resize_add_(add, x)
        return add
    return resize(x, add.shape[-2:]) + add


def _runs_compiled(x: Tensor, add: Tensor) -> bool:
    return (
        runs_natively(x)
        and not torch.compiler.is_compiling()
        and x.dtype == add.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and add.is_contiguous(memory_format=torch.channels_last)
    )


if native.WHY_NOT is None:
    torch.library.register_fake('dsnet_mm::resize_add_', lambda out, x: None)

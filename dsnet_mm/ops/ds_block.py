"""A whole Dual-Stream block as one operator."""

import torch
from torch import Tensor

from .projections import runs_tiled


def runs_ds_block(x: Tensor) -> bool:
    """Whether :func:`ds_block` can be taken: it is for the CPU, without gradients."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and runs_tiled(x)
        and x.numel() > 0
    )


def ds_block(
    x: Tensor, weights: list[Tensor], num_heads: int, global_factor: int
) -> Tensor:
    """Computes a fused Dual-Stream block (DS-Net, Fig. 2), without gradients.

    Args:
        x: Map of shape (N, C, H, W), in float32 or bfloat16.
        weights: Those of ``DSBlock.pack``.
        num_heads: Number of attention heads.
        global_factor: H over the rows of the global stream.

    Returns:
        Map of shape (N, C, H, W), channels-last.
    """
    return torch.ops.dsnet_mm.ds_block(x, weights, num_heads, global_factor)

"""Weights in the order in which the compiled CPU operators read them.

In float32 a weight of shape (C_out, C_in) is stored as panels of 32 outputs, of shape
(C_out / 32, C_in, 32). In bfloat16 it is stored as tiles, those of AMX, of shape
(C_out / 16, C_in / 32, 512), where a tile has 16 rows of pairs of inputs, and in each
row the pairs of 16 outputs.
"""

import torch
from torch import Tensor

from . import native

_PANEL = 32
_TILE = 16

PACKED_DTYPES = tuple(
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if native.WHY_NOT is None and torch.ops.dsnet_mm.has_projections(dtype)
)
"""Types that the operators take on this machine: float32 with AVX2 or AVX-512, and
bfloat16 with AMX or AVX512-BF16."""


def can_pack(weight: Tensor) -> bool:
    """Tells whether the compiled operators take a weight of shape (C_out, C_in)."""
    return (
        weight.is_cpu
        and weight.dtype in PACKED_DTYPES
        and not any(width % _PANEL for width in weight.shape)
    )


def pack(weight: Tensor) -> Tensor:
    """Copies a weight of shape (C_out, C_in) into the order of its type."""
    if weight.dtype == torch.float32:
        return weight.unflatten(0, (-1, _PANEL)).transpose(1, 2).contiguous()
    # Pairs of inputs as words: copied faster. The clone begins at a whole word.
    pairs = weight.clone(memory_format=torch.contiguous_format).view(torch.int32)
    tiles = pairs.unflatten(1, (-1, _TILE)).unflatten(0, (-1, _TILE))
    return tiles.permute(0, 2, 3, 1).flatten(2).contiguous().view(weight.dtype)


def unpack(packed: Tensor) -> Tensor:
    """Copies a packed weight back into the shape (C_out, C_in)."""
    if packed.dtype == torch.float32:
        return packed.transpose(1, 2).flatten(0, 1)
    tiles = packed.unflatten(2, (_TILE, _TILE, 2))
    return tiles.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)

"""Projections of pixels on the CPU, for inference."""

import torch
from torch import Tensor

from . import native
from .co_attention import select_path

_PANEL = 32  # outputs, in float32
_PAIRS = _OUTPUTS = 16  # A tile of AMX holds 16 pairs of inputs for 16 outputs.

#: The types for which the compiled ops are there, and the instructions they use.
TILED_TYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if native.WHY_NOT is None and torch.ops.dsnet_mm.has_projections(dtype)
]


def runs_tiled(x: Tensor) -> bool:
    """Whether the operators below can be taken for a tensor.

    They are for float32 where there is AVX2 or AVX-512, and for bfloat16 where there
    is AMX.
    """
    return x.dtype in TILED_TYPES and x.is_cpu and select_path('cpu')[0] == 'native'


def to_tiles(weight: Tensor) -> Tensor:
    """Copies a weight in the order in which the operators below read it.

    Args:
        weight: Weight of shape (C_out, C_in), multiples of 32.

    Returns:
        Copy of shape (C_out / 32, C_in, 32), or in bfloat16 of shape
        (C_out / 16, C_in / 32, 16, 16, 2), where pairs of inputs are next to each
        other for each output.
    """
    if weight.dtype == torch.float32:
        return weight.unflatten(0, (-1, _PANEL)).transpose(1, 2).contiguous()
    tiles = weight.unflatten(1, (-1, _PAIRS, 2)).unflatten(0, (-1, _OUTPUTS))
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def tiled_linear(
    x: Tensor, w: Tensor, b: Tensor | None, add: Tensor | None = None
) -> Tensor:
    """Computes W x + b, or W x + b + add in the memory of ``add``, without gradients.

    Args:
        x: Pixels of shape (..., C_in) in float32 or bfloat16.
        w: Weight of shape (C_out, C_in) by :func:`to_tiles`.
        b: Bias of shape (C_out,), or None.
        add: Pixels of shape (..., C_out), or None.

    Returns:
        Pixels of shape (..., C_out).
    """
    shape = *x.shape[:-1], _width(w)
    out = x.new_empty(shape) if add is None else add.contiguous()
    torch.ops.dsnet_mm.linear_(out, x.contiguous(), w, b, add is not None)
    return out


def tiled_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    add: Tensor | None = None,
) -> Tensor:
    """Computes W2 GELU(W1 x + b1) + b2, likewise.

    Args:
        x: Pixels of shape (..., C_in) in float32 or bfloat16.
        w1: Weight of shape (C_hidden, C_in) by :func:`to_tiles`.
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C_out, C_hidden) by :func:`to_tiles`.
        b2: Bias of shape (C_out,).
        add: Pixels of shape (..., C_out), or None. May be ``x``.

    Returns:
        Pixels of shape (..., C_out).
    """
    shape = *x.shape[:-1], _width(w2)
    out = x.new_zeros(shape) if add is None else add.contiguous()
    torch.ops.dsnet_mm.ffn_(out, x.contiguous(), w1, b1, w2, b2)
    return out


def _width(tiles: Tensor) -> int:
    """Returns C_out."""
    return len(tiles) * (_PANEL if tiles.dtype == torch.float32 else _OUTPUTS)


if native.WHY_NOT is None:
    for _name in ('linear_', 'ffn_'):
        torch.library.register_fake(f'dsnet_mm::{_name}', lambda *args: None)

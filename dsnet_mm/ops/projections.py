"""Projections of pixels in bfloat16 by AMX, for inference."""

import torch
from torch import Tensor

from . import native
from .co_attention import select_path

_PAIRS = _OUTPUTS = 16  # A tile of AMX holds 16 pairs of inputs for 16 outputs.

#: Whether the compiled ops are there, and AMX for them to use.
HAS_AMX = native.WHY_NOT is None and torch.ops.dsnet_mm.has_amx()


def runs_on_amx(x: Tensor) -> bool:
    """Whether the operators below can be taken for a tensor."""
    return (
        HAS_AMX
        and x.dtype == torch.bfloat16
        and x.is_cpu
        and select_path('cpu')[0] == 'native'
    )


def to_tiles(weight: Tensor) -> Tensor:
    """Copies a weight in the order in which the operators below read it.

    Args:
        weight: Weight of shape (C_out, C_in), multiples of 32.

    Returns:
        Copy of shape (C_out / 16, C_in / 32, 16, 16, 2): pairs of inputs are next
        to each other for each output.
    """
    tiles = weight.unflatten(1, (-1, _PAIRS, 2)).unflatten(0, (-1, _OUTPUTS))
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def tiled_linear(
    x: Tensor, w: Tensor, b: Tensor | None, add: Tensor | None = None
) -> Tensor:
    """Computes W x + b, or W x + b + add in the memory of ``add``, without gradients.

    Args:
        x: Pixels of shape (..., C_in) in bfloat16.
        w: Weight of shape (C_out, C_in) by :func:`to_tiles`.
        b: Bias of shape (C_out,), or None.
        add: Pixels of shape (..., C_out) in bfloat16, or None.

    Returns:
        Pixels of shape (..., C_out).
    """
    shape = *x.shape[:-1], _OUTPUTS * len(w)
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
        x: Pixels of shape (..., C_in) in bfloat16.
        w1: Weight of shape (C_hidden, C_in) by :func:`to_tiles`.
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C_out, C_hidden) by :func:`to_tiles`.
        b2: Bias of shape (C_out,).
        add: Pixels of shape (..., C_out) in bfloat16, or None. May be ``x``.

    Returns:
        Pixels of shape (..., C_out).
    """
    shape = *x.shape[:-1], _OUTPUTS * len(w2)
    out = x.new_zeros(shape) if add is None else add.contiguous()
    torch.ops.dsnet_mm.ffn_(out, x.contiguous(), w1, b1, w2, b2)
    return out


if native.WHY_NOT is None:
    for _name in ('linear_', 'ffn_'):
        torch.library.register_fake(f'dsnet_mm::{_name}', lambda *args: None)

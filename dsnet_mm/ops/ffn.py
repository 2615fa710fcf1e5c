"""A feed-forward network in bfloat16, by AMX."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native

_PAIRS = 16  # A tile of AMX holds pairs of 16 inputs, for 16 outputs.


def has_amx() -> bool:
    """Whether the compiled ops are there, and AMX for them to use."""
    return native.WHY_NOT is None and torch.ops.dsnet_mm.has_amx()


def to_tiles(weight: Tensor) -> Tensor:
    """Copies a weight in the order in which :func:`ffn_` reads it.

    Args:
        weight: Weight of shape (C_out, C_in), multiples of 32.

    Returns:
        Copy of shape (C_out / 16, C_in / 32, 16, 16, 2): pairs of inputs are next
        to each other for each output.
    """
    tiles = weight.unflatten(1, (-1, _PAIRS, 2)).unflatten(0, (-1, _PAIRS))
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def ffn_(out: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """Computes out += W2 GELU(W1 x + b1) + b2 in bfloat16, without gradients.

    Args:
        out: Pixels of shape (P, C_out).
        x: Pixels of shape (P, C_in). May be ``out``.
        w1: Weight of shape (C_hidden, C_in), by :func:`to_tiles`.
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C_out, C_hidden), by :func:`to_tiles`.
        b2: Bias of shape (C_out,).
    """
    torch.ops.dsnet_mm.ffn_(out, x, w1, b1, w2, b2)


def _flops(out_shape, x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs) -> int:
    """Two operations per multiply-add."""
    return 2 * x_shape[0] * (w1_shape.numel() + w2_shape.numel())


if native.WHY_NOT is None:
    torch.library.register_fake('dsnet_mm::ffn_', lambda *args: None)
    register_flop_formula(torch.ops.dsnet_mm.ffn_)(_flops)

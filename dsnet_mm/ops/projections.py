"""Projections of pixels on the CPU, and the way back of the feed-forward network."""

import torch
from torch import Tensor

from . import native
from .paths import select_path

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

    They are for float32 where there is AVX2 or AVX-512, and for bfloat16, but for
    :func:`ffn_backward`, where there is AMX.
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


def tiled_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    add: Tensor | None = None,
) -> Tensor:
    """Computes W2 GELU(W1 x + b1) + b2, without gradients.

    Or that and ``add``, in the memory of ``add``.

    Args:
        x: Map of shape (N, C, H, W), or tokens of shape (..., C), in float32 or
            bfloat16.
        w1: Weight of shape (C_hidden, C) by :func:`to_tiles`.
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C, C_hidden) by :func:`to_tiles`.
        b2: Bias of shape (C,).
        add: Map or tokens of the shape of ``x``, or None. May be ``x``.

    Returns:
        Map, channels-last, or tokens of the same shape.
    """
    if add is None:
        return torch.ops.dsnet_mm.ffn(x, w1, b1, w2, b2)
    add = add.contiguous(memory_format=_layout(x))
    torch.ops.dsnet_mm.ffn_(add, x, w1, b1, w2, b2)
    return add


def ffn_hidden(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes W2 GELU(h) + b2 and h = W1 x + b1, in float32; see :func:`tiled_ffn`."""
    return torch.ops.dsnet_mm.ffn_hidden(x, w1, b1, w2, b2)


def ffn_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes gradients of W2 GELU(W1 x + b1), in float32.

    Args:
        grad: Gradients of the result, of shape (P, C).
        x: Pixels of shape (P, C).
        w1: Weight of shape (C_hidden, C), multiples of 32.
        b1: Bias of shape (C_hidden,).
        w2: Weight of shape (C, C_hidden).
        hidden: W1 x + b1, of shape (P, C_hidden). Without, it is computed again, and
            is never in memory as a whole.

    Returns:
        The gradients of ``x``, ``w1``, ``b1`` and ``w2``.
    """
    return torch.ops.dsnet_mm.ffn_backward(grad, x, w1, b1, w2, hidden)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


if native.WHY_NOT is None:

    @torch.library.register_fake('dsnet_mm::linear')
    def _linear(x, w, b):
        width = w.shape[0] * (_PANEL if w.dtype == torch.float32 else _OUTPUTS)
        shape = list(x.shape)
        shape[1 if x.dim() == 4 else -1] = width
        return torch.empty(
            shape, dtype=x.dtype, device=x.device, memory_format=_layout(x)
        )

    torch.library.register_fake(
        'dsnet_mm::ffn', lambda x, w1, b1, w2, b2: _linear(x, w2, b2)
    )
    torch.library.register_fake(
        'dsnet_mm::ffn_hidden',
        lambda x, w1, b1, w2, b2: (_linear(x, w2, b2), _linear(x, w1, b1)),
    )
    torch.library.register_fake(
        'dsnet_mm::ffn_backward',
        lambda grad, *tensors: tuple(map(torch.empty_like, tensors[:4])),
    )
    for _name in ('linear_', 'ffn_', 'merge_'):
        torch.library.register_fake(f'dsnet_mm::{_name}', lambda *args: None)

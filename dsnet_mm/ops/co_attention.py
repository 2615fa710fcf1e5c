"""Attention over packed projections: the core of both DS-Net propagations.

Everywhere ``C`` is the width of a stream and the last axis of a packed
projection is laid out as (parts, num_heads, C / num_heads).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .paths import select_path
from .plain import reference_attention, reference_co_attention, split_heads

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v and merges the heads.

    PyTorch's ``scaled_dot_product_attention`` computes it, except where
    :func:`select_path` says ``'reference'``.

    Args:
        q: Queries of shape (N, num_heads, L, d).
        k: Keys of shape (N, num_heads, M, d).
        v: Values of shape (N, num_heads, M, d).
        dropout_p: Probability of dropping an attention weight. Applied
            whenever it is positive: pass 0 at evaluation.

    Returns:
        Tokens of shape (N, L, num_heads * d).
    """
    if select_path(q.device.type)[0] == 'reference':
        return reference_attention(q, k, v, dropout_p)
    return _sdpa(q, k, v, dropout_p)


def self_attention(qkv: Tensor, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """Lets tokens attend to each other.

    On the CPU the compiled operator computes it where it can, see
    :func:`select_path`; otherwise :func:`attention` does.

    Args:
        qkv: Packed projection of shape (N, L, 3 * C).
        num_heads: Number of attention heads, a divisor of C.
        dropout_p: As of :func:`attention`.

    Returns:
        Tokens of shape (N, L, C).
    """
    if qkv.is_cpu and select_path('cpu')[0] == 'native':
        return native.self_attention(qkv, num_heads, dropout_p)
    return attention(*split_heads(qkv, num_heads, 3), dropout_p)


def co_attention(
    local_qkv: Tensor, global_qkv: Tensor, num_heads: int, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lets the local and the global stream attend to each other.

    Both directions of Inter-Scale Alignment (DS-Net, Fig. 2):
    ``h_L = softmax(Q_L K_G^T / sqrt(d)) V_G`` and
    ``h_G = softmax(Q_G K_L^T / sqrt(d)) V_L``.

    The compiled op computes it where it can, otherwise PyTorch's
    ``scaled_dot_product_attention`` does; see :func:`select_path`.

    Args:
        local_qkv: Packed projection of the local stream, (N, L, 3 * C).
        global_qkv: Packed projection of the global stream, (N, G, 3 * C).
        num_heads: Number of attention heads, a divisor of C.
        dropout_p: Probability of dropping an attention weight, in [0, 1).
            Applied whenever it is positive: pass 0 at evaluation.

    Returns:
        The aligned streams h_L of shape (N, L, C) and h_G of shape (N, G, C).

    Raises:
        TypeError: If the dtypes are not one floating point dtype.
        ValueError: If shapes, devices, heads or dropout do not fit, or
            ``DSNET_MM_OPS`` asks for what is not there.
    """
    _check(local_qkv, global_qkv, num_heads, dropout_p)
    path, _ = select_path(local_qkv.device.type)
    if path == 'native':
        return native.co_attention(local_qkv, global_qkv, num_heads, dropout_p)
    if path == 'sdpa':
        return sdpa_co_attention(local_qkv, global_qkv, num_heads, dropout_p)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), device=local_qkv.device)
    return reference_co_attention(local_qkv, global_qkv, num_heads, dropout_p, seed)


def sdpa_co_attention(
    local_qkv: Tensor, global_qkv: Tensor, num_heads: int, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """:func:`co_attention` by two calls of PyTorch's attention.

    Inputs whose last axis is strided are copied: PyTorch's fused kernels do not
    take them. On the CPU they have no dropout either; with it, PyTorch holds
    the attention matrices.
    """
    local_qkv, global_qkv = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (local_qkv, global_qkv)
    )
    q_l, k_l, v_l = split_heads(local_qkv, num_heads, 3)
    q_g, k_g, v_g = split_heads(global_qkv, num_heads, 3)
    return _sdpa(q_l, k_g, v_g, dropout_p), _sdpa(q_g, k_l, v_l, dropout_p)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)


def _check(
    local_qkv: Tensor, global_qkv: Tensor, num_heads: int, dropout_p: float
) -> None:
    """Says what does not fit."""

    def shapes() -> str:
        return f'{tuple(local_qkv.shape)} and {tuple(global_qkv.shape)}'

    if local_qkv.dim() != 3 or global_qkv.dim() != 3:
        raise ValueError(
            f'co_attention takes projections of shape (N, L, 3 * C) and '
            f'(N, G, 3 * C), got {shapes()}.'
        )
    if local_qkv.shape[0] != global_qkv.shape[0]:
        raise ValueError(f'The streams have different batch sizes: {shapes()}.')
    if local_qkv.shape[2] != global_qkv.shape[2]:
        raise ValueError(f'The streams have different widths: {shapes()}.')
    if num_heads < 1 or not local_qkv.shape[2] or local_qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f'The last axis holds q, k and v of num_heads={num_heads} heads, so '
            f'its length is a multiple of 3 * num_heads, got {shapes()}.'
        )
    if not local_qkv.shape[1] or not global_qkv.shape[1]:
        raise ValueError(f'Either stream needs one token at least, got {shapes()}.')
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p lies in [0, 1), got {dropout_p}.')
    if local_qkv.device != global_qkv.device:
        raise ValueError(
            f'The streams are on different devices: {local_qkv.device} and '
            f'{global_qkv.device}.'
        )
    for x in (local_qkv, global_qkv):
        if x.dtype not in DTYPES:
            raise TypeError(
                f'co_attention takes floating point tensors, got {x.dtype}.'
            )
    if local_qkv.dtype != global_qkv.dtype and not torch.is_autocast_enabled(
        local_qkv.device.type
    ):
        raise TypeError(
            f'The streams have different dtypes: {local_qkv.dtype} and '
            f'{global_qkv.dtype}.'
        )

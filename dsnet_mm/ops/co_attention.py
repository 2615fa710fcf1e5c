"""Attention over packed projections: the core of both DS-Net propagations.

Everywhere ``C`` is the width of a stream and the last axis of a packed
projection is laid out as (parts, num_heads, C / num_heads).
"""

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """Unpacks a projection into its parts, one axis for the heads.

    Args:
        x: Packed projection of shape (N, L, parts * C).
        num_heads: Number of attention heads.
        parts: Number of projections packed in ``x``, 3 for q, k and v.

    Returns:
        Views of shape (N, num_heads, L, C / num_heads), one per part.
    """
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v and merges the heads.

    Args:
        q: Queries of shape (N, num_heads, L, d).
        k: Keys of shape (N, num_heads, M, d).
        v: Values of shape (N, num_heads, M, d).
        dropout_p: Probability of dropping an attention weight. Applied
            whenever it is positive: pass 0 at evaluation.

    Returns:
        Tokens of shape (N, L, num_heads * d).
    """
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)


def co_attention(
    local_qkv: Tensor, global_qkv: Tensor, num_heads: int, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lets the local and the global stream attend to each other.

    Both directions of Inter-Scale Alignment (DS-Net, Fig. 2):
    ``h_L = softmax(Q_L K_G^T / sqrt(d)) V_G`` and
    ``h_G = softmax(Q_G K_L^T / sqrt(d)) V_L``.

    Args:
        local_qkv: Packed projection of the local stream, (N, L, 3 * C).
        global_qkv: Packed projection of the global stream, (N, G, 3 * C).
        num_heads: Number of attention heads, a divisor of C.
        dropout_p: Probability of dropping an attention weight. Applied
            whenever it is positive: pass 0 at evaluation.

    Returns:
        The aligned streams h_L of shape (N, L, C) and h_G of shape (N, G, C).
    """
    q_l, k_l, v_l = split_heads(local_qkv, num_heads, 3)
    q_g, k_g, v_g = split_heads(global_qkv, num_heads, 3)
    h_l = attention(q_l, k_g, v_g, dropout_p)
    h_g = attention(q_g, k_l, v_l, dropout_p)
    return h_l, h_g

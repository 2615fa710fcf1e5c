"""The plain definition of the co-attention, and of its random numbers.

It is the oracle of the tests: it holds every attention matrix and works in any
dtype and on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF


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


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)).

    Args:
        q: Queries of shape (N, num_heads, L, d).
        k: Keys of shape (N, num_heads, M, d).

    Returns:
        Weights of shape (N, num_heads, L, M).
    """
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v with explicit softmax.

    Args:
        q: Queries of shape (N, num_heads, L, d).
        k: Keys of shape (N, num_heads, M, d).
        v: Values of shape (N, num_heads, M, d).
        dropout_p: Probability of dropping an attention weight.

    Returns:
        Tokens of shape (N, L, num_heads * d).
    """
    return _merge_heads(F.dropout(attention_weights(q, k), dropout_p) @ v)


def reference_co_attention(
    local_qkv: Tensor,
    global_qkv: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes both directions of the co-attention with explicit softmax.

    ``h_L = D(softmax(Q_L K_G^T / sqrt(d))) V_G`` and
    ``h_G = D(softmax(Q_G K_L^T / sqrt(d))) V_L``, where D is dropout.

    Args:
        local_qkv: Packed projection of the local stream, (N, L, 3 * C).
        global_qkv: Packed projection of the global stream, (N, G, 3 * C).
        num_heads: Number of attention heads, a divisor of C.
        dropout_p: Probability of dropping an attention weight.
        seed: One int64 number that determines the dropout.

    Returns:
        h_L of shape (N, L, C) and h_G of shape (N, G, C).
    """
    q_l, k_l, v_l = split_heads(local_qkv, num_heads, 3)
    q_g, k_g, v_g = split_heads(global_qkv, num_heads, 3)
    p_l = attention_weights(q_l, k_g)
    p_g = attention_weights(q_g, k_l)
    if dropout_p > 0:
        # The queries of all samples and heads are numbered, local ones first.
        p_l = p_l * dropout_mask(p_l.shape, dropout_p, seed) / (1 - dropout_p)
        first = p_l[..., 0].numel()
        p_g = p_g * dropout_mask(p_g.shape, dropout_p, seed, first) / (1 - dropout_p)
    return _merge_heads(p_l @ v_g), _merge_heads(p_g @ v_l)


def dropout_mask(
    shape: tuple[int, ...], dropout_p: float, seed: Tensor, first: int = 0
) -> Tensor:
    """Tells which attention weights stay, bit for bit as the compiled op does.

    The numbers are hashes of (seed, query, key), see ``csrc/dropout.h``, here
    in int64, whose products wrap around as those of uint64 do.

    Args:
        shape: Shape of the weights, (N, num_heads, queries, keys).
        dropout_p: Probability of dropping a weight.
        seed: One int64 number.
        first: Number of the first query.

    Returns:
        Boolean mask of that shape, on the device of the seed.
    """
    rows = torch.arange(shape[:-1].numel(), device=seed.device) + first
    z = seed + (rows + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shift(z, 31)).view(*shape[:-1], 1)
    keys = torch.arange(shape[-1], device=seed.device)
    x = ((z & _WORD) + keys * 0x9E3779B9) & _WORD
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = ((x ^ x >> 13) + _shift(z, 32)) * 0xC2B2AE35 & _WORD
    return (x ^ x >> 16) >= int(dropout_p * 2**32)


def _merge_heads(x: Tensor) -> Tensor:
    """(N, num_heads, L, d) -> (N, L, num_heads * d)."""
    return x.transpose(1, 2).flatten(2)


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64."""
    return x - 2**64 if x >= 2**63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

"""Reference implementation of DS-Net with PyTorch operators only.

It follows the order of operations of the public code: channels-first memory, all
projections at the resolution of Fig. 2, and full attention matrices. The tests compare
:class:`~dsnet_mm.models.DSNet` with it, ``benchmark.py`` uses it as the baseline, and
the published multiply-adds are those of this order. The parameters are those of
:class:`~dsnet_mm.models.DSNet`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference_net(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Computes the outputs of a network.

    Args:
        net: A :class:`~dsnet_mm.models.DSNet`.
        x: Input of shape (N, C_in, H, W).

    Returns:
        The feature maps of the stages ``net.out_indices``.
    """
    outs = []
    for i, (patch_embed, stage) in enumerate(
        zip(net.patch_embeds, net.stages, strict=True)
    ):
        pad_h, pad_w = (-side % patch_embed.patch_size for side in x.shape[-2:])
        x = patch_embed.projection(F.pad(x, (0, pad_w, 0, pad_h)))
        for block in stage:
            x = reference_block(block, x)
        if i in net.out_indices:
            outs.append(getattr(net, f'norm{i}')(x))
    return tuple(outs)


def reference_block(block: nn.Module, x: Tensor) -> Tensor:
    """Computes the output of a block.

    Args:
        block: A :class:`~dsnet_mm.models.DSBlock`.
        x: Feature map of shape (N, C, H, W).

    Returns:
        Feature map of shape (N, C, H, W).
    """
    n, _, height, width = x.shape
    has_global = block.split_channels[0] > 0
    x = x + block.pos_embed(x)
    f_g, f_l = block.proj_in(block.norm1(x)).split(block.split_channels, dim=1)

    # Intra-scale propagation
    if block.local_conv is not None:
        f_l = f_l + block.local_conv(block.local_norm(f_l))
    if has_global:
        factor, cap = block.global_factor, block.max_global_tokens
        size = max(height // factor, 1), max(width // factor, 1)
        if cap and size[0] * size[1] > cap:
            size = math.isqrt(cap * height // width), math.isqrt(cap * width // height)
            size = tuple(min(max(side, 1), cap) for side in size)
        f_g = F.interpolate(f_g, size, mode='bilinear', align_corners=False)
        f_g = f_g.flatten(2).transpose(1, 2)
    if block.global_qkv is not None:
        qkv = _heads(block.global_qkv(block.global_norm(f_g)), block.num_heads, 3)
        f_g = f_g + _attention(*qkv, block)

    # Inter-scale alignment
    isa = block.isa
    if isa is not None:
        local_attends = isa.direction in ('both', 'global_to_local')
        global_attends = isa.direction in ('both', 'local_to_global')
        local_qkv = isa.local_qkv(isa.local_norm(f_l)).flatten(2).transpose(1, 2)
        local_parts = local_attends + 2 * global_attends
        local_heads = _heads(local_qkv, block.num_heads, local_parts)
        global_qkv = isa.global_qkv(isa.global_norm(f_g))
        global_parts = global_attends + 2 * local_attends
        global_heads = _heads(global_qkv, block.num_heads, global_parts)
        if local_attends:
            k_g, v_g = global_heads[-2:]
            h_l = isa.local_proj(_attention(local_heads[0], k_g, v_g, block))
            f_l = f_l + h_l.transpose(1, 2).reshape(f_l.shape)
        if global_attends:
            k_l, v_l = local_heads[-2:]
            f_g = f_g + isa.global_proj(_attention(global_heads[0], k_l, v_l, block))

    # Merge
    if has_global:
        f_g = f_g.transpose(1, 2).reshape(n, -1, *size)
        f_g = F.interpolate(f_g, (height, width), mode='bilinear', align_corners=False)
    x = x + block.drop_path(block.proj_out(torch.cat([f_l, f_g], dim=1)))

    # Feed-forward network
    ffn = block.ffn
    return x + block.drop_path(ffn.fc2(ffn.act(ffn.fc1(block.norm2(x)))))


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """Splits (N, L, parts * C) into parts of (N, num_heads, L, C / num_heads)."""
    n, length, _ = x.shape
    return x.reshape(n, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind()


def _attention(q: Tensor, k: Tensor, v: Tensor, block: nn.Module) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v and concatenates the heads."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    weights = F.dropout(weights, block.attn_drop_rate, block.training)
    return (weights @ v).transpose(1, 2).flatten(2)

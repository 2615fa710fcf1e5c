"""DS-Net as its public code computes it: slow, plain, and easy to check.

It is the oracle of the tests, the baseline of ``benchmark.py``, and what the
published multiply-adds count: maps channels first, every projection at the
resolution where the paper's Fig. 2 draws it, attention matrices held whole. The
parameters are those of :class:`~dsnet_mm.models.DSNet`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference_net(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Computes what ``net(x)`` computes.

    Args:
        net: A :class:`~dsnet_mm.models.DSNet`.
        x: Pictures of shape (N, C_in, H, W).

    Returns:
        The maps of ``net.out_indices``.
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
    """Computes what ``block(x)`` computes.

    Args:
        block: A :class:`~dsnet_mm.models.DSBlock`.
        x: Map of shape (N, C, H, W).

    Returns:
        Map of shape (N, C, H, W).
    """
    n, _, height, width = x.shape
    has_global = block.split_channels[0] > 0
    x = x + _depthwise(x, block.pos_embed)
    f_g, f_l = _pointwise(block.norm1(x), block.proj_in).split(
        block.split_channels, dim=1
    )

    # Intra-scale propagation
    if block.local_conv is not None:
        f_l = f_l + _depthwise(block.local_norm(f_l), block.local_conv)
    if has_global:
        factor = block.global_factor
        size = max(height // factor, 1), max(width // factor, 1)
        f_g = F.interpolate(f_g, size, mode='bilinear', align_corners=False)
        f_g = f_g.flatten(2).transpose(1, 2)
    if block.global_qkv is not None:
        qkv = _heads(
            _linear(block.global_norm(f_g), block.global_qkv), block.num_heads, 3
        )
        f_g = f_g + _attention(*qkv, block)

    # Inter-scale alignment
    isa = block.isa
    if isa is not None:
        local_qkv = _pointwise(isa.local_norm(f_l), isa.local_qkv)
        local_qkv = local_qkv.flatten(2).transpose(1, 2)
        global_qkv = _linear(isa.global_norm(f_g), isa.global_qkv)
        local_reads = isa.direction in ('both', 'global_to_local')
        global_reads = isa.direction in ('both', 'local_to_global')
        local_parts = local_reads + 2 * global_reads
        global_parts = global_reads + 2 * local_reads
        local_parts = _heads(local_qkv, block.num_heads, local_parts)
        global_parts = _heads(global_qkv, block.num_heads, global_parts)
        if local_reads:
            k_g, v_g = global_parts[-2:]
            h_l = _attention(local_parts[0], k_g, v_g, block)
            h_l = _linear(h_l, isa.local_proj)
            f_l = f_l + h_l.transpose(1, 2).reshape(f_l.shape)
        if global_reads:
            k_l, v_l = local_parts[-2:]
            h_g = _attention(global_parts[0], k_l, v_l, block)
            f_g = f_g + _linear(h_g, isa.global_proj)

    if has_global:
        f_g = f_g.transpose(1, 2).reshape(n, -1, *size)
        f_g = F.interpolate(f_g, (height, width), mode='bilinear', align_corners=False)
    x = x + block.drop_path(_pointwise(torch.cat([f_l, f_g], dim=1), block.proj_out))
    fc1, act, fc2 = block.ffn.fc1, block.ffn.act, block.ffn.fc2
    hidden = act(_pointwise(block.norm2(x), fc1))
    return x + block.drop_path(_pointwise(hidden, fc2))


# Not by the layers' own ``forward``, which is not plain.
def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias)


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _depthwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1, groups=conv.groups)


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(N, L, parts * C) -> parts of (N, num_heads, L, C / num_heads)."""
    n, length, _ = x.shape
    return x.reshape(n, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind()


def _attention(q: Tensor, k: Tensor, v: Tensor, block: nn.Module) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, heads merged."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    weights = F.dropout(weights, block.attn_drop_rate, block.training)
    return (weights @ v).transpose(1, 2).flatten(2)

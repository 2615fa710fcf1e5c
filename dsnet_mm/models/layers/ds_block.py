"""The Dual-Stream block of DS-Net (arXiv 2105.14734, Fig. 2) and its parts."""

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from dsnet_mm.ops import (
    attention,
    co_attention,
    feed_forward,
    recomputed,
    resize,
    self_attention,
    split_heads,
)

from .packed_projection import PackedProjection

ISA_DIRECTIONS = ('both', 'global_to_local', 'local_to_global')
INTRA_SCALES = ('both', 'local', 'global')


# Layers whose call is one operator. A parametrisation, LoRA or a quantisation puts
# another class in their place.
_PLAIN = (nn.Conv2d, nn.Linear, nn.GELU, PackedProjection)


def has_hooks(layer: nn.Module) -> bool:
    """Tells whether a call of a layer calls hooks too."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def is_plain(layer: nn.Module) -> bool:
    """Tells whether a call of a layer is one operator with its weight and bias.

    An operator that reads the weight can then take the place of the call.
    """
    return type(layer) in _PLAIN and not has_hooks(layer)


def global_size(
    size: tuple[int, int], factor: int, max_tokens: int | None
) -> tuple[int, int]:
    """Returns the rows and columns of the global stream of a map.

    Args:
        size: Height and width of the map.
        factor: Factor of a map whose tokens are at most ``max_tokens``.
        max_tokens: The factor of a larger map is ``sqrt(H * W / max_tokens)``. None is
            the same factor for all maps, as in the paper.
    """
    rows, cols = (max(side // factor, 1) for side in size)
    if max_tokens is None:
        return rows, cols
    # An exported program has one graph for all sizes: no branches, no math.isqrt.
    height, width = size
    fits = torch.sym_min(max_tokens // (rows * cols), 1)

    def choose(side: int, square: float) -> int:
        capped = torch.sym_min(torch.sym_int(square**0.5), max_tokens)
        return torch.sym_max(fits * side + (1 - fits) * capped, 1)

    return (
        choose(rows, max_tokens * height / width),
        choose(cols, max_tokens * width / height),
    )


class FFN(nn.Module):
    """Feed-forward network: two 1x1 convolutions with an activation between them.

    With the exact GELU it is :func:`dsnet_mm.ops.feed_forward`, one operator on the
    CPU. Layers with hooks, and such of other classes, are called one after another.

    Args:
        channels: Channels of input and output.
        hidden_channels: Channels of the hidden layer.
        act_cfg: Activation.
    """

    def __init__(self, channels: int, hidden_channels: int, act_cfg: dict) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.act = build_activation_layer(act_cfg)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    @property
    def has_exact_gelu(self) -> bool:
        """Whether the activation is the GELU of the error function."""
        return type(self.act) is nn.GELU and self.act.approximate == 'none'

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if self.has_exact_gelu and is_plain(fc1) and is_plain(act) and is_plain(fc2):
            return feed_forward(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(act(fc1(x)))


class InterScaleAlignment(BaseModule):
    """Inter-Scale Alignment (ISA): co-attention between the two streams.

    Each stream is normalised and projected to queries, keys and values. Local
    queries attend to the global stream, and global queries attend to the local
    one. These are two attentions that share no weights. The result of each is
    projected and added to the stream of its queries.

    Args:
        channels: Channels of either stream.
        num_heads: Number of attention heads, a divisor of ``channels``.
        direction: ``'both'``, or one way only, ``'global_to_local'`` or
            ``'local_to_global'`` (Table 3 of the paper).
        attn_drop_rate: Dropout of the attention weights, in [0, 1).
        norm_cfg: Normalisation of the local stream. The global stream consists of
            tokens and has LayerNorm.
        init_cfg: Initialisation, as in MMEngine.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        direction: str = 'both',
        attn_drop_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_heads = num_heads
        self.direction = direction
        self.attn_drop_rate = attn_drop_rate
        # A stream has a query if it attends, and a key and a value if the other
        # stream attends to it.
        local_attends = direction in ('both', 'global_to_local')
        global_attends = direction in ('both', 'local_to_global')
        local_parts = local_attends + 2 * global_attends
        global_parts = global_attends + 2 * local_attends
        self.local_norm = build_norm_layer(norm_cfg, channels)[1]
        self.local_qkv = nn.Conv2d(channels, local_parts * channels, 1)
        self.global_norm = nn.LayerNorm(channels)
        self.global_qkv = nn.Linear(channels, global_parts * channels)
        if local_attends:
            self.local_proj = nn.Linear(channels, channels)
        if global_attends:
            self.global_proj = nn.Linear(channels, channels)

    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
        """Aligns the streams.

        Args:
            local: Local stream f_L, a map of shape (N, C, H, W).
            global_: Global stream f_G, tokens of shape (N, G, C).

        Returns:
            Both streams, in the shapes they came in.
        """
        size = local.shape[-2:]
        local_qkv = _to_tokens(self.local_qkv(self.local_norm(local)))
        global_qkv = self.global_qkv(self.global_norm(global_))
        dropout_p = self.attn_drop_rate if self.training else 0.0

        h_l = h_g = None
        if self.direction == 'both':
            h_l, h_g = co_attention(local_qkv, global_qkv, self.num_heads, dropout_p)
        elif self.direction == 'global_to_local':
            (q_l,) = split_heads(local_qkv, self.num_heads, 1)
            k_g, v_g = split_heads(global_qkv, self.num_heads, 2)
            h_l = attention(q_l, k_g, v_g, dropout_p)
        else:
            (q_g,) = split_heads(global_qkv, self.num_heads, 1)
            k_l, v_l = split_heads(local_qkv, self.num_heads, 2)
            h_g = attention(q_g, k_l, v_l, dropout_p)

        if h_l is not None:
            local = local + _to_map(self.local_proj(h_l), size)
        if h_g is not None:
            global_ = global_ + self.global_proj(h_g)
        return local, global_


class DSBlock(BaseModule):
    """Dual-Stream block (Fig. 2).

    ::

                         x + depth-wise 3x3 (position)
                                     |  norm, 1x1
                    f_l  +-----------+-----------+  f_g
             (1-alpha) C |                       | alpha C, resized to
                         |                       | (H, W) / global_factor
        intra    depth-wise 3x3           self-attention
                     f_L |                       | f_G
        inter            +<----- ISA: each ----->+
                         | attends to the other  |
                     h_L |                       | h_G, resized to (H, W)
                         +-----------+-----------+
                                     |  concatenation, 1x1, + x
                                   FFN, + x

    Normalisation comes before each part, the norm of ``norm_cfg`` for maps and
    LayerNorm for tokens. The position convolution, the 1x1 convolutions around
    the streams and the absence of an output projection in the self-attention
    are not drawn in the figure; they are those of the public code, and with
    them parameters and multiply-adds equal the paper's tables.

    Args:
        channels: Width C of input and output.
        num_heads: Attention heads of the self-attention and of ISA, a divisor
            of ``alpha * channels``.
        alpha: Share of the channels that goes to the global stream, in [0, 1].
            0 leaves a pure convolution block, 1 a pure attention block
            (Table 2). ``alpha * channels`` must be whole.
        isa: Inter-Scale Alignment: True or ``'both'``, one way only
            (``'global_to_local'``, ``'local_to_global'``; Table 3), or False.
            Needs streams of equal width, ``alpha=0.5``.
        intra_scale: Streams with intra-scale propagation, ``'both'``,
            ``'local'`` or ``'global'``. A stream without it enters ISA as it
            was split; this is our reading of the rows "w/o f_G" and "w/o f_L"
            of Table 3, which the paper does not detail.
        global_factor: The global stream has ``floor(H / global_factor)`` rows,
            at least one, and as many columns in proportion.
        max_global_tokens: Maximum number of global tokens. On a map where
            ``global_factor`` leaves more, the factor is
            ``sqrt(H * W / max_global_tokens)``. Attention then costs the same for each
            pixel of a map of any size. None is the paper.
        mlp_ratio: Width of the hidden layer of the FFN over ``channels``.
        attn_drop_rate: Dropout of the attention weights, in [0, 1).
        drop_path_rate: Stochastic depth of both residual branches, in [0, 1).
        norm_cfg: Normalisation of maps.
        act_cfg: Activation of the FFN.
        keep_norms: Whether the outputs of both norms of C channels are kept for the
            backward. By default it computes them again
            (:func:`dsnet_mm.ops.recomputed`).
        init_cfg: Initialisation, as in MMEngine.

    Raises:
        ValueError: If alpha, heads and ISA do not fit together, or if
            ``max_global_tokens`` is not a positive integer.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        alpha: float = 0.5,
        isa: bool | str = True,
        intra_scale: str = 'both',
        global_factor: int = 1,
        max_global_tokens: int | None = None,
        mlp_ratio: float = 4.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        keep_norms: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if isa is True:
            isa = 'both'
        global_channels = _check_streams(channels, num_heads, alpha, isa, intra_scale)
        if max_global_tokens is not None and (
            type(max_global_tokens) is not int or max_global_tokens < 1
        ):
            raise ValueError(
                f'max_global_tokens is a positive integer or None, got '
                f'{max_global_tokens!r}.'
            )
        local_channels = channels - global_channels
        self.split_channels = (global_channels, local_channels)
        self.num_heads = num_heads
        self.global_factor = global_factor
        self.max_global_tokens = max_global_tokens
        self.attn_drop_rate = attn_drop_rate
        self.keep_norms = keep_norms

        # Norms before convolutions: MMCV's fuse_conv_bn takes a norm for that of
        # the convolution that was registered before it.
        has_local_conv = local_channels and intra_scale in ('both', 'local')
        self.norm1 = build_norm_layer(norm_cfg, channels)[1]
        self.norm2 = build_norm_layer(norm_cfg, channels)[1]
        if has_local_conv:
            self.local_norm = build_norm_layer(norm_cfg, local_channels)[1]
        self.pos_embed = _depthwise_conv(channels)
        self.local_conv = self.global_qkv = self.isa = None
        if has_local_conv:
            self.local_conv = _depthwise_conv(local_channels)
        if global_channels and intra_scale in ('both', 'global'):
            self.global_norm = nn.LayerNorm(global_channels)
            self.global_qkv = nn.Linear(global_channels, 3 * global_channels)
        if isa:
            self.isa = InterScaleAlignment(
                local_channels, num_heads, isa, attn_drop_rate, norm_cfg
            )

        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.ffn = FFN(channels, int(channels * mlp_ratio), act_cfg)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), channels-last in memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = x + self.pos_embed(x)
        with recomputed(self.norm1, x, self.keep_norms) as y:
            x = x + self.drop_path(self.dual_stream(y))
        with recomputed(self.norm2, x, self.keep_norms) as y:
            return x + self.drop_path(self.ffn(y))

    def dual_stream(self, x: Tensor) -> Tensor:
        """Splits, propagates, aligns and merges the streams.

        A 1x1 convolution commutes with bilinear resizing. The rows of ``proj_in``
        and the columns of ``proj_out`` that belong to the global stream are
        therefore computed at its low resolution. Sums at full resolution are written
        into the output of a convolution, which saves the memory of another map. Layers
        that are not plain (:func:`is_plain`) are called as in Fig. 2.

        Args:
            x: Map of shape (N, C, H, W).

        Returns:
            Map of the same shape.
        """
        size = x.shape[-2:]
        low = global_size(size, self.global_factor, self.max_global_tokens)
        f_l, f_g = self._split(x, low)

        # Intra-scale propagation
        if self.local_conv is not None:
            added = self.local_conv(self.local_norm(f_l))
            f_l = added.add_(f_l) if is_plain(self.local_conv) else added + f_l
        if self.global_qkv is not None:
            qkv = self.global_qkv(self.global_norm(f_g))
            dropout_p = self.attn_drop_rate if self.training else 0.0
            f_g = f_g + self_attention(qkv, self.num_heads, dropout_p)

        # Inter-scale alignment
        if self.isa is not None:
            f_l, f_g = self.isa(f_l, f_g)

        return self._merge(f_l, f_g, size, low)

    def _split(
        self, x: Tensor, global_size: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(N, C, H, W) -> the local map f_l and the global tokens f_g."""
        global_channels, local_channels = self.split_channels
        f_l = f_g = None
        if not is_plain(self.proj_in):
            f_g, f_l = self.proj_in(x).split(self.split_channels, 1)
            f_g = _to_tokens(resize(f_g, global_size)) if global_channels else None
            return f_l, f_g
        weight, bias = self.proj_in.weight, self.proj_in.bias
        if global_channels:
            w, b = weight[:global_channels], bias[:global_channels]
            f_g = F.linear(_to_tokens(resize(x, global_size)), w.flatten(1), b)
        if local_channels:
            f_l = F.conv2d(x, weight[global_channels:], bias[global_channels:])
        return f_l, f_g

    def _merge(
        self,
        h_l: Tensor | None,
        h_g: Tensor | None,
        size: tuple[int, int],
        global_size: tuple[int, int],
    ) -> Tensor:
        """The local map h_L and the global tokens h_G -> (N, C, H, W)."""
        global_channels, local_channels = self.split_channels
        if not is_plain(self.proj_out):
            parts = [h_l] if local_channels else []
            if global_channels:
                parts.append(resize(_to_map(h_g, global_size), size))
            return self.proj_out(torch.cat(parts, 1))
        weight, bias = self.proj_out.weight, self.proj_out.bias
        if not global_channels:
            return F.conv2d(h_l, weight, bias)
        h_g = F.linear(h_g, weight[:, local_channels:].flatten(1), bias)
        h_g = resize(_to_map(h_g, global_size), size)
        if not local_channels:
            return h_g
        return F.conv2d(h_l, weight[:, :local_channels]).add_(h_g)


def _depthwise_conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def _to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C): a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H * W, C) -> (N, C, H, W) with ``size = (H, W)``, a channels-last view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def _check_streams(
    channels: int, num_heads: int, alpha: float, isa: bool | str, intra_scale: str
) -> int:
    """Returns the width of the global stream, or says what does not fit."""
    if not 0 <= alpha <= 1:
        raise ValueError(
            f'alpha is the share of channels given to attention and lies in '
            f'[0, 1], got {alpha}.'
        )
    global_channels = round(channels * alpha)
    if abs(global_channels - channels * alpha) > 1e-6:
        raise ValueError(
            f'alpha={alpha} splits {channels} channels into parts that are not '
            f'whole; choose alpha so that alpha * {channels} is an integer.'
        )
    if num_heads < 1 or global_channels % num_heads:
        raise ValueError(
            f'num_heads={num_heads} does not divide the {global_channels} channels '
            f'of the global stream (alpha={alpha} of {channels}).'
        )
    if isa and isa not in ISA_DIRECTIONS:
        raise ValueError(f'isa is True, False or one of {ISA_DIRECTIONS}, got {isa!r}.')
    if isa and 2 * global_channels != channels:
        raise ValueError(
            f'Inter-Scale Alignment needs streams of equal width, got alpha={alpha}; '
            f'use alpha=0.5, or isa=False.'
        )
    if intra_scale not in INTRA_SCALES:
        raise ValueError(f'intra_scale is one of {INTRA_SCALES}, got {intra_scale!r}.')
    return global_channels

"""The Dual-Stream block of DS-Net (arXiv 2105.14734, Fig. 2) and its parts."""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.ops import (
    attention,
    co_attention,
    depthwise_conv,
    ds_block,
    resize,
    resize_add,
    runs_ds_block,
    self_attention,
    split_heads,
    to_tiles,
)

from .pointwise import (
    FFN,
    Pointwise,
    TokenLinear,
    to_map,
    to_tokens,
)

ISA_DIRECTIONS = ('both', 'global_to_local', 'local_to_global')
INTRA_SCALES = ('both', 'local', 'global')


class ResidualConv(nn.Conv2d):
    """Depth-wise 3x3 convolution with its residual: x + conv(norm(x)).

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.fused = False

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W); ``norm`` is ignored once it is fused."""
        if not self.fused:
            return x + super().forward(x if norm is None else norm(x))
        border = getattr(self, 'border', None)
        return depthwise_conv(x, self.weight, self.bias, border)

    @torch.no_grad()
    def fuse(self, norm: nn.Module | None = None) -> None:
        """Folds the residual and a batch norm into the weights.

        The norm's shift is not seen by the taps that lie outside of the map: what
        the bias has of theirs is taken back along the borders, for each of the four
        edges, and given again once at the corners, where two edges take it.

        Args:
            norm: Batch norm in front of the convolution, or None.
        """
        if self.fused:
            return
        if norm is not None:
            scale, shift = scale_and_shift(norm)
            taps = (self.weight * shift[:, None, None, None])[:, 0]
            self.bias += taps.sum((1, 2))
            edges = [-taps[:, i].sum(1) for i in (0, -1)]
            edges += [-taps[:, :, j].sum(1) for j in (0, -1)]
            corners = [taps[:, i, j] for i in (0, -1) for j in (0, -1)]
            self.register_buffer('border', torch.stack(edges + corners))
            self.weight *= scale[:, None, None, None]
        self.weight[:, :, 1, 1] += 1
        self.fused = True


class PatchEmbed(BaseModule):
    """Non-overlapping patches, projected linearly: the stem and the transitions.

    A map whose sides are no multiple of the patch is padded with zeros on the
    right and at the bottom, so that every input size gives
    ``ceil(H / patch_size)`` rows.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        patch_size: Kernel and stride of the projection, in input pixels.
        init_cfg: Initialisation, as in MMEngine.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.patch_size = patch_size
        self.projection = nn.Conv2d(
            in_channels, out_channels, kernel_size=patch_size, stride=patch_size
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / p), ceil(W / p))."""
        p = self.patch_size
        # Not -side % p, which PyTorch does not compile for pictures of any size.
        pad_h, pad_w = ((side + p - 1) // p * p - side for side in x.shape[-2:])
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        return self.projection(x)


class InterScaleAlignment(BaseModule):
    """Inter-Scale Alignment (ISA): co-attention between the two streams.

    Each stream is normalised and projected to queries, keys and values; local
    queries read the global stream and global queries read the local one
    (two different attentions, no weights shared). What a stream has read is
    projected and added to it.

    Args:
        channels: Width of either stream.
        num_heads: Number of attention heads, a divisor of ``channels``.
        direction: ``'both'``, or one way only, ``'global_to_local'`` or
            ``'local_to_global'`` (Table 3 of the paper).
        attn_drop_rate: Dropout of the attention weights, in [0, 1).
        norm_cfg: Normalisation of the local stream (the global one, which is
            made of tokens, has LayerNorm).
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
        # A stream needs queries (1 part) to read, keys and values (2) to be read.
        local_reads = direction in ('both', 'global_to_local')
        global_reads = direction in ('both', 'local_to_global')
        local_parts = local_reads + 2 * global_reads
        global_parts = global_reads + 2 * local_reads
        self.local_norm = build_norm_layer(norm_cfg, channels)[1]
        self.local_qkv = Pointwise(channels, local_parts * channels)
        self.global_norm = nn.LayerNorm(channels)
        self.global_qkv = TokenLinear(channels, global_parts * channels)
        if local_reads:
            self.local_proj = TokenLinear(channels, channels)
        if global_reads:
            self.global_proj = TokenLinear(channels, channels)

    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
        """Aligns the streams, perhaps in their memory where no gradients are computed.

        Args:
            local: Local stream f_L, a map of shape (N, C, H, W).
            global_: Global stream f_G, tokens of shape (N, G, C).

        Returns:
            Both streams, in the shapes they came in.
        """
        size = local.shape[-2:]
        local_qkv = to_tokens(self.local_qkv(self.local_norm(local)))
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
            local = to_map(self.local_proj(h_l, to_tokens(local)), size)
        if h_g is not None:
            global_ = self.global_proj(h_g, global_)
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
                         |     reads the other   |
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
        mlp_ratio: Width of the hidden layer of the FFN over ``channels``.
        attn_drop_rate: Dropout of the attention weights, in [0, 1).
        drop_path_rate: Stochastic depth of both residual branches, in [0, 1).
        norm_cfg: Normalisation of maps.
        act_cfg: Activation of the FFN.
        init_cfg: Initialisation, as in MMEngine.

    Raises:
        ValueError: If alpha, heads and ISA do not fit together.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        alpha: float = 0.5,
        isa: bool | str = True,
        intra_scale: str = 'both',
        global_factor: int = 1,
        mlp_ratio: float = 4.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if isa is True:
            isa = 'both'
        global_channels = _check_streams(channels, num_heads, alpha, isa, intra_scale)
        local_channels = channels - global_channels
        self.split_channels = (global_channels, local_channels)
        self.num_heads = num_heads
        self.global_factor = global_factor
        self.attn_drop_rate = attn_drop_rate

        # Norms before convolutions: MMCV's fuse_conv_bn takes a norm for that of
        # the convolution that was registered before it.
        has_local_conv = local_channels and intra_scale in ('both', 'local')
        self.norm1 = build_norm_layer(norm_cfg, channels)[1]
        self.norm2 = build_norm_layer(norm_cfg, channels)[1]
        if has_local_conv:
            self.local_norm = build_norm_layer(norm_cfg, local_channels)[1]
        self.pos_embed = ResidualConv(channels)
        self.local_conv = self.global_qkv = self.isa = None
        if has_local_conv:
            self.local_conv = ResidualConv(local_channels)
        if global_channels and intra_scale in ('both', 'global'):
            self.global_norm = nn.LayerNorm(global_channels)
            self.global_qkv = TokenLinear(global_channels, 3 * global_channels)
        if isa:
            self.isa = InterScaleAlignment(
                local_channels, num_heads, isa, attn_drop_rate, norm_cfg
            )

        self.proj_in = Pointwise(channels, channels)
        self.proj_out = Pointwise(channels, channels)
        self.ffn = FFN(channels, int(channels * mlp_ratio), act_cfg)
        self.drop_path = DropPath(drop_path_rate)
        self._packed: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if weights := self.weights_for(x):
            return ds_block(x, weights, self.num_heads, self.global_factor)
        x = self.pos_embed(x.contiguous(memory_format=torch.channels_last))
        if self.training:
            x = x + self.drop_path(self.dual_stream(self.norm1(x)))
            return x + self.drop_path(self.ffn(self.norm2(x)))
        x = self.dual_stream(self.norm1(x), add=x)
        return self.ffn(self.norm2(x), add=x)

    def dual_stream(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Splits, propagates, aligns and merges the streams, and adds a map.

        The result may take the memory of ``add`` where no gradients are computed.
        Resizing commutes with 1x1 convolutions, so those of the global stream
        are computed at its low resolution: ``proj_in``'s rows and
        ``proj_out``'s columns of these channels.
        """
        size = x.shape[-2:]
        global_size = tuple(max(side // self.global_factor, 1) for side in size)
        has_global, has_local = (width > 0 for width in self.split_channels)
        global_width, channels = self.split_channels[0], sum(self.split_channels)
        local_width = channels - global_width
        f_g = f_l = None

        # Split
        if has_global:
            f_g = to_tokens(
                self.proj_in(resize(x, global_size), outputs=(0, global_width))
            )
        if has_local:
            f_l = self.proj_in(x, outputs=(global_width, channels))

        # Intra-scale propagation
        if self.local_conv is not None:
            f_l = self.local_conv(f_l, self.local_norm)
        if self.global_qkv is not None:
            f_g = f_g + self.self_attention(f_g)

        # Inter-scale alignment
        if self.isa is not None:
            f_l, f_g = self.isa(f_l, f_g)

        # Merge
        if has_global:
            h_g = to_map(f_g, global_size)
            h_g = self.proj_out(h_g, inputs=(local_width, channels))
            add = resize(h_g, size) if add is None else resize_add(h_g, add)
        return self.proj_out(f_l, add, inputs=(0, local_width)) if has_local else add

    def fuse(self) -> None:
        """Folds norms into the layers after them, and prepares for :func:`ds_block`."""
        self.pos_embed.fuse()
        self.norm1 = fold(self.norm1, self.proj_in)
        self.norm2 = fold(self.norm2, self.ffn.fc1)
        norms = [self.norm1, self.norm2]
        if self.local_conv is not None and folds(self.local_norm):
            self.local_conv.fuse(self.local_norm)
            self.local_norm = nn.Identity()
        if self.isa is not None:
            self.isa.local_norm = fold(self.isa.local_norm, self.isa.local_qkv)
            norms.append(self.isa.local_norm)
        widths = (*self.split_channels, self.ffn.fc1.out_channels)
        if (
            self.local_conv is not None
            and self.local_conv.fused
            and self.global_qkv is not None
            and (self.isa is None or self.isa.direction == 'both')
            and all(isinstance(norm, nn.Identity) for norm in norms)
            and self.ffn.has_exact_gelu
            and not any(width % 32 for width in widths)
        ):
            self._packed = []

    def weights_for(self, x: Tensor) -> list[Tensor] | None:
        """Returns what :func:`ds_block` takes, or None if it is not for this map.

        It is for fused blocks with both streams, and ISA both ways or none. Weights
        are packed at the first call, and again after they were moved to another type
        or loaded, but not after other changes of them.
        """
        if self._packed is None or self.training or not runs_ds_block(x):
            return None
        if not self._packed:
            self._packed = self.pack()
        return self._packed if self._packed[0].dtype == x.dtype else None

    def pack(self) -> list[Tensor]:
        """Returns the weights in the order in which :func:`ds_block` takes them."""
        global_width, channels = self.split_channels[0], sum(self.split_channels)
        local_width = channels - global_width

        def tiles(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
            weight = to_tiles(weight.flatten(1))
            return [weight] if bias is None else [weight, bias]

        ffn = self.ffn
        weights = [
            *(self.pos_embed.weight, self.pos_embed.bias),
            *tiles(*self.proj_in.part(outputs=(0, global_width))),
            *tiles(*self.proj_in.part(outputs=(global_width, channels))),
            *(self.local_conv.weight, self.local_conv.bias, self.local_conv.border),
            *(self.global_norm.weight, self.global_norm.bias),
            *tiles(self.global_qkv.weight, self.global_qkv.bias),
            *tiles(*self.proj_out.part(inputs=(local_width, channels))),
            *tiles(*self.proj_out.part(inputs=(0, local_width))),
            *tiles(ffn.fc1.weight, ffn.fc1.bias),
            *tiles(ffn.fc2.weight, ffn.fc2.bias),
        ]
        if self.isa is not None:
            isa = self.isa
            weights += [
                *tiles(isa.local_qkv.weight, isa.local_qkv.bias),
                *(isa.global_norm.weight, isa.global_norm.bias),
                *tiles(isa.global_qkv.weight, isa.global_qkv.bias),
                *tiles(isa.local_proj.weight, isa.local_proj.bias),
                *tiles(isa.global_proj.weight, isa.global_proj.bias),
            ]
        return weights

    def _forget(self) -> None:
        if self._packed:
            self._packed = []

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # packed weights are not saved
        return {**self.__dict__, '_packed': [] if self._packed else self._packed}

    def self_attention(self, f_g: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V of the global tokens, (N, G, alpha * C)."""
        dropout_p = self.attn_drop_rate if self.training else 0.0
        qkv = self.global_qkv(self.global_norm(f_g))
        return self_attention(qkv, self.num_heads, dropout_p)


def folds(norm: nn.Module) -> bool:
    """Whether a norm multiplies and adds constants in evaluation."""
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns what a batch norm in evaluation multiplies by and adds, (C,) each."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift + norm.bias if norm.affine else shift


@torch.no_grad()
def fold(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Folds a batch norm into the 1x1 convolution after it, in place.

    Args:
        norm: Norm in evaluation. Only a batch norm with statistics can be folded.
        conv: Convolution without padding.

    Returns:
        What stays in the norm's place: an identity, or the norm itself if it
        cannot be folded.
    """
    if not folds(norm):
        return norm
    scale, shift = scale_and_shift(norm)
    conv.bias += conv.weight.flatten(1) @ shift
    conv.weight *= scale[:, None, None]
    return nn.Identity()


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

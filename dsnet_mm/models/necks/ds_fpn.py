"""DS-FPN: the feature pyramid of DS-Net (arXiv 2105.14734, Fig. 3)."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from dsnet_mm.models.layers import DSBlock, PatchEmbed
from dsnet_mm.registry import MODELS

EXTRA_SOURCES = ('on_input', 'on_lateral', 'on_output')


@MODELS.register_module()
class DSFPN(BaseModule):
    r"""Feature pyramid whose lateral connections are Dual-Stream blocks.

    ::

        stride 4    C1 ---- 1x1 -------------------------(+)-- 3x3 --> F1
                                                          ^ x2
        stride 8    C2 ---- 1x1 ---- DS-Block -----------(+)-- 3x3 --> F2
                                                          ^ x2
        stride 16   C3 ---- 1x1 ---- DS-Block -----------(+)-- 3x3 --> F3
                                                          ^ x2
        stride 32   C4 --+- 1x1 ---- DS-Block -------------+-- 3x3 --> F4
                         |
        stride 64        +- 2x2 patch embedding -- DS-Block ---------> F5

    It can replace ``type='FPN'`` in any mmdet detector, with any backbone. Fig. 3
    has the outputs F2 to F5. Mask R-CNN also needs a level of stride 4. This level
    is that of a plain FPN, because a DS-Block at stride 4 would double the
    multiply-adds of the neck. The figure does not show where the number of channels
    changes, whether ISA is on, and whether a convolution follows the sums. There is
    an option for each. ``docs/ds_fpn.md`` lists their parameters and multiply-adds.

    Args:
        in_channels: Channels of the backbone's feature maps, finest level first.
        out_channels: Channels of all outputs.
        num_outs: Number of outputs. Outputs beyond the levels of the backbone are
            extra levels. Each has half the height and width of the level before.
        start_level: First level of the backbone that is used.
        end_level: Last level that is used. -1 is the last level of the backbone.
        add_extra_convs: Source of the first extra level. ``'on_input'`` or True: the
            backbone's last feature map, as in Fig. 3. ``'on_lateral'``: the last sum.
            ``'on_output'``: the last output. False: all extra levels are a
            max-pooling of the last output, as in FPN.
        relu_before_extra_convs: Whether a ReLU precedes each extra level except the
            first.
        no_norm_on_lateral: Whether the 1x1 lateral convolutions have no norm.
        conv_cfg: Type of the 1x1 and 3x3 convolutions.
        norm_cfg: Norm of the DS-Blocks and of the 1x1 and 3x3 convolutions. With
            None the blocks have BN and the convolutions have no norm.
        act_cfg: Activation after the 1x1 and 3x3 convolutions.
        upsample_cfg: Arguments of ``F.interpolate`` in the top-down path.
        project_first: Whether the 1x1 convolution precedes the DS-Block. True: all
            blocks have ``out_channels`` channels. This needs fewer parameters. False:
            blocks have the channels of the backbone. This needs fewer multiply-adds.
        num_plain_levels: Number of levels, finest first, with a 1x1 convolution only
            and no DS-Block. None leaves DS-Blocks on the three coarsest levels, as in
            Fig. 3.
        smooth: Whether a 3x3 convolution follows each sum, as in FPN.
        num_heads: Attention heads of the DS-Blocks.
        alpha: Fraction of the channels in the global stream, see :class:`DSBlock`.
        isa: Inter-Scale Alignment in the DS-Blocks, see :class:`DSBlock`.
        global_factors: Factor of the global stream at each used level, see
            :class:`DSBlock`. With None the global streams of all levels have the size
            of the coarsest level. Extra levels have factor 1.
        max_global_tokens: Maximum number of global tokens at each level, see
            :class:`DSBlock`.
        init_cfg: Initialisation, as in MMEngine.

    Raises:
        ValueError: If levels, channels or factors do not match.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        end_level: int = -1,
        add_extra_convs: bool | str = 'on_input',
        relu_before_extra_convs: bool = False,
        no_norm_on_lateral: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        upsample_cfg: dict = dict(mode='nearest'),
        *,
        project_first: bool = True,
        num_plain_levels: int | None = None,
        smooth: bool = True,
        num_heads: int = 8,
        alpha: float = 0.5,
        isa: bool | str = True,
        global_factors: Sequence[int] | None = None,
        max_global_tokens: int | None = None,
        init_cfg: dict | list | None = [
            dict(type='Xavier', layer='Conv2d', distribution='uniform'),
            dict(type='TruncNormal', layer='Linear', std=0.02),
        ],
    ) -> None:
        super().__init__(init_cfg)
        levels = range(len(in_channels))
        if start_level not in levels or end_level not in (-1, *levels[start_level:]):
            raise ValueError(
                f'start_level={start_level} and end_level={end_level} do not choose '
                f'from the {len(in_channels)} levels of in_channels={in_channels}.'
            )
        self.levels = (
            levels[start_level:]
            if end_level == -1
            else levels[start_level : end_level + 1]
        )
        num_levels = len(self.levels)
        if num_outs < num_levels:
            raise ValueError(
                f'num_outs={num_outs} is less than the {num_levels} levels used '
                f'({start_level} to {self.levels[-1]}).'
            )
        if add_extra_convs is True:
            add_extra_convs = 'on_input'
        if add_extra_convs and add_extra_convs not in EXTRA_SOURCES:
            raise ValueError(
                f'add_extra_convs is True, False or one of {EXTRA_SOURCES}, '
                f'got {add_extra_convs!r}.'
            )
        if global_factors is None:
            global_factors = [2 ** (num_levels - 1 - i) for i in range(num_levels)]
        if len(global_factors) != num_levels:
            raise ValueError(
                f'global_factors takes {num_levels} values, one a level used, '
                f'got {global_factors}.'
            )
        if num_plain_levels is None:
            num_plain_levels = max(num_levels - 3, 0)
        self.in_channels = list(in_channels)
        self.num_outs = num_outs
        self.add_extra_convs = add_extra_convs
        self.relu_before_extra_convs = relu_before_extra_convs
        self.upsample_cfg = dict(upsample_cfg)

        def conv(in_dim: int, kernel_size: int, norm: dict | None) -> ConvModule:
            return ConvModule(
                in_dim,
                out_channels,
                kernel_size,
                padding=kernel_size // 2,
                conv_cfg=conv_cfg,
                norm_cfg=norm,
                act_cfg=act_cfg,
                inplace=False,
            )

        def ds_block(channels: int, global_factor: int) -> DSBlock:
            return DSBlock(
                channels,
                num_heads,
                alpha=alpha,
                isa=isa,
                global_factor=global_factor,
                max_global_tokens=max_global_tokens,
                norm_cfg=norm_cfg or dict(type='BN'),
            )

        self.lateral_convs = ModuleList()
        for i, level in enumerate(self.levels):
            layers: list[nn.Module] = [
                conv(in_channels[level], 1, None if no_norm_on_lateral else norm_cfg)
            ]
            if i >= num_plain_levels and project_first:
                layers.append(ds_block(out_channels, global_factors[i]))
            elif i >= num_plain_levels:
                layers.insert(0, ds_block(in_channels[level], global_factors[i]))
            self.lateral_convs.append(nn.Sequential(*layers))

        self.fpn_convs = ModuleList(
            conv(out_channels, 3, norm_cfg) if smooth else nn.Identity()
            for _ in self.levels
        )

        self.extra_convs = ModuleList()
        if add_extra_convs:
            for i in range(num_outs - num_levels):
                first_on_input = i == 0 and add_extra_convs == 'on_input'
                width = in_channels[self.levels[-1]] if first_on_input else out_channels
                self.extra_convs.append(
                    nn.Sequential(
                        PatchEmbed(width, out_channels, patch_size=2),
                        ds_block(out_channels, 1),
                    )
                )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Computes the feature pyramid.

        Args:
            inputs: Feature maps of the backbone, of shape
                (N, in_channels[i], H_i, W_i), finest level first.

        Returns:
            ``num_outs`` feature maps of shape (N, out_channels, H_i, W_i).

        Raises:
            ValueError: If the feature maps have other channels than ``in_channels``.
        """
        if [x.shape[1] for x in inputs] != self.in_channels:
            raise ValueError(
                f'DSFPN with in_channels={self.in_channels} got feature maps of the '
                f'shapes {[tuple(x.shape) for x in inputs]} from the backbone. Set '
                'in_channels of the neck, or out_indices of the backbone: the second '
                'number of each shape is in_channels.'
            )

        laterals = [
            lateral_conv(inputs[level])
            for level, lateral_conv in zip(self.levels, self.lateral_convs, strict=True)
        ]

        # Top-down path
        sums = laterals[-1:]
        for lateral in reversed(laterals[:-1]):
            size = lateral.shape[-2:]
            sums.insert(0, lateral + F.interpolate(sums[0], size, **self.upsample_cfg))
        outs = [fpn_conv(x) for fpn_conv, x in zip(self.fpn_convs, sums, strict=True)]

        # Extra levels
        if self.add_extra_convs:
            source = {
                'on_input': inputs[self.levels[-1]],
                'on_lateral': sums[-1],
                'on_output': outs[-1],
            }[self.add_extra_convs]
            for i, extra_conv in enumerate(self.extra_convs):
                if i > 0 and self.relu_before_extra_convs:
                    source = F.relu(source)
                source = extra_conv(source)
                outs.append(source)
        else:
            while len(outs) < self.num_outs:
                outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        # In channels-first memory order: MMCV's RoIAlign ignores strides.
        return tuple(out.contiguous() for out in outs)

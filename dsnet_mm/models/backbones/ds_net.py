"""DS-Net: Dual-Stream Network for Visual Recognition (arXiv 2105.14734)."""

from collections.abc import Sequence

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, ModuleList, PretrainedInit
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.checkpoint import read_checkpoint, restricted_loading
from dsnet_mm.models.layers import DSBlock, PatchEmbed
from dsnet_mm.registry import MODELS
from dsnet_mm.weights import check_kinds


@MODELS.register_module()
class DSNet(BaseModule):
    """Backbone with a local convolution stream and a global attention stream.

    It has four stages with strides 4, 8, 16 and 32 (Table 1). Each stage is a patch
    embedding, of 4x4 patches in the first stage and of 2x2 patches in the others,
    followed by several :class:`DSBlock`. With ISA, the default, the networks are the
    starred ones of the paper:

    ======== ========== ============== =========== =========== ============
    arch     depths     channels       parameters  parameters  ImageNet-1k
                                       with ISA    without     (paper)
    ======== ========== ============== =========== =========== ============
    tiny     2, 2, 4, 1 64 .. 512      10.5 M      9.1 M       79.0 / 78.1
    small    3, 4, 8, 3 64 .. 512      23.0 M      19.6 M      82.3 / 81.9
    base     3, 4, 28,3 64 .. 512      49.3 M      41.8 M      83.1 / 82.8
    ======== ========== ============== =========== =========== ============

    Each output has a norm of its own, ``norm{i}``, of the type ``norm_cfg``. The blocks
    are residual and pre-normalised, so their feature maps grow with depth. The norms
    make the levels comparable for a neck. ``norm3`` is the final batch norm of the
    public classifier, so an ImageNet checkpoint contains it. In classification,
    ``out_indices=(3,)``, it is the only output norm. ``output_norm=False`` leaves the
    norms out.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``,
            ``depths`` and ``num_heads``, each with one value per stage.
        in_channels: Channels of the input.
        alpha: Fraction of the channels in the global stream (Table 2).
        isa: Inter-Scale Alignment. True, False (the networks without star), or one of
            the two directions (Table 3). See :class:`DSBlock`.
        intra_scale: Streams with intra-scale propagation (Table 3). See
            :class:`DSBlock`.
        num_heads: Number of attention heads, one for all stages or one per stage.
            None takes those of ``arch``: 1, 2, 5, 8, as in the public code. Table 1
            of the paper has 8.
        global_factors: Reduction of the global stream, one factor per stage. In a
            stage of H rows the global stream has ``floor(H / factor)`` rows. The
            default is that of the public code, and the only one with the published
            multiply-adds. It gives 3x3 tokens in the last stage of a 224x224 input.
            ``(8, 4, 2, 1)`` is Fig. 2 of the paper, stride 32 in all stages.
        max_global_tokens: Maximum number of global tokens of a block. Where
            ``global_factors`` leave more, the factor grows. From 49 on, a 224x224 input
            is not changed by it. None is the paper. See :class:`DSBlock`.
        mlp_ratio: Ratio of hidden to input channels of the FFNs.
        attn_drop_rate: Dropout of the attention weights. The public code has 0.1.
        drop_path_rate: Stochastic depth rate of the last block. The rate increases
            linearly from 0 over all blocks.
        out_indices: Stages whose feature maps are returned. Negative values count
            from the last stage.
        frozen_stages: Number of stages that are frozen, with their patch embeddings.
            0 freezes the first patch embedding only, -1 nothing. Output norms are not
            frozen, because a classification checkpoint only has the last one.
        norm_eval: Whether the batch norms of the stages use their running statistics
            in training. This excludes the output norms.
        output_norm: Whether outputs have norms. Public checkpoints need True.
        norm_cfg: Norm of feature maps. Tokens have LayerNorm.
        act_cfg: Activation of the FFNs.
        with_cp: Whether gradient checkpointing is used for each block. It saves
            memory and costs time. Batch norms then update their statistics twice per
            training step.
        init_cfg: Initialisation, as in MMEngine. ``dict(type='Pretrained',
            checkpoint=..., prefix='backbone.')`` loads the checkpoint of an
            mmpretrain classifier. With ``checkpoint=None`` the weights are random, and
            a configuration can still set the checkpoint by an option.

    Raises:
        ValueError: If an argument is out of range, or if a checkpoint does not fit.
    """

    arch_zoo = {
        'tiny': dict(
            embed_dims=(64, 128, 320, 512), depths=(2, 2, 4, 1), num_heads=(1, 2, 5, 8)
        ),
        'small': dict(
            embed_dims=(64, 128, 320, 512), depths=(3, 4, 8, 3), num_heads=(1, 2, 5, 8)
        ),
        'base': dict(
            embed_dims=(64, 128, 320, 512), depths=(3, 4, 28, 3), num_heads=(1, 2, 5, 8)
        ),
    }
    num_stages = 4

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        *,
        alpha: float = 0.5,
        isa: bool | str = True,
        intra_scale: str = 'both',
        num_heads: int | Sequence[int] | None = None,
        global_factors: Sequence[int] = (8, 4, 2, 2),
        max_global_tokens: int | None = None,
        mlp_ratio: float = 4.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        output_norm: bool = True,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='GELU'),
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        given = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        init_cfgs = [c for c in given if not _is_pretrained(c) or c['checkpoint']]
        random = dict(type='TruncNormal', layer='Linear', std=0.02)
        super().__init__(init_cfgs or [random])
        arch = self._parse_arch(arch)
        self.embed_dims = tuple(arch['embed_dims'])
        self.depths = tuple(arch['depths'])
        if num_heads is None:
            num_heads = arch['num_heads']
        elif isinstance(num_heads, int):
            num_heads = (num_heads,) * self.num_stages
        self.out_indices = self._parse_out_indices(out_indices)
        if frozen_stages not in range(-1, self.num_stages + 1):
            raise ValueError(
                f'frozen_stages lies in -1 .. {self.num_stages}, got {frozen_stages}.'
            )
        per_stage = dict(num_heads=num_heads, global_factors=global_factors)
        for name, values in per_stage.items():
            if len(values) != self.num_stages or min(values) < 1:
                raise ValueError(
                    f'{name} takes {self.num_stages} positive integers, one a stage, '
                    f'got {values}.'
                )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        drop_path_rates = torch.linspace(0, drop_path_rate, sum(self.depths)).tolist()
        self.patch_embeds = ModuleList()
        self.stages = ModuleList()
        for i, channels in enumerate(self.embed_dims):
            self.patch_embeds.append(
                PatchEmbed(in_channels, channels, patch_size=4 if i == 0 else 2)
            )
            self.stages.append(
                ModuleList(
                    DSBlock(
                        channels,
                        num_heads[i],
                        alpha=alpha,
                        isa=isa,
                        intra_scale=intra_scale,
                        global_factor=global_factors[i],
                        max_global_tokens=max_global_tokens,
                        mlp_ratio=mlp_ratio,
                        attn_drop_rate=attn_drop_rate,
                        drop_path_rate=drop_path_rates.pop(0),
                        norm_cfg=norm_cfg,
                        act_cfg=act_cfg,
                        keep_norms=with_cp,  # the whole block is computed again
                    )
                    for _ in range(self.depths[i])
                )
            )
            if i in self.out_indices:
                norm = build_norm_layer(norm_cfg, channels)[1]
                self.add_module(f'norm{i}', norm if output_norm else nn.Identity())
            in_channels = channels
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes the feature maps.

        Args:
            x: Input of shape (N, C_in, H, W), of any height and width.

        Returns:
            For each stage i of ``out_indices``, in increasing order, a feature map of
            shape (N, embed_dims[i], ceil(H / stride), ceil(W / stride)). The strides
            of the stages are 4, 8, 16 and 32.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i, (patch_embed, stage) in enumerate(
            zip(self.patch_embeds, self.stages, strict=True)
        ):
            x = patch_embed(x)
            for block in stage:
                if self.with_cp and x.requires_grad:
                    x = cp.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                if out.requires_grad and not torch.compiler.is_compiling():
                    # The backward of PyTorch's batch norm is ten times slower if the
                    # gradient has another memory format than the input.
                    out.register_hook(_to_channels_last)
                # In channels-first memory order: MMCV's RoIAlign ignores strides.
                outs.append(out.contiguous())
        return tuple(outs)

    def init_weights(self) -> None:
        """Initialises the weights by ``init_cfg``, which can name a checkpoint.

        Raises:
            ValueError: If the checkpoint is not safe to load (see
                :func:`dsnet_mm.checkpoint.restricted_loading`), or does not fit
                this architecture.
        """
        self.check_checkpoint()
        with restricted_loading():
            super().init_weights()

    def check_checkpoint(self) -> None:
        """Checks that the checkpoints of ``init_cfg`` fit, if there are any.

        MMEngine only warns about missing weights, and trains from random ones.

        Raises:
            ValueError: If one is not safe to load, or does not fit this
                architecture.
        """
        for cfg in self.init_cfg:
            if _is_pretrained(cfg):
                self._check_fit(cfg['checkpoint'], cfg.get('prefix') or '')

    def _check_fit(self, checkpoint: str, prefix: str) -> None:
        if prefix and not prefix.endswith('.'):
            prefix += '.'
        state = read_checkpoint(checkpoint)['state_dict']
        own = {prefix + key: value for key, value in self.state_dict().items()}
        check_kinds(own, state, checkpoint)

        def stage_shapes(state: dict[str, Tensor], prefix: str) -> dict:
            # Output norms are not compared: a classifier only has the last one.
            stages = (f'{prefix}patch_embeds.', f'{prefix}stages.')
            return {
                key.removeprefix(prefix): tuple(value.shape)
                for key, value in state.items()
                if key.startswith(stages) and not key.endswith('num_batches_tracked')
            }

        expected = stage_shapes(self.state_dict(), '')
        given = stage_shapes(state, prefix)
        differing = [k for k in expected if k in given and given[k] != expected[k]]
        absent = [k for k in expected if k not in given]
        unknown = [k for k in given if k not in expected]
        if differing:
            key = differing[0]
            problem = (
                f'{len(differing)} tensors have another shape, for example {key}: '
                f'{given[key]} given, {expected[key]} expected'
            )
        elif absent:
            problem = (
                f'{len(absent)} of {len(expected)} tensors are not in it, for '
                f'example {prefix}{absent[0]}'
            )
        elif unknown:
            problem = f'it has {len(unknown)} tensors more, for example {unknown[0]}'
        else:
            return
        raise ValueError(
            f'{checkpoint} does not fit this DSNet (depths {self.depths}): {problem}. '
            f'Its keys start like {next(iter(state), "nothing")!r}; arch, isa and '
            f'alpha must be those it was trained with, prefix is {prefix!r} '
            f"('backbone.' for a classifier or detector), and public DS-Net "
            f'checkpoints are converted by tools/model_converters/dsnet_to_mm.py.'
        )

    def train(self, mode: bool = True) -> 'DSNet':
        """Sets the mode, except of frozen stages and, with ``norm_eval``, of norms."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.stages.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Returns the depth of a parameter, for layer-wise learning rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: Part of the name before the name within this backbone.

        Returns:
            The layer of the parameter, and the number of layers. The first patch
            embedding is layer 0. The n blocks are layers 1 to n. The other patch
            embeddings belong to the block after them. All other parameters are in
            layer n + 1.
        """
        num_layers = sum(self.depths) + 2
        kind, _, rest = param_name.removeprefix(prefix).partition('.')
        if not param_name.startswith(prefix) or kind not in ('patch_embeds', 'stages'):
            return num_layers - 1, num_layers
        stage, block, *_ = rest.split('.')
        if kind == 'patch_embeds':
            if stage == '0':
                return 0, num_layers
            block = 0
        return sum(self.depths[: int(stage)]) + int(block) + 1, num_layers

    def _freeze_stages(self) -> None:
        # 0 freezes the first patch embedding, k >= 1 all stages up to stage k.
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [
            *self.patch_embeds[: max(self.frozen_stages, 1)],
            *self.stages[: self.frozen_stages],
        ]
        for module in frozen:
            module.eval()
            for param in module.parameters():
                param.requires_grad = False

    def _parse_arch(self, arch: str | dict) -> dict:
        if isinstance(arch, str):
            if arch not in self.arch_zoo:
                raise ValueError(
                    f'Unknown arch {arch!r} of DSNet; choose one of '
                    f'{sorted(self.arch_zoo)}, or give a dict with embed_dims, '
                    f'depths and num_heads.'
                )
            return self.arch_zoo[arch]
        missing = {'embed_dims', 'depths', 'num_heads'} - set(arch)
        if missing:
            raise ValueError(f'The arch dict of DSNet lacks {sorted(missing)}: {arch}.')
        for key in ('embed_dims', 'depths', 'num_heads'):
            if len(arch[key]) != self.num_stages:
                raise ValueError(
                    f'arch[{key!r}] takes {self.num_stages} values, one a stage, '
                    f'got {arch[key]}.'
                )
        return arch

    def _parse_out_indices(self, out_indices: Sequence[int]) -> tuple[int, ...]:
        if isinstance(out_indices, int):
            out_indices = (out_indices,)
        if not out_indices or any(
            i not in range(-self.num_stages, self.num_stages) for i in out_indices
        ):
            raise ValueError(
                f'out_indices takes stages from 0 to {self.num_stages - 1} (or from '
                f'-{self.num_stages} to -1), got {out_indices}.'
            )
        return tuple(sorted({i % self.num_stages for i in out_indices}))


def _is_pretrained(init_cfg: dict) -> bool:
    return init_cfg.get('type') in ('Pretrained', PretrainedInit)


def _to_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

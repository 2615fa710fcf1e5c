"""The inference form of DS-Net and DS-FPN: weights are buffers, norms are folded."""

from copy import deepcopy

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.models.layers import DSBlock, PatchEmbed
from dsnet_mm.models.layers.ds_block import global_size, has_hooks, is_plain
from dsnet_mm.models.layers.packed_projection import PackedProjection
from dsnet_mm.ops import select_path

# Names of the convolutions and linear layers of a block end so.
_LAYERS = ('pos_embed', '_conv', 'qkv', 'proj', 'proj_in', 'proj_out', 'fc1', 'fc2')


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Replaces the blocks of DS-Net and DS-FPN by their inference form.

    Batch norms are folded into the layers beside them: in blocks as
    :class:`FusedDSBlock` says, everywhere else by MMCV's ``fuse_conv_bn``. Networks of
    timm stay as they are: some of their batch norms include or follow an activation.

    Outputs change by rounding only. The weights of the replaced modules become
    buffers with other names, and the model can no longer be trained. Fuse after
    loading a checkpoint.

    Args:
        model: A backbone, a neck, a classifier or a detector with DS-blocks, or a
            DS-block. Its modules are replaced in place. Modules that are fused
            already stay.

    Returns:
        The model in evaluation mode, or the fused block if it is a block itself.

    Raises:
        ValueError: If there are no DS-blocks in it, or some whose forward is another
            one: of a subclass, with hooks, parametrisations or LoRA.
    """
    blocks = [m for m in model.modules() if isinstance(m, DSBlock | FusedDSBlock)]
    if not blocks:
        raise ValueError(
            f'fuse_for_inference takes models with DS-blocks (DSNet, DSFPN), and '
            f'{type(model).__name__} has none; mmcv.cnn.fuse_conv_bn fuses others.'
        )
    for block in blocks:
        if isinstance(block, DSBlock):
            _check_block(block)
    if isinstance(model, Fused):
        return model
    if isinstance(model, DSBlock):
        return FusedDSBlock(model)
    model.eval()
    _replace(model)
    _fold_norms(model)
    return model.eval()


def _check_block(block: DSBlock) -> None:
    """Refuses a block that does more than its weights tell."""
    if type(block) is not DSBlock:
        raise ValueError(
            f'fuse_for_inference knows the forward of DSBlock, and '
            f'{type(block).__name__} is a subclass, whose forward may differ.'
        )
    for name, layer in block.named_modules():
        is_other = name.endswith(_LAYERS) and not is_plain(layer)
        if is_other or has_hooks(layer):
            what = 'hooks' if has_hooks(layer) else f'the class {type(layer).__name__}'
            raise ValueError(
                f'fuse_for_inference takes the weights of a block, and '
                f'{name or "the block"} has {what}, which would be lost; remove hooks, '
                f'and merge parametrisations or LoRA into the weights first.'
            )


def _replace(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, DSBlock):
            setattr(model, name, FusedDSBlock(child))
        elif isinstance(child, PatchEmbed):
            setattr(model, name, FusedPatchEmbed(child))
        elif not isinstance(child, Fused):
            _replace(child)


def _fold_norms(module: nn.Module) -> None:
    from_timm = {m for m in module.modules() if type(m).__module__.startswith('timm.')}
    if not from_timm:
        fuse_conv_bn(module)
    elif module not in from_timm:
        for child in module.children():
            _fold_norms(child)


class Fused(nn.Module):
    """A copy of a module for inference.

    All its weights are buffers. It raises ValueError when it is set to training mode or
    loads the state dict of a network that is not fused.

    Args:
        module: The module, which is left as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.folded = deepcopy(module)
        _parameters_to_buffers(self.folded)
        self.eval()

    def train(self, mode: bool = True) -> 'Fused':
        """Stays in evaluation mode.

        Raises:
            ValueError: If ``mode`` is True.
        """
        if mode:
            raise ValueError(
                'A network that was fused for inference cannot be trained; build and '
                'load it again, and fuse it after the training.'
            )
        return super().train(False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        keys = [key for key in state_dict if key.startswith(prefix)]
        unfused = [key for key in keys if not key.startswith(f'{prefix}folded.')]
        if unfused:
            raise ValueError(
                f'The network was fused for inference, and the state dict is of one '
                f'that was not (it has {unfused[0]!r}); load it into a network that is '
                f'not fused, and fuse that one.'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Computes what the module does in evaluation."""
        return self.folded(x)


class FusedPatchEmbed(Fused):
    """:class:`PatchEmbed` with its weight channels-last, as its maps are.

    A weight in another order would be copied at every call.
    """

    def __init__(self, module: PatchEmbed) -> None:
        super().__init__(module)
        self.folded.projection.to(memory_format=torch.channels_last)


class FusedDSBlock(Fused):
    """:class:`DSBlock` with its batch norms folded.

    A batch norm before a 1x1 convolution is folded into the convolution. The batch norm
    before the depth-wise convolution, which pads with zeros, becomes a scale and a
    shift. Other norms stay.

    On the CPU the block is one operator, ``dsnet_mm::ds_block``, in the types whose
    weights can be packed (:func:`dsnet_mm.ops.can_pack`). This needs batch norms, the
    exact GELU, both streams with intra-scale propagation, ISA both ways or none, and
    numbers of channels that are multiples of 32. Otherwise, under autocast, and if the
    input requires a gradient, it is the forward of :class:`DSBlock` with the folded
    weights.
    """

    def __init__(self, module: DSBlock) -> None:
        super().__init__(module)
        block = self.folded
        norms = [block.norm1, block.norm2]
        block.norm1 = _fold(block.norm1, block.proj_in)
        block.norm2 = _fold(block.norm2, block.ffn.fc1)
        if block.local_conv is not None:
            norms.append(block.local_norm)
            if _can_fold(block.local_norm):
                block.local_norm = ScaleShift(*_scale_and_shift(block.local_norm))
        if block.isa is not None:
            norms.append(block.isa.local_norm)
            block.isa.local_norm = _fold(block.isa.local_norm, block.isa.local_qkv)
        widths = (*block.split_channels, block.ffn.fc1.out_channels)
        self.is_one_operator = (
            block.local_conv is not None
            and block.global_qkv is not None
            and (block.isa is None or block.isa.direction == 'both')
            and all(map(_can_fold, norms))
            and block.ffn.has_exact_gelu
            and not any(width % 32 for width in widths)
        )
        if self.is_one_operator:
            _pack_projections(block)
        # The weights by name. ``named_buffers`` takes longer than small operators.
        self._weights = [
            (f'{name}.{key}', layer, key)
            for name, layer in block.named_modules()
            for key in layer._buffers
        ]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        block = self.folded
        if not self._runs_as_one_operator(x):
            return block(x)
        weights = {name: layer._buffers[key] for name, layer, key in self._weights}
        low = global_size(x.shape[2:], block.global_factor, block.max_global_tokens)
        return torch.ops.dsnet_mm.ds_block(x, weights, block.num_heads, low)

    def _runs_as_one_operator(self, x: Tensor) -> bool:
        return (
            self.is_one_operator
            and x.is_cpu
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.dtype == self.folded.pos_embed.weight.dtype
            and self.folded.proj_in.packed.dim() == 3  # packed on this machine
            and x.numel() > 0
            and not torch.is_autocast_enabled('cpu')
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.jit.is_tracing()
            and select_path('cpu')[0] == 'native'
        )


class ScaleShift(nn.Module):
    """A batch norm in evaluation: scale * x + shift, per channel.

    Args:
        scale: Scale of shape (C,).
        shift: Shift of shape (C,).
    """

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return torch.addcmul(self.shift[:, None, None], x, self.scale[:, None, None])


def _parameters_to_buffers(module: nn.Module) -> None:
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            layer.register_buffer(name, parameter.detach())


def _pack_projections(module: nn.Module) -> None:
    for name, child in module.named_children():
        is_1x1 = isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)
        if is_1x1 or isinstance(child, nn.Linear):
            setattr(module, name, PackedProjection(child.weight, child.bias))
        else:
            _pack_projections(child)


def _can_fold(norm: nn.Module) -> bool:
    """Tells whether a norm in evaluation is a scale and a shift."""
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, (shift + norm.bias if norm.affine else shift)


def _fold(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Folds a norm into the 1x1 convolution after it.

    Returns:
        What takes the norm's place: an identity, or the norm if it cannot be folded.
    """
    if not _can_fold(norm):
        return norm
    scale, shift = _scale_and_shift(norm)
    conv.bias = conv.bias + conv.weight.flatten(1) @ shift
    conv.weight = conv.weight * scale[:, None, None]
    return nn.Identity()

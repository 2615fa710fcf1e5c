"""Fuses a trained network for inference."""

from mmcv.cnn import fuse_conv_bn
from torch import nn

from dsnet_mm.models.layers import DSBlock, PatchEmbed

from .fused import Fused, FusedDSBlock, FusedPatchEmbed


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Replaces the blocks of DS-Net and DS-FPN by their inference form.

    Batch norms are folded into the layers beside them: in blocks as
    :class:`FusedDSBlock` says, everywhere else by MMCV's ``fuse_conv_bn``. Hooks of the
    layers inside a fused block are not called.

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
        ValueError: If there are no DS-blocks in it, or some of a subclass.
    """
    blocks = [m for m in model.modules() if isinstance(m, DSBlock | FusedDSBlock)]
    if not blocks:
        raise ValueError(
            f'fuse_for_inference takes models with DS-blocks (DSNet, DSFPN), and '
            f'{type(model).__name__} has none; mmcv.cnn.fuse_conv_bn fuses others.'
        )
    for block in blocks:
        if type(block) not in (DSBlock, FusedDSBlock):
            raise ValueError(
                f'fuse_for_inference knows the forward of DSBlock, and '
                f'{type(block).__name__} is a subclass, whose forward may differ.'
            )
    if isinstance(model, Fused):
        return model
    if isinstance(model, DSBlock):
        return FusedDSBlock(model)
    model.eval()
    _replace(model)
    return fuse_conv_bn(model).eval()


def _replace(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, DSBlock):
            setattr(model, name, FusedDSBlock(child))
        elif isinstance(child, PatchEmbed):
            setattr(model, name, FusedPatchEmbed(child))
        elif not isinstance(child, Fused):
            _replace(child)

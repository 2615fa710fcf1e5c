"""Makes a trained network faster at inference without changing its outputs."""

from mmcv.cnn import fuse_conv_bn
from torch import nn

from dsnet_mm.models.layers import DSBlock, PatchEmbed

from .fused import Fused, FusedDSBlock, FusedPatchEmbed

FUSED = {DSBlock: FusedDSBlock, PatchEmbed: FusedPatchEmbed}


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Replaces the blocks of DS-Net and DS-FPN by their inference form.

    Batch norms are folded into the layers beside them: in blocks as
    :class:`FusedDSBlock` says, everywhere else by MMCV's ``fuse_conv_bn``. On the CPU
    a block is then one operator, except for most variants of the paper's ablations;
    hooks of the layers inside are not called.

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
        ValueError: If there are no DS-blocks in it.
    """
    if not any(isinstance(module, DSBlock) for module in model.modules()):
        raise ValueError(
            f'fuse_for_inference takes models with DS-blocks (DSNet, DSFPN), and '
            f'{type(model).__name__} has none; mmcv.cnn.fuse_conv_bn fuses others.'
        )
    if isinstance(model, tuple(FUSED)):
        return FUSED[type(model)](model)
    model.eval()
    _replace(model)
    return fuse_conv_bn(model).eval()


def _replace(model: nn.Module) -> None:
    for name, child in model.named_children():
        if type(child) in FUSED:
            setattr(model, name, FUSED[type(child)](child))
        elif not isinstance(child, Fused):
            _replace(child)

"""Makes a trained network faster at inference without changing its outputs."""

import torch
from mmcv.cnn import fuse_conv_bn
from torch import nn

from .layers import DSBlock, PatchEmbed


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Folds batch norms into the layers beside them, in place.

    The blocks of DS-Net and DS-FPN fold theirs into what follows
    (:meth:`DSBlock.fuse`), everything else as MMCV's ``fuse_conv_bn`` does.
    On the CPU a block of DS-Net is then one operator, except for most of the
    variants of the paper's ablations: hooks of the layers inside are not called. It
    packs the weights of its projections at its first call, which doubles their
    memory; weights that are changed in place after that are not seen.

    Outputs change by rounding only. The model can no longer be trained, and its
    state dict has other names: fuse after loading a checkpoint.

    Args:
        model: A backbone, a classifier or a detector with DS-blocks.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there are no DS-blocks in it.
    """
    if not any(isinstance(module, DSBlock) for module in model.modules()):
        raise ValueError(
            f'fuse_for_inference takes models with DS-blocks (DSNet, DSFPN), and '
            f'{type(model).__name__} has none; mmcv.cnn.fuse_conv_bn fuses others.'
        )
    model.eval()
    for module in model.modules():
        if isinstance(module, DSBlock):
            module.fuse()
        elif isinstance(module, PatchEmbed):
            # As the maps are: else every call copies the weight.
            module.projection.to(memory_format=torch.channels_last)
    return fuse_conv_bn(model)

"""The networks of the CIFAR-10 table with the stem of the other one.

Configurations import this module by ``custom_imports``.
"""

from mmengine.registry import MODELS
from mmpretrain.models.backbones import ResNet
from torch import nn

from dsnet_mm.models import DSNet
from dsnet_mm.models.layers.patch_embed import PatchEmbed


@MODELS.register_module()
class DSNetWithResNetStem(DSNet):
    """DS-Net behind a 7x7 convolution of stride 2 and a pooling of stride 2.

    Args:
        stem_channels: Channels of the convolution.
        **kwargs: Arguments of :class:`DSNet`.
    """

    def __init__(self, stem_channels: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.patch_embeds[0] = nn.Sequential(
            nn.Conv2d(3, stem_channels, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(stem_channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(stem_channels, self.embed_dims[0], 1),
        )


@MODELS.register_module()
class ResNetWithPatchStem(ResNet):
    """ResNet behind a projection of patches of 4x4 pixels."""

    def _make_stem_layer(self, in_channels: int, stem_channels: int) -> None:
        super()._make_stem_layer(in_channels, stem_channels)
        self.conv1 = PatchEmbed(in_channels, stem_channels, patch_size=4)
        self.maxpool = nn.Identity()

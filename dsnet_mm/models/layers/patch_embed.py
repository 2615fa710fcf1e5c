"""Patch embedding: the stem of DS-Net, and what opens its stages (Table 1)."""

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn


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
        # The convolution ignores what is left of a patch at the end. A compiled or
        # exported graph pads always: it is one for all sizes.
        if torch.compiler.is_compiling() or any(side % p for side in x.shape[-2:]):
            x = F.pad(x, (0, p - 1, 0, p - 1))
        return self.projection(x)

"""DS-Net without the norms of its outputs, for the table of choices.

Configurations import this module by ``custom_imports``.
"""

from mmengine.registry import MODELS
from torch import nn

from dsnet_mm.models import DSNet


@MODELS.register_module()
class DSNetWithoutOutputNorm(DSNet):
    """DS-Net whose feature maps are those of its last blocks, without a norm.

    Args:
        **kwargs: Arguments of :class:`DSNet`.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for i in self.out_indices:
            setattr(self, f'norm{i}', nn.Identity())

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.registry import MODELS

from .ds_net import DSNet

MODELS.register_module(module=OpenCLIPEncoder)

__all__ = ['DSNet', 'OpenCLIPEncoder']

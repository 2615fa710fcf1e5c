"""CLIP and CLIP-Adapter as plain PyTorch modules, without OpenMMLab.

``dsnet_mm.models`` registers them for MMEngine.
"""

from .adapter import CLIPAdapter
from .encoder import OpenCLIPEncoder, TimmEncoder

__all__ = ['CLIPAdapter', 'OpenCLIPEncoder', 'TimmEncoder']

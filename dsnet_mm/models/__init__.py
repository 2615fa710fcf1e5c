from .backbones import DSNet, OpenCLIPEncoder
from .heads import CLIPAdapter
from .layers import DSBlock, InterScaleAlignment
from .necks import DSFPN

__all__ = [
    'DSFPN',
    'CLIPAdapter',
    'DSBlock',
    'DSNet',
    'InterScaleAlignment',
    'OpenCLIPEncoder',
]

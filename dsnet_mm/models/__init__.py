from dsnet_mm.environment import require

require('mmengine', 'mmcv', user='dsnet_mm.models')

from .adapted_detector import AdaptedDetector
from .backbones import DSNet, OpenCLIPEncoder
from .fuse import fuse_for_inference
from .heads import CLIPAdapter
from .layers import DSBlock, InterScaleAlignment
from .necks import DSFPN

__all__ = [
    'DSFPN',
    'AdaptedDetector',
    'CLIPAdapter',
    'DSBlock',
    'DSNet',
    'InterScaleAlignment',
    'OpenCLIPEncoder',
    'fuse_for_inference',
]

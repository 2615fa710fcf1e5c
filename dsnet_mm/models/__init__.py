from .backbones import DSNet
from .layers import DSBlock, InterScaleAlignment
from .necks import DSFPN

__all__ = ['DSFPN', 'DSBlock', 'DSNet', 'InterScaleAlignment']

from .ds_net import DSNet
from .open_clip_encoder import OpenCLIPEncoder

__all__ = ['DSNet', 'OpenCLIPEncoder']

"""DS-Net, DS-FPN and CLIP-Adapter for OpenMMLab."""

from .version import __version__

__all__ = ['__version__']

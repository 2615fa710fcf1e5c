"""DS-Net, DS-FPN and CLIP-Adapter for OpenMMLab."""

from typing import Any

from .version import __version__

__all__ = ['__version__', 'find_config', 'infer']


def __getattr__(name: str) -> Any:
    """Imports :func:`infer` and :func:`find_config` when they are first used."""
    if name == 'infer':
        from .inference import infer

        return infer
    if name == 'find_config':
        from dsnet_mm.engine.config import find_config

        return find_config
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

"""Heads of classifiers. mmpretrain is imported when CLIPAdapterHead is built."""

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.registry import MODELS

__all__ = ['CLIPAdapter']


def __getattr__(name: str) -> type:
    if name == 'CLIPAdapterHead':
        from .clip_adapter_head import CLIPAdapterHead

        return CLIPAdapterHead
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


@MODELS.register_module(name='CLIPAdapterHead')
def _build_clip_adapter_head(**kwargs):
    from .clip_adapter_head import CLIPAdapterHead

    return CLIPAdapterHead(**kwargs)

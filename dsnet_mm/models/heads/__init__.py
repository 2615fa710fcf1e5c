"""Heads. mmpretrain and mmdet are imported when one of their heads is built."""

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.registry import MODELS

__all__ = ['CLIPAdapter']


def __getattr__(name: str) -> type:
    if name == 'CLIPAdapterHead':
        from .clip_adapter_head import CLIPAdapterHead

        return CLIPAdapterHead
    if name == 'CLIPAdapterBBoxHead':
        from .clip_adapter_bbox_head import CLIPAdapterBBoxHead

        return CLIPAdapterBBoxHead
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


@MODELS.register_module(name='CLIPAdapterHead')
def _build_clip_adapter_head(**kwargs):
    from .clip_adapter_head import CLIPAdapterHead

    return CLIPAdapterHead(**kwargs)


@MODELS.register_module(name='CLIPAdapterBBoxHead')
def _build_clip_adapter_bbox_head(**kwargs):
    from .clip_adapter_bbox_head import CLIPAdapterBBoxHead

    return CLIPAdapterBBoxHead(**kwargs)

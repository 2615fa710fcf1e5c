"""Registry nodes of this package, children of MMEngine's root registries.

MMEngine imports this file by itself when a configuration names the scope, so
``type='dsnet_mm.DSNet'`` works in any mmdet or mmpretrain configuration
without ``custom_imports``.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='dsnet_mm',
    locations=['dsnet_mm.models'],
)

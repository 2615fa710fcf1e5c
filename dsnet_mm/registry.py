"""Registries of this package, children of MMEngine's root registries.

MMEngine imports this file when a configuration names the scope ``dsnet_mm``. So
``type='dsnet_mm.DSNet'`` works in any configuration, without ``custom_imports``.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='dsnet_mm',
    locations=['dsnet_mm.models'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='dsnet_mm',
    locations=['dsnet_mm.engine.hooks'],
)
METRICS = Registry(
    'metric',
    parent=MMENGINE_METRICS,
    scope='dsnet_mm',
    locations=['dsnet_mm.engine.metrics'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='dsnet_mm',
    locations=['dsnet_mm.engine.layer_decay'],
)
STRATEGIES = Registry(
    'strategy',
    parent=MMENGINE_STRATEGIES,
    scope='dsnet_mm',
    locations=['dsnet_mm.engine.fsdp'],
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='dsnet_mm',
    locations=['dsnet_mm.datasets.few_shot_dataset'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='dsnet_mm',
    locations=['dsnet_mm.datasets.loading'],
)

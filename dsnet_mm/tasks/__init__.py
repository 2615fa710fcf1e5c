"""Tasks: a data set with its class names and prompts.

This package is below models and datasets, which both use it.
"""

from .catalogue import PUBLIC_DATASETS
from .prompts import PROMPTS, check_class_names, resolve_prompts
from .splits import Item, Split, read_split
from .task import FewShotTask, load_task

__all__ = [
    'PROMPTS',
    'PUBLIC_DATASETS',
    'FewShotTask',
    'Item',
    'Split',
    'check_class_names',
    'load_task',
    'read_split',
    'resolve_prompts',
]

"""Data sets: splits, features and few-shot draws."""

from .catalogue import PUBLIC_DATASETS
from .splits import Item, Split, read_split, sample_few_shot
from .task import FewShotTask, load_task

__all__ = [
    'PUBLIC_DATASETS',
    'FewShotTask',
    'Item',
    'Split',
    'load_task',
    'read_split',
    'sample_few_shot',
]

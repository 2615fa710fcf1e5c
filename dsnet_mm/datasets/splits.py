"""Splits of a data set into train, val and test."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from .catalogue import SPLITS_SOURCE

Item = tuple[str, int, str]
"""Path, label and class name of an image."""

Split = dict[str, list[Item]]
"""Items of ``'train'``, ``'val'`` and ``'test'``."""


def read_split(split_file: str | Path) -> Split:
    """Reads a ``split_zhou_*.json`` file.

    Args:
        split_file: Path of the file.

    Returns:
        Its train, val and test items. Paths are as in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a split file.
    """
    split_file = Path(split_file)
    if not split_file.is_file():
        raise FileNotFoundError(
            f'there is no split file {split_file}; the files split_zhou_*.json come '
            f'from {SPLITS_SOURCE}.'
        )
    try:
        content = json.loads(split_file.read_text(encoding='utf-8'))
        return {
            name: [(str(path), int(label), str(cls)) for path, label, cls in items]
            for name, items in (
                (name, content[name]) for name in ('train', 'val', 'test')
            )
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{split_file} is not a split file: it must have lists of [path, label, '
            f'class name] under train, val and test ({error!r}).'
        ) from error


def group_by_label(items: Iterable[Item]) -> dict[int, list[Item]]:
    """Groups items by label, labels in the order of their first item."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(tuple(item))
    return groups


def split_within_classes(items: Iterable[Item]) -> Split:
    """Splits each class into 50 % train, 20 % val and 30 % test, as CoOp does.

    The split is the same in each call.

    Args:
        items: Items to split.

    Returns:
        The split.

    Raises:
        ValueError: If a class has fewer than two items.
    """
    split: Split = {'train': [], 'val': [], 'test': []}
    for group in group_by_label(items).values():
        if len(group) < 2:
            raise ValueError(
                f'class {group[0][2]!r} has {len(group)} image; at least two are '
                f'needed, one to train and one to test.'
            )
        group = random.Random(0).sample(group, len(group))
        train = max(1, len(group) // 2)
        val = train + len(group) // 5
        split['train'] += group[:train]
        split['val'] += group[train:val]
        split['test'] += group[val:]
    return split

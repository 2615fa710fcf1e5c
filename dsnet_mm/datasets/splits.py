"""Splits of a data set into train, val and test, and few-shot draws."""

import random
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsnet_mm.files import read_json

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
    content, split = read_json(split_file), {}
    for part in ('train', 'val', 'test'):
        items = content.get(part) if isinstance(content, dict) else None
        listed = items if isinstance(items, list) else [items]
        wrong = [x for x in listed if not _is_item(x)]
        if wrong:
            raise ValueError(
                f'{split_file} is not a split file: it must have lists of [path, '
                f'label, class name] under train, val and test, and {part} has '
                f'{reprlib.repr(wrong[0])}.'
            )
        split[part] = [tuple(item) for item in listed]
    return split


def _is_item(item: object) -> bool:
    return isinstance(item, list) and [*map(type, item)] == [str, int, str]


def sample_few_shot(
    split_file: str | Path | Mapping[str, Sequence[Item]], shots: int, seed: int
) -> Split:
    """Draws the few-shot training and validation sets of CoOp.

    The items are those of ``generate_fewshot_dataset`` in CoOp's code. All classes
    share one random number generator. Classes are drawn in the order of their first
    item, and train is drawn before val.

    Args:
        split_file: Path of a ``split_zhou_*.json`` file, or a split.
        shots: Training images of each class.
        seed: Seed of the draw. The papers use 1, 2 and 3.

    Returns:
        ``'train'``: ``shots`` items of each class; ``'val'``: ``min(shots, 4)``
        items of each class, or all of them if a class has fewer.

    Raises:
        TypeError: If ``shots`` or ``seed`` is not an integer.
        ValueError: If ``shots`` is below 1, or a class has fewer training images.
        FileNotFoundError: If the file does not exist.
    """
    for what, value in (('shots', shots), ('seed', seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f'{what} must be an integer, got {value!r}.')
    if shots < 1:
        raise ValueError(f'shots must be at least 1, got {shots}.')
    split = split_file if isinstance(split_file, Mapping) else read_split(split_file)
    train, val = _group_by_label(split['train']), _group_by_label(split['val'])
    for items in train:
        if len(items) < shots:
            raise ValueError(
                f'class {items[0][2]!r} has {len(items)} training images, fewer '
                f'than the {shots} shots asked for; use fewer shots or add images.'
            )
    rng = random.Random(seed)
    return {
        'train': [x for items in train for x in rng.sample(items, shots)],
        'val': [
            x for items in val for x in rng.sample(items, min(shots, 4, len(items)))
        ],
    }


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
    for group in _group_by_label(items):
        if len(group) < 2:
            raise ValueError(
                f'class {group[0][2]!r} has one image; at least two are needed.'
            )
        group = random.Random(0).sample(group, len(group))
        train = max(1, len(group) // 2)
        val = train + len(group) // 5
        split['train'] += group[:train]
        split['val'] += group[train:val]
        split['test'] += group[val:]
    return split


def _group_by_label(items: Iterable[Item]) -> list[list[Item]]:
    """Groups items by label, labels in the order of their first item."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(tuple(item))
    return list(groups.values())

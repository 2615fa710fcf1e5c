"""Few-shot draws of CoOp."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from .splits import Item, group_by_label, read_split


def sample_few_shot(
    split_file: str | Path | Mapping[str, Sequence[Item]], shots: int, seed: int
) -> dict[str, list[Item]]:
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
    train, val = group_by_label(split['train']), group_by_label(split['val'])
    for items in train.values():
        if len(items) < shots:
            raise ValueError(
                f'class {items[0][2]!r} has {len(items)} training images, fewer '
                f'than the {shots} shots asked for; use fewer shots or add images.'
            )
    rng = random.Random(seed)
    return {
        'train': [x for items in train.values() for x in rng.sample(items, shots)],
        'val': [
            x
            for items in val.values()
            for x in rng.sample(items, min(shots, 4, len(items)))
        ],
    }

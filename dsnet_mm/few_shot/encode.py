"""Encoding of a data set into a file of features, by one or several processes."""

import hashlib
import json
import os
from pathlib import Path

from dsnet_mm.datasets import FewShotTask
from dsnet_mm.datasets.feature_file import FeatureFile, read_feature_file
from dsnet_mm.datasets.features import image_keys

from .config import FewShotConfig
from .methods.base import CROPS
from .sources import (
    collect_draws,
    encode_parts,
    load_train_task,
    open_cache,
)

SEED = 1
"""Seed of the draws in a file."""


def encode(
    config: FewShotConfig,
    out: str | Path,
    shots: tuple[int, ...] | None = None,
    share: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> int:
    """Encodes a data set into a file, see :class:`FeatureFile`.

    Each process encodes its share into the cache. The process that finds everything
    there writes the file. A call with the same arguments continues an interrupted one,
    with any number of processes. If the file is complete, nothing is done.

    Args:
        config: Data set, encoder and options of the features. A file has one
            ``crop_scale``; None is (0.08, 1).
        out: File to write.
        shots: Parts ``train_<shots>`` of the file, drawn with seed 1. None encodes all
            training images, as the part ``train``.
        share: Number of this process and number of processes.
        quiet: Whether to hide the bars.

    Returns:
        Number of images that other processes have not encoded yet. If it is 0, the
        file is written.

    Raises:
        FileExistsError: If the file exists and has other content.
        FileNotFoundError: If an image or the weights are missing.
        ValueError: If the data set has too few images, an image cannot be read, or a
            test image is also a training or validation image.
    """
    task = load_train_task(config)
    parts, views = task.split, config.views
    if shots is not None:
        draws = collect_draws(task, [(k, SEED) for k in shots])
        parts = {**draws, 'val': task.split['val']}
    cache = open_cache(config, quiet)
    encoder = cache.encoder
    about = {
        'dataset': task.name,
        'model': str(config.model),
        'pretrained': config.pretrained or '',
        'identity': json.dumps(encoder.identity()),
        'preprocessing': config.preprocessing,
        'prompts': json.dumps(list(task.prompts)),
        'views': str(views),
        'crop_scale': json.dumps(config.crop_scale or CROPS),
        'text_length': f'{config.text_length or encoder.text_length:.4g}',
        'shots': json.dumps(shots),
        'pictures': _hash_images(task),
    }
    if Path(out).exists():
        known = {'text_length': about['text_length']}  # not in older files
        if known | read_feature_file(out).about != about:
            raise FileExistsError(
                f'{out} exists, with other content; choose another file, or remove it.'
            )
        return 0
    # Plain features are for cross-validation.
    if missing := encode_parts(task, cache, parts, views, True, share):
        return missing
    train, val = parts['train'], parts['val']
    draws = {None: train}
    if shots is not None:
        draws = {k: collect_draws(task, [(k, SEED)])['train'] for k in shots}
    drawn = {k: cache.images(items, views) for k, items in draws.items()}
    for k, part in drawn.items():
        if k is not None and len(part) < len(draws[k]):
            raise ValueError(
                f'{len(draws[k]) - len(part)} images of the draw of {k} shots cannot '
                f'be read; remove them from {task.name}.'
            )
    text = None
    if cache.encoder.tokenizer is not None:
        text = cache.texts(task.class_names, task.prompts)
    elif config.class_rows is not None:
        text = cache.encoder.encode_classes(task.class_names, (), config.class_rows)
    FeatureFile(
        text,
        task.class_names,
        encoder.logit_scale,
        drawn,
        cache.images(val) if val else None,
        cache.images(parts['test']),
        {k: cache.images(items) for k, items in draws.items()} if views else {},
        about,
    ).write(out)
    return 0


def _hash_images(task: FewShotTask) -> str:
    keys = {part: image_keys(items) for part, items in task.split.items()}
    return hashlib.sha256(json.dumps([keys, task.class_names]).encode()).hexdigest()


def share_of_torchrun() -> tuple[int, int]:
    """Returns number of this process and number of processes, as torchrun sets them."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))

"""Checks that the data of a configuration exists before a run starts."""

import os
from collections.abc import Sequence

from mmengine.config import Config

from .config import dicts_in

# Data sets of mmpretrain that download themselves into their data_root.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Checks that the files and folders of data sets and evaluators exist.

    Addresses with ``://`` and data behind ``backend_args`` are not checked.

    Args:
        cfg: Configuration.
        splits: Those of ``'train'``, ``'val'`` and ``'test'`` that are used.

    Raises:
        FileNotFoundError: If one is missing.
    """
    for split in splits:
        for part in (f'{split}_dataloader', f'{split}_evaluator'):
            for node in dicts_in(cfg.get(part)):
                if not node.get('backend_args'):
                    _check_paths(node, part)


def _check_paths(node: dict, part: str) -> None:
    """Checks folder, annotations and pictures of one data set or evaluator."""
    root = node.get('data_root') or ''
    kind = node.get('type', '')
    kind = kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__
    if kind in DOWNLOADED or '://' in root:
        return
    ann_file = node.get('ann_file') or ''
    prefixes = node.get('data_prefix') or ''
    if isinstance(prefixes, str):
        # ImageNet reads the folder with the name of its split.
        prefixes = [prefixes or (node.get('split', '') if kind == 'ImageNet' else '')]
    else:
        prefixes = list(prefixes.values())

    inside = [os.path.expanduser(path) for path in (ann_file, *prefixes) if path]
    for path in dict.fromkeys((root, *(os.path.join(root, path) for path in inside))):
        if path and '://' not in path and not os.path.exists(path):
            raise FileNotFoundError(
                f'{part}: there is no {path}; {kind} reads '
                f'{" and ".join(inside) or "pictures"}{root and " in " + root}, and '
                f'--cfg-options data_root=PATH moves all data sets and evaluators'
            )

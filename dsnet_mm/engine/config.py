"""Loads a configuration, applies the options of the command line, checks its files."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.datasets.coco import check_class_order, read_coco
from dsnet_mm.files import check_file

SCOPES = ('mmdet', 'mmpretrain')

TASK = 'DSNET_MM_TASK'
"""Environment variable with the data set of the configurations of CLIP-Adapter."""


def find_config(name: str | Path) -> str:
    """Finds a configuration, also one of this package by its name.

    Args:
        name: Path of a configuration file, or name of one of this package with or
            without ``.py``, such as ``'mask_rcnn_dsnet_s_coco'``. The package has
            them in its wheel and in its repository.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: If there is none.
    """
    if os.path.isfile(name):
        return str(name)
    package = Path(__file__).parents[1]
    folder = package / '.mim' / 'configs'
    if not folder.is_dir():
        folder = package.parent / 'configs'
    own = {
        path.stem: str(path)
        for path in sorted(folder.rglob('*.py'))
        if path.parent.name != '_base_'
    }
    stem = str(name).removesuffix('.py')
    if stem in own:
        return own[stem]
    old = re.fullmatch(r'(clip-adapter_(?:rn50|vit-b16))_(\w+)', os.path.basename(stem))
    if old:
        task = re.sub('_(images|pictures)$', '', old[2])
        new = old[1] + '_images' * (task != old[2])
        raise FileNotFoundError(
            f'{name} is called {new} now, with --cfg-options task={task}'
        )
    close = difflib.get_close_matches(stem, own) or ['mask_rcnn_dsnet_s_coco']
    raise FileNotFoundError(
        f'there is no configuration file {name}; give the path of one, or the name '
        f'of one of this package, such as {" or ".join(close)}'
    )


def read_config(path: str | Path, task: str | None = None) -> Config:
    """Reads a configuration, for a data set if it has a choice of them.

    Args:
        path: Configuration file, or name of one (see :func:`find_config`).
        task: Data set, see :func:`dsnet_mm.datasets.load_task`. None leaves it to the
            configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the configuration has no choice of data sets.
    """
    file, before = find_config(path), os.environ.get(TASK)
    if task is None:
        return Config.fromfile(file)
    os.environ[TASK] = str(task)
    try:
        cfg = Config.fromfile(file)
    finally:
        del os.environ[TASK]
        if before is not None:
            os.environ[TASK] = before
    if cfg.get('task') != str(task):
        raise ValueError(
            f'{path} has no choice of data sets, so it does not take task={task}; '
            f'clip-adapter_rn50 and clip-adapter_vit-b16 have one'
        )
    return cfg


def load_config(path: str, options: dict[str, Any]) -> Config:
    """Loads a configuration of mmdet or mmpretrain.

    Args:
        path: Configuration file, or name of one (see :func:`find_config`).
        options: Values to set, by dotted name. ``task`` chooses a data set (see
            :func:`read_config`), and ``data_root`` moves the data (see
            :func:`set_data_root`), before the others are merged.

    Returns:
        The configuration. Data loaders of mmpretrain have the defaults that
        its tools give them: ``default_collate`` and persistent workers.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of neither code base, or has no ``data_root``.
    """
    options = dict(options)
    cfg = read_config(path, options.pop('task', None))
    if 'data_root' in options:
        set_data_root(cfg, options.pop('data_root'))
    cfg.merge_from_dict(options)

    scope = cfg.get('default_scope')
    if scope not in SCOPES:
        raise ValueError(
            f'{path} has default_scope={scope!r}; these tools run configurations '
            f'with one of {SCOPES}'
        )
    if scope == 'mmpretrain':
        for split in ('train', 'val', 'test'):
            if loader := cfg.get(f'{split}_dataloader'):
                loader.setdefault('collate_fn', dict(type='default_collate'))
                loader.setdefault('pin_memory', get_device() != 'cpu')
                loader.setdefault(
                    'persistent_workers', loader.get('num_workers', 0) > 0
                )
    return cfg


def set_data_root(cfg: Config, root: str) -> None:
    """Moves the data sets and evaluators of a configuration to another folder.

    In a loaded configuration the old ``data_root`` is already part of other
    values, such as an evaluator's ``ann_file``. The new folder replaces it in
    every string of the data loaders and evaluators that is the old folder or
    a path inside it.

    Args:
        cfg: Configuration, changed in place.
        root: The new folder, with or without a slash at its end.

    Raises:
        ValueError: If the data sets do not have one ``data_root`` in common.
    """
    splits = ('train', 'val', 'test')
    olds = {
        node['data_root'].rstrip('/')
        for split in splits
        for node in dicts_in(cfg.get(f'{split}_dataloader'))
        if node.get('data_root')
    }
    if cfg.get('data_root'):
        olds &= {cfg.data_root.rstrip('/')}
    if len(olds) != 1:
        raise ValueError(
            f'data_root={root} replaces the one folder that the data sets share, and '
            f'here it is {sorted(olds) or "none"}; set it for each, as in '
            f'train_dataloader.dataset.data_root={root}'
        )
    (old,) = olds
    new = os.path.expanduser(root).rstrip('/')
    for split in splits:
        for name in (f'{split}_dataloader', f'{split}_evaluator'):
            if cfg.get(name):
                cfg[name] = _moved(cfg[name], old, new)
    cfg.data_root = new + '/'


def dicts_in(node: Any) -> Iterator[dict]:
    """Yields all dicts in a part of a configuration, the outer ones first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from dicts_in(value)


def _moved(node: Any, old: str, new: str) -> Any:
    """Returns a copy of a part of a configuration with another folder in its paths."""
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, old, new) for value in node)
    if isinstance(node, str) and (node == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node


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
    """Checks folder, annotations and images of one data set or evaluator."""
    root, kind = node.get('data_root') or '', _kind_of(node)
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
                f'{" and ".join(inside) or "images"}{root and " in " + root}, and '
                f'--cfg-options data_root=PATH moves all data sets and evaluators'
            )


def _kind_of(node: dict) -> str:
    kind = node.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def check_classes(cfg: Config, splits: Sequence[str]) -> None:
    """Checks the classes of data sets in COCO's format.

    Args:
        cfg: Configuration.
        splits: Those that are used.

    Raises:
        ValueError: If a label has another name in the annotation file than in the
            configuration, or a head of the model has too few classes.
    """
    for part, node, path in coco_files(cfg, splits):
        from mmdet.datasets import CocoDataset

        classes = CocoDataset._load_metainfo(node.get('metainfo'))['classes']
        check_class_order(path, classes)
        if len(classes) > (most := most_classes(cfg)):
            raise ValueError(
                f'{part} has {len(classes)} classes, and a head of the model has '
                f'num_classes={most}; set it in each head'
            )


def coco_files(cfg: Config, splits: Sequence[str]) -> Iterator[tuple[str, dict, str]]:
    """Yields the data sets in COCO's format: data loader, data set, annotation file."""
    for part in (f'{split}_dataloader' for split in splits):
        for node in dicts_in(cfg.get(part)):
            path = os.path.join(node.get('data_root') or '', node.get('ann_file') or '')
            if _kind_of(node) == 'CocoDataset' and os.path.isfile(path):
                yield part, node, path


@contextmanager
def building_data(cfg: Config, splits: Sequence[str]) -> Iterator[None]:
    """Names the annotation file that is wrong if data sets cannot be built.

    mmdet reads it without a check.

    Raises:
        ValueError: If there is such a file.
    """
    try:
        yield
    except Exception as error:
        for _, _, path in coco_files(cfg, splits):
            _, wrong = read_coco(path)
            if wrong:
                raise ValueError(
                    f'{path} is not as COCO files are: {wrong[0]}; tools/check_data.py '
                    f'names all errors'
                ) from error
        raise


def most_classes(cfg: Config) -> float:
    """Returns how many classes all heads of the model have, or infinity."""
    counts = [
        head['num_classes']
        for node in dicts_in(cfg.model)
        for name in ('bbox_head', 'mask_head', 'head')
        for head in dicts_in(node.get(name))
        if isinstance(head.get('num_classes'), int) and not head.get('class_agnostic')
    ]
    return min(counts, default=math.inf)


def check_pretrained(cfg: Config) -> None:
    """Checks the checkpoints that weights are initialised from (``init_cfg``).

    Args:
        cfg: Configuration.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged or not safe to load.
    """
    for node in dicts_in(cfg.model):
        # None keeps a place for one, see DSNet.
        if node.get('type') == 'Pretrained' and node['checkpoint'] is not None:
            check_file(
                node['checkpoint'],
                'checkpoint',
                'the model starts from it (init_cfg); put it there or change the path '
                'by --cfg-options, as in model.backbone.init_cfg.checkpoint=PATH',
            )
            if '://' not in node['checkpoint']:
                read_checkpoint(node['checkpoint'])

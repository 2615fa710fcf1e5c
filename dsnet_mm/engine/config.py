"""What the command-line tools share: configurations, data and checkpoints."""

import argparse
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

SCOPES = ('mmdet', 'mmpretrain')

# Data sets of mmpretrain that download themselves into their data_root.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')


class CfgOptions(DictAction):
    """MMEngine's KEY=VALUE options, with a sentence for what is not one.

    MMEngine drops blanks from values and splits them at commas; ``data_root``
    is a path and stays as it is.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)
        for value in values:
            key, _, text = value.partition('=')
            if key == 'data_root':
                getattr(namespace, self.dest)[key] = text


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``config`` and ``--cfg-options``."""
    parser.add_argument('config', help='configuration file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='set values of the configuration, such as train_dataloader.batch_size=4; '
        'data_root=PATH moves all data sets and evaluators to that folder',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--work-dir``, ``--launcher`` and ``--local-rank``."""
    parser.add_argument(
        '--work-dir', help='folder of results (default: work_dirs/<configuration>)'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help='comes from torch.distributed.launch; torchrun does without',
    )


@contextmanager
def user_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns what this module raises into a sentence on stderr and exit code 2."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def load_config(path: str, options: dict[str, Any]) -> Config:
    """Loads a configuration of mmdet or mmpretrain.

    Args:
        path: Configuration file.
        options: Values to set, by dotted name. ``data_root`` moves the data
            (see :func:`set_data_root`) before the others are merged.

    Returns:
        The configuration. Data loaders of mmpretrain have the defaults that
        its tools give them: ``default_collate``, and workers that stay.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of neither code base, or has no ``data_root``.
    """
    check_file(path, 'configuration file', 'give the path of one')
    cfg = Config.fromfile(path)
    options = dict(options)
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
    values, such as an evaluator's ``ann_file``. So the new one takes its place
    in every string of the data loaders and evaluators that is the old folder
    or lies in it.

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
        for node in _dicts(cfg.get(f'{split}_dataloader'))
        if node.get('data_root')
    }
    if cfg.get('data_root'):
        olds &= {cfg.data_root.rstrip('/')}
    if len(olds) != 1:
        raise ValueError(
            f'data_root={root} takes the place of the one folder that the data sets '
            f'share, and here it is {sorted(olds) or "none"}; set it for each, as in '
            f'train_dataloader.dataset.data_root={root}'
        )
    (old,) = olds
    new = os.path.expanduser(root).rstrip('/')
    for split in splits:
        for name in (f'{split}_dataloader', f'{split}_evaluator'):
            if cfg.get(name):
                cfg[name] = _moved(cfg[name], old, new)
    cfg.data_root = new + '/'


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Sets working directory and launcher from the arguments of a tool.

    MMEngine gives every process of torchrun a CUDA device. Without GPUs the
    process group is opened here, and the model is wrapped without a device.

    Args:
        cfg: Configuration, changed in place.
        args: What the arguments of :func:`add_run_arguments` were set to.

    Raises:
        ValueError: If there are no GPUs for the backend of the process group.
    """
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)

    cfg.launcher = args.launcher
    if args.launcher != 'pytorch':
        return
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if get_device() == 'cpu':
        backend = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('backend', 'nccl')
        if backend == 'nccl':
            raise ValueError(
                'the backend nccl needs GPUs and there are none; use '
                '--cfg-options env_cfg.dist_cfg.backend=gloo'
            )
        torch.distributed.init_process_group(backend)
        wrapper = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        cfg.model_wrapper_cfg = wrapper | (cfg.get('model_wrapper_cfg') or {})


def end_run() -> None:
    """Closes the process group, if there is one.

    Its threads would otherwise abort a process that exits while another one
    still talks to it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Looks whether the files and folders of data sets and evaluators exist.

    Addresses with ``://`` and data behind ``backend_args`` are not looked at.

    Args:
        cfg: Configuration.
        splits: Those of ``'train'``, ``'val'`` and ``'test'`` that are used.

    Raises:
        FileNotFoundError: If one is missing.
    """
    for split in splits:
        for part in (f'{split}_dataloader', f'{split}_evaluator'):
            for node in _dicts(cfg.get(part)):
                if not node.get('backend_args'):
                    _check_paths(node, part)


def check_pretrained(cfg: Config) -> None:
    """Looks whether the checkpoints that weights are initialised from exist.

    Args:
        cfg: Configuration.

    Raises:
        FileNotFoundError: If one is missing.
    """
    for node in _dicts(cfg.model):
        # None keeps a place for one, see DSNet.
        if node.get('type') == 'Pretrained' and node['checkpoint'] is not None:
            check_file(
                node['checkpoint'],
                'checkpoint',
                'the model starts from it (init_cfg); put it there or change the path '
                'by --cfg-options, as in model.backbone.init_cfg.checkpoint=PATH',
            )


def check_file(path: str, what: str, advice: str) -> None:
    """Looks whether a file exists; addresses with ``://`` are not looked at.

    Args:
        path: The file.
        what: What it is, for the message.
        advice: What to do when it is missing, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if '://' not in path and not os.path.isfile(path):
        raise FileNotFoundError(f'there is no {what} {path}; {advice}')


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several GPUs and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def load_checkpoint(model: nn.Module, path: str) -> dict[str, Any]:
    """Loads a checkpoint of MMEngine that fits a model exactly.

    Only counters of batch norms (``num_batches_tracked``) may be missing.

    Args:
        model: The model, wrapped or not, see :func:`unwrap`.
        path: Checkpoint file, or an address that MMEngine knows.

    Returns:
        The whole checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one of another model.
    """
    check_file(path, 'checkpoint', 'give the path of a .pth file that training wrote')
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f'{path} cannot be read as a checkpoint; it is damaged or something else'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, no state dict')
    state = checkpoint.get('state_dict', checkpoint)
    consume_prefix_in_state_dict_if_present(state, 'module.')
    differing = []
    try:
        missing, unexpected = unwrap(model).load_state_dict(state, strict=False)
    except RuntimeError as error:  # the shapes; PyTorch names them in lines
        missing, unexpected = [], []
        differing = [line.strip() for line in str(error).splitlines()[1:]]
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    problems = [
        f'{len(keys)} tensors {what}, for example {keys[0]}'
        for keys, what in (
            (differing, 'have another shape'),
            (missing, 'are missing'),
            (unexpected, 'are unknown to the model'),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f'{path} does not fit the model of this configuration: '
            f'{"; ".join(problems)}; use the configuration it was trained with'
        )
    return checkpoint


def _dicts(node: Any) -> Iterator[dict]:
    """All dicts in a part of a configuration."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            yield from _dicts(value)


def _moved(node: Any, old: str, new: str) -> Any:
    """A copy of a part of a configuration with another folder in its paths."""
    if isinstance(node, dict):
        return {key: _moved(value, old, new) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, old, new) for value in node)
    if isinstance(node, str) and (node == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node


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

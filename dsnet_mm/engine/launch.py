"""Arguments, working directory and processes of the tools."""

import argparse
import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device


class CfgOptions(DictAction):
    """MMEngine's KEY=VALUE options, with an error for what is not one.

    MMEngine removes blanks from values and splits them at commas.
    ``data_root`` is a path and is kept as it is.
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


class OldFlag(argparse.Action):
    """The old name of a flag: it sets the flag, with a warning.

    Args:
        new: The name of today, such as ``'--no-images'``.
    """

    def __init__(self, option_strings: list[str], dest: str, new: str) -> None:
        super().__init__(
            option_strings,
            dest=new.lstrip('-').replace('-', '_'),
            nargs=0,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        self.new = new

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        print(f'Warning: {option_string} is called {self.new} now.', file=sys.stderr)
        setattr(namespace, self.dest, True)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``config`` and ``--cfg-options``."""
    parser.add_argument(
        'config', help='configuration file, or name of one of this package'
    )
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


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--trust-checkpoint``."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that can run programs; for old files of your own',
    )


@contextmanager
def user_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns errors of files and values into a sentence and exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Sets working directory and launcher from the arguments of a tool.

    MMEngine gives every process of torchrun a CUDA device. Without GPUs the
    process group is opened here, and the model is wrapped without a device.

    Args:
        cfg: Configuration, changed in place.
        args: The parsed arguments of :func:`add_run_arguments`.

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
    """Ends a process of a distributed run, after Python's exit handlers.

    The destructors that follow are left out. Now and then they abort one of
    the processes of a group ("terminate called without an active exception"),
    and torchrun then reports that the run has failed. In a run of one process
    this function does nothing.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

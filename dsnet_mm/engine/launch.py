"""Arguments, working directory and processes of the tools."""

import argparse
import atexit
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device

TIMEOUT = 1800
"""Seconds that a process waits for others, and for a batch of its workers."""

RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
"""Environment variables in which a launcher numbers its processes."""


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
    """Turns errors of files, values and names into a sentence and exit code 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyError as error:
        if not (sentence := unknown_type(error)):
            raise
        parser.error(sentence)


def unknown_type(error: KeyError) -> str | None:
    """Returns MMEngine's sentence about a type that no registry has, or None."""
    sentence = str(error.args[0] if error.args else '')
    return sentence.partition(' More details')[0] if ' registry. ' in sentence else None


def is_first_process(launcher: str) -> bool:
    """Tells whether this is the process with rank 0, also before they are connected."""
    return os.environ.get(RANKS.get(launcher, ''), '0') == '0'


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Sets working directory and launcher from the arguments of a tool, and time-outs.

    MMEngine gives every process of torchrun a CUDA device. Without GPUs the
    process group is opened here, and the model is wrapped without a device.

    Args:
        cfg: Configuration, changed in place.
        args: The parsed arguments of :func:`add_run_arguments`.

    Raises:
        ValueError: If the working directory cannot be written to, or there are no GPUs
            for the backend of the process group.
    """
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise ValueError(
            f'the working directory {cfg.work_dir} cannot be written to '
            f'({error.strerror}); choose another --work-dir'
        ) from error

    for split in ('train', 'val', 'test'):
        if (loader := cfg.get(f'{split}_dataloader')) and loader.get('num_workers'):
            loader.setdefault('timeout', TIMEOUT)
    cfg.launcher = args.launcher
    if args.launcher == 'none':
        return
    dist_cfg = dict(timeout=TIMEOUT) | cfg.get('env_cfg', {}).get('dist_cfg', {})
    cfg.merge_from_dict({'env_cfg.dist_cfg': dist_cfg})
    if args.launcher != 'pytorch':
        return
    if torch.distributed.is_torchelastic_launched():
        end_with_parent()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if get_device() == 'cpu':
        backend = dist_cfg.get('backend', 'nccl')
        if backend == 'nccl':
            raise ValueError(
                'the backend nccl needs GPUs and there are none; use '
                '--cfg-options env_cfg.dist_cfg.backend=gloo'
            )
        torch.distributed.init_process_group(
            backend, timeout=timedelta(seconds=dist_cfg['timeout'])
        )
        wrapper = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        cfg.model_wrapper_cfg = wrapper | (cfg.get('model_wrapper_cfg') or {})


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, on Linux."""
    if sys.platform == 'linux':
        parent_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)


def end_run(code: int = 0) -> None:
    """Ends a process of a distributed run, after Python's exit handlers.

    The destructors that follow are left out. Now and then they abort one of
    the processes of a group ("terminate called without an active exception"),
    and torchrun then reports that the run has failed. In a run of one process
    this function does nothing, if the exit code is 0.

    Args:
        code: Exit code.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)

"""Working directory and processes of a run."""

import argparse
import atexit
import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device


def set_run(cfg: Config, args: argparse.Namespace) -> None:
    """Sets working directory and launcher from the arguments of a tool.

    MMEngine gives every process of torchrun a CUDA device. Without GPUs the
    process group is opened here, and the model is wrapped without a device.

    Args:
        cfg: Configuration, changed in place.
        args: The parsed arguments of :func:`.arguments.add_run_arguments`.

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

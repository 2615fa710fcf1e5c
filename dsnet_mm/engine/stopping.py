"""Signals that stop a training, and processes that end with it."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from math import ceil
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader, Sampler

from dsnet_mm.engine.launch import end_with_parent
from dsnet_mm.engine.resume import POINTER, STOPPED
from dsnet_mm.files import write_atomic


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGUSR1 in a list, for :class:`StopHook`.

    A second SIGTERM ends the process at once.
    """
    received: list[int] = []

    def receive(number: int, _: Any) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [(number, signal.signal(number, receive)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class TrainingStopped(Exception):
    """A signal stopped the training."""


class StopHook(Hook):
    """Saves a checkpoint and ends the training after a signal.

    The checkpoint is ``stopped.pth``. It may be in the middle of an epoch, which
    MMEngine resumes from its beginning. This hook leaves out the batches that were
    trained.

    Several processes agree every tenth iteration. Gradients that are still accumulated
    are not lost, because the training goes on to the next step of the optimizer.

    Args:
        signals: The signals that this process received.

    Raises:
        TrainingStopped: After the iteration, in all processes.
    """

    priority = 'LOWEST'

    def __init__(self, signals: list[int]) -> None:
        self._signals = signals
        self._skip = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Reads how many batches of an epoch were trained."""
        if runner._resume:
            self._skip = checkpoint['meta'].get('batches', 0)

    def before_train_epoch(self, runner: Runner) -> None:
        """Leaves out these batches."""
        self._start, loader = runner.iter - self._skip, runner.train_loop.dataloader
        if self._skip:
            # The data loader does not allow this after its start. It has not started.
            batches = _SkippingOnce(loader.batch_sampler, self._skip)
            object.__setattr__(loader, 'batch_sampler', batches)
        self._skip = 0

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Stops the training if one of the processes received a signal."""
        every = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        every *= 10 if get_world_size() > 1 else 1
        if (runner.iter + 1) % every:
            return
        asked = torch.tensor(len(self._signals))
        all_reduce(asked, 'max')
        if not asked:
            return
        # The loop by iterations leaves out batches itself.
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        meta = dict(batches=runner.iter + 1 - self._start) if by_epoch else {}
        saved = 'no checkpoint, as the configuration has none'
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                saved = os.path.join(hook.out_dir, STOPPED)
                runner.save_checkpoint(
                    hook.out_dir,
                    STOPPED,
                    hook.file_client_args,
                    meta=meta,
                    by_epoch=False,
                    backend_args=hook.backend_args,
                )
                if is_main_process():
                    write_atomic(Path(runner.work_dir, POINTER), saved)
                break
        barrier()  # the end of one process may end the others
        name = signal.Signals(self._signals[0]).name if self._signals else 'a signal'
        raise TrainingStopped(
            f'{name} after iteration {runner.iter + 1}; {saved} is written, and '
            f'--resume goes on from it'
        )


class _SkippingOnce(Sampler):
    """Leaves out the first batches the first time."""

    def __init__(self, batches: Sampler, skip: int) -> None:
        self._batches, self._skip = batches, skip
        self.sampler = getattr(batches, 'sampler', None)

    def __iter__(self) -> Iterator[list[int]]:
        # A data loader makes two iterators and uses one.
        skip, self._skip = self._skip, 0
        yield from islice(self._batches, skip, None)

    def __len__(self) -> int:
        return len(self._batches)


class WorkerHook(Hook):
    """Ends data workers with this process, however it ends, and one that hangs.

    PyTorch's workers look for their parent only while they wait for work. One that
    waits to hand over a batch never ends. The signals that stop a training are ignored
    by workers, because Slurm sends them to all processes.
    """

    def __init__(self) -> None:
        atexit.register(end_workers)

    def before_train(self, runner: Runner) -> None:
        """Sets what workers for training and validation begin with."""
        for loop in (runner.train_loop, runner.val_loop):
            self._set(loop)

    def before_test(self, runner: Runner) -> None:
        """Sets what workers for testing begin with."""
        self._set(runner.test_loop)

    def _set(self, loop: Any) -> None:
        if loop is None or not loop.dataloader.num_workers:
            return
        loader = loop.dataloader
        loader.worker_init_fn = partial(
            _start_worker, os.getpid(), loader.worker_init_fn
        )
        if type(loader) is DataLoader:
            loader.__class__ = _TimedLoader


class _TimedLoader(DataLoader):
    """Gives up after ``timeout`` seconds without a batch.

    PyTorch does so only while it waits for a message of a worker. It then asks the
    worker for the memory of the batch, and one that is stopped never answers.
    """

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        while True:
            before = signal.signal(signal.SIGALRM, self._give_up)
            signal.alarm(ceil(self.timeout))
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                # PyTorch tells that a worker ended, by an error of its handler of
                # SIGCHLD, but perhaps not before this one.
                wait([worker.sentinel for worker in batches._workers], 5)
                raise RuntimeError('DataLoader worker does not answer') from error
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
            yield batch

    def _give_up(self, *args: Any) -> None:
        raise RuntimeError(f'DataLoader timed out after {self.timeout} seconds')


def _start_worker(parent: int, init: Callable | None, worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    if multiprocessing.get_start_method() == 'fork' and os.getppid() != parent:
        os._exit(1)  # it ended before
    if init:
        init(worker)


def end_workers() -> None:
    """Kills all workers. Python would wait for those that are stopped or hang."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, before)

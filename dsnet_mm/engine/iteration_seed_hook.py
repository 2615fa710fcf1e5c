"""Random numbers that do not depend on where a training was interrupted."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader, get_worker_info

from dsnet_mm.registry import HOOKS

LOADING, STEP = range(2)


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds every batch and every training step by its number.

    The random numbers of an iteration depend on the seed of the run, the rank
    of the process and the number of the iteration, and on nothing else. A
    resumed training therefore draws the same numbers as one that was never
    interrupted. No state of a generator is stored.

    - A worker is seeded before it loads a batch. Without workers, the main
      process is.
    - The main process is seeded before each training step.

    Python's ``random``, NumPy and PyTorch are seeded. The number of workers
    makes no difference.

    The order of the data comes from the samplers of MMEngine, which depend on
    the seed of the run. The resumed training needs the same
    ``randomness.seed``; ``tools/train.py --resume`` takes it from the
    checkpoint. It also needs the same batch size and number of processes. In
    iteration-based training MMEngine must be able to skip batches, as 0.10.12
    is, with a sampler that skips (InfiniteSampler) or by the steps of one that
    has epochs (DefaultSampler). 0.10.7 is not.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Makes the data loader seed its workers."""
        loader = runner.train_loop.dataloader
        self._key = (runner.seed, get_rank())
        self.loading = _LoadingSeeds(loader, self._key)
        loader.worker_init_fn = self.loading.start_worker
        loader.collate_fn = self.loading.collate
        # Its iterator would otherwise draw from the generator of the main process.
        loader.generator = torch.Generator().manual_seed(runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the loading of the first batch."""
        self._seed_loading(runner, runner.iter)
        if hasattr(runner.train_loop, 'dataloader_iterator') and (
            self.loading.batches_per_epoch
        ):
            # A sampler that cannot skip: the loop first loads all earlier batches.
            self.loading.next_batch = 0

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Seeds the training step."""
        _seed(*self._key, STEP, runner.iter)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Seeds the loading of the next batch."""
        self._seed_loading(runner, runner.iter + 1)

    def after_val(self, runner: Runner) -> None:
        """Seeds the loading of the next batch again, after a validation."""
        if hasattr(self, 'loading'):
            self._seed_loading(runner, runner.iter)

    def _seed_loading(self, runner: Runner, batch: int) -> None:
        self.loading.next_batch = batch
        _seed(*self._key, LOADING, batch)


class _LoadingSeeds:
    """Seeds the workers of a data loader before each batch that they load.

    Of ``n`` workers, worker ``i`` loads the batches ``i``, ``i + n``,
    ``i + 2 n`` and so on of each epoch.

    Args:
        loader: The data loader.
        key: Seed of the run and rank of the process.

    Attributes:
        next_batch: Number of the batch that is loaded next. The workers start
            with a copy of this object.
        batches_per_epoch: None if the sampler never ends.
    """

    def __init__(self, loader: DataLoader, key: tuple[int, int]) -> None:
        self.next_batch = 0
        endless = hasattr(loader.sampler, 'skip')
        self.batches_per_epoch = None if endless else len(loader)
        self._key = key
        self._sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        self._init_worker, self._collate = loader.worker_init_fn, loader.collate_fn

    def start_worker(self, worker: int) -> None:
        """Seeds the first batch of a worker; its ``worker_init_fn``."""
        if self._init_worker:
            self._init_worker(worker)
        if self.batches_per_epoch:
            # A loop by iteration that skips epochs does not call the hook between them.
            epoch = getattr(self._sampler, 'epoch', 0)
            self.next_batch = max(self.next_batch, epoch * self.batches_per_epoch)
        self.next_batch += worker
        _seed(*self._key, LOADING, self.next_batch)

    def collate(self, samples: list) -> object:
        """Collates a batch, then seeds the worker for its next one."""
        batch = self._collate(samples)
        worker = get_worker_info()
        if worker:
            following = self.next_batch + worker.num_workers
            if per_epoch := self.batches_per_epoch:
                epoch = self.next_batch // per_epoch
                if following >= (epoch + 1) * per_epoch:
                    # Persistent workers begin the next epoch in the same order.
                    following = (epoch + 1) * per_epoch + worker.id
            self.next_batch = following
            _seed(*self._key, LOADING, following)
        return batch


def _seed(*key: int) -> None:
    """Seeds Python's ``random``, NumPy and PyTorch."""
    state = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(state[1])
    torch.manual_seed(int(state[2]))

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
    """Seeds every batch and every step by its number.

    The random numbers of an iteration depend on the seed of the run, the rank
    of the process and the number of the iteration, and on nothing else. A
    resumed training therefore draws what the uninterrupted one would have
    drawn, and no state of a generator has to be stored:

    - The process that loads a batch, a worker or the main process, is seeded
      before it does.
    - The main process is seeded before each training step.

    Python's ``random``, NumPy and PyTorch are seeded. Samplers of MMEngine
    order the data by the seed of the run. So the resumed training needs the
    same ``randomness.seed`` (``tools/train.py --resume`` takes it from the
    checkpoint) and the same number of processes. Iteration-based training
    needs MMEngine 0.10.12, whose data loader can skip batches.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Lets the training data loader seed the processes that load batches."""
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
            # The iteration-based loop now loads the batches before this one too.
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
        self._init_worker, self._collate = loader.worker_init_fn, loader.collate_fn

    def start_worker(self, worker: int) -> None:
        """Is called in each worker when it starts."""
        if self._init_worker:
            self._init_worker(worker)
        self.next_batch += worker
        _seed(*self._key, LOADING, self.next_batch)

    def collate(self, samples: list) -> object:
        """Puts the samples of a batch together, then seeds the next batch."""
        batch = self._collate(samples)
        worker = get_worker_info()
        if worker:
            following = self.next_batch + worker.num_workers
            if per_epoch := self.batches_per_epoch:
                epoch = self.next_batch // per_epoch
                if following >= (epoch + 1) * per_epoch:
                    # A worker that persists begins the next epoch with its first.
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

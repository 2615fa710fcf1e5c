"""Hooks of training and testing."""

import json
import os
import random
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, get_worker_info

from dsnet_mm.checkpoint import unwrap, write_safetensors
from dsnet_mm.engine.resume import STOPPED, examine
from dsnet_mm.files import replacing_file
from dsnet_mm.models import fuse_for_inference
from dsnet_mm.models.adapted_detector import AdaptedDetector, colours
from dsnet_mm.registry import HOOKS
from dsnet_mm.weights import DamagedCheckpointError, check_finite


@HOOKS.register_module()
class CpuTimeHook(Hook):
    """Logs the processor seconds of each training iteration, ``train/cpu_time``.

    They are those of all threads of this process and contain the loading of data
    without workers. Other programs change them far less than the wall time.
    """

    def before_train(self, runner: Runner) -> None:
        """Starts the clock."""
        self._start = time.process_time()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Logs the seconds since the last iteration."""
        now = time.process_time()
        runner.message_hub.update_scalar('train/cpu_time', now - self._start)
        self._start = now

    def after_val(self, runner: Runner) -> None:
        """Starts the clock again, without the seconds of the validation."""
        self._start = time.process_time()


@HOOKS.register_module()
class AdapterStartHook(Hook):
    """Starts the class weights of a :class:`CLIPAdapterHead` from the training images.

    See :meth:`dsnet_mm.models.CLIPAdapter.start`. Each image is read once, before the
    first iteration. A resumed training and one from a checkpoint go on as they are.
    """

    @torch.no_grad()
    def before_train(self, runner: Runner) -> None:
        """Reads the training images and calls the head."""
        model, loader = runner.model, runner.train_dataloader
        model = model.module if is_model_wrapper(model) else model
        adapter = model.head.adapter
        if not adapter.options['residual'] or adapter.residual.any():
            return
        features, labels = [], []
        for batch in DataLoader(
            loader.dataset, loader.batch_size, collate_fn=loader.collate_fn
        ):
            data = model.data_preprocessor(batch, True)
            features.append(model.extract_feat(data['inputs'])[-1])
            labels += [sample.gt_label for sample in data['data_samples']]
        beta = model.head.start(torch.cat(features), torch.cat(labels))
        runner.logger.info(
            f'the class weights of CLIP-Adapter start with beta {beta:.3f}'
        )


@HOOKS.register_module()
class AdaptedDetectorHook(Hook):
    """Starts the training of an :class:`AdaptedDetector`, and writes its adapter.

    Before the first iteration it reads the training images, sixteen or more, some of
    them again if there are fewer, for :meth:`AdaptedDetector.start`, and notes their
    colours. After the last one it writes ``adapter.safetensors`` into the working
    directory, in half precision.

    Args:
        base: What differs in the data set of the detector's own images from that of the
            training, such as ``dict(ann_file=...)``. Up to 100 of them are read, so
            that the adapter can be chosen by image. None leaves that out.
    """

    def __init__(self, base: dict | None = None) -> None:
        self.base = base

    def before_train(self, runner: Runner) -> None:
        """Starts the adapter, unless the training is resumed."""
        if runner.iter:
            return
        model, dataset = unwrap(runner.model), runner.train_dataloader.dataset
        if not isinstance(model, AdaptedDetector):
            raise ValueError(
                f'AdaptedDetectorHook starts an AdaptedDetector, and the model is a '
                f'{type(model).__name__}; set model.type, or leave the hook out'
            )
        adapter = model.adapters[0]
        adapter.domain.copy_(_mean_colours(dataset))
        if self.base:
            own = {**runner.cfg.train_dataloader.dataset, **self.base}
            adapter.detector_domain.copy_(_mean_colours(DATASETS.build(own)))
        numbers = [i % len(dataset) for i in range(max(len(dataset), 16))]
        alpha, labels = model.start([pseudo_collate([dataset[i]]) for i in numbers])
        runner.logger.info(f'the adapter has alpha {alpha:.3f}; prototypes: {labels}')

    def after_train(self, runner: Runner) -> None:
        """Writes the adapter."""
        if not is_main_process():
            return
        model = unwrap(runner.model)
        classes = runner.train_dataloader.dataset.metainfo['classes']
        about = dict(options=model.adapters[0].options, class_names=list(classes))
        path = Path(runner.work_dir, 'adapter.safetensors')
        write_safetensors(path, model.state_dict(), dict(adapter=json.dumps(about)))
        runner.logger.info(f'the adapter is {path}')


def _mean_colours(dataset: Any) -> torch.Tensor:
    """Returns the mean of :func:`colours` over up to 100 images of a data set."""
    numbers = range(0, len(dataset), max(len(dataset) // 100, 1))
    paths = (dataset.get_data_info(i)['img_path'] for i in numbers)
    images = (torch.from_numpy(mmcv.imread(path)).permute(2, 0, 1) for path in paths)
    return torch.stack([colours(image) for image in images]).mean(0)


class NonFiniteLossError(ValueError):
    """A loss or a weight is NaN or infinite."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a training when a loss is NaN or infinite, or a weight that is to be saved.

    The error names the iteration, the losses and images of the batch or the weight, and
    the newest checkpoint to go on from. It is raised before a checkpoint of that
    iteration is written.

    Gradients are not checked. In mixed precision they overflow from time to time; the
    gradient scaler then leaves out the step, and the loss stays finite.

    Raises:
        NonFiniteLossError: After the iteration, or instead of saving.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Checks what the model calls a loss."""
        wrong = [
            f'{name} is {value.item()}'
            for name, loss in (outputs or {}).items()
            if 'loss' in name and not (value := torch.as_tensor(loss)).isfinite()
        ]
        if not wrong:
            return
        images = ', '.join(images_of(data_batch)) or 'not named by the data set'
        self._stop(
            runner,
            f'iteration {runner.iter + 1}: {" and ".join(wrong)}; images of the batch: '
            f'{images}',
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Checks the weights."""
        try:
            check_finite(checkpoint['state_dict'], 'the model')
        except DamagedCheckpointError as error:
            self._stop(runner, f'iteration {checkpoint["meta"]["iter"]}: {error}')

    def _stop(self, runner: Runner, reason: str) -> None:
        good = examine(runner.work_dir)[0] or 'not there yet'
        raise NonFiniteLossError(
            f'{reason}; the last good checkpoint is {good}; start from it in another '
            f'--work-dir (--cfg-options load_from=CHECKPOINT) with a lower learning '
            f'rate, or look at the images and their annotations (tools/check_data.py)'
        )


def images_of(batch: Any) -> list[str]:
    """Returns the file names of the images of a batch, as far as it has them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [str(s.img_path) for s in samples or [] if 'img_path' in s]


@register_backend('dsnet_mm')
class CheckpointBackend(LocalBackend):
    """Writes files atomically, and removes them only when it is told to."""

    def __init__(self) -> None:
        self._outdated: list[tuple[Path, int]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes a file, see :func:`dsnet_mm.files.replacing_file`."""
        with replacing_file(filepath) as part:
            part.write_bytes(obj)

    def remove(self, filepath: str | Path) -> None:
        """Notes a file for :meth:`remove_outdated`."""
        self._outdated.append((Path(filepath), os.stat(filepath).st_ino))

    def remove_outdated(self) -> None:
        """Removes the noted files, but not new ones of the same name."""
        for path, inode in self._outdated:
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()
        self._outdated.clear()


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's CheckpointHook, which leaves whole checkpoints whenever it is killed.

    A checkpoint is written to a temporary file, which then takes its name. Older ones
    (``max_keep_ckpts``, ``save_best``) are removed after that, not before. Storage
    other than local files is left to MMEngine.

    Args:
        **kwargs: Arguments of MMEngine's hook.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        elsewhere = self.backend_args or self.file_client_args
        self._local = not elsewhere and '://' not in str(self.out_dir)
        if self._local:
            self.backend_args = dict(backend='dsnet_mm')

    def before_train(self, runner: Runner) -> None:
        """Takes the best checkpoints from this folder, which may be a copy."""
        super().before_train(runner)
        if not self._local:
            return
        self.file_backend.remove_outdated()
        if path := getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = str(Path(self.out_dir, Path(path).name))
        best = getattr(self, 'best_ckpt_path_dict', {})
        for key, path in best.items():
            best[key] = path and str(Path(self.out_dir, Path(path).name))

    def _save_checkpoint_with_step(self, runner: Runner, *args: Any, **kw: Any) -> None:
        super()._save_checkpoint_with_step(runner, *args, **kw)
        if self._local:
            stopped = Path(self.out_dir, STOPPED)
            if is_main_process() and stopped.exists():
                self.file_backend.remove(stopped)
            self.file_backend.remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        if self._local:
            self.file_backend.remove_outdated()


@HOOKS.register_module()
class FuseHook(Hook):
    """Fuses a copy of the model before it is tested.

    It is not fused earlier because MMEngine loads the checkpoint into the
    unfused model, and an EMAHook exchanges the weights of that. Validation
    during training stays unfused.

    Raises:
        ValueError: By ``Runner.test``, if the model has no DS-blocks.
    """

    priority = 'VERY_LOW'

    def before_test_epoch(self, runner: Runner) -> None:
        """Puts the fused copy in the place of ``runner.model``."""
        model = runner.model
        if is_model_wrapper(model):  # for several GPUs; that for flipped images stays
            model = model.module
        runner.model = fuse_for_inference(deepcopy(model))


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

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Seeds the training step."""
        _seed(*self._key, STEP, runner.iter)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
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

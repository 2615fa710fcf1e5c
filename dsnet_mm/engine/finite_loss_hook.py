"""Stops a training whose loss is no longer a number."""

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.registry import HOOKS


class NonFiniteLossError(ValueError):
    """A loss is NaN or infinite."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a training in the iteration in which a loss is NaN or infinite.

    The error names the iteration, the losses, the pictures of the batch and the newest
    checkpoint without such weights. It is raised before a checkpoint of that iteration
    is written.

    Gradients are not checked. In mixed precision they overflow from time to time; the
    gradient scaler then leaves out the step, and the loss stays finite.

    Raises:
        NonFiniteLossError: After the iteration.
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
        pictures = ', '.join(pictures_of(data_batch)) or 'not named by the data set'
        good = last_good_checkpoint(runner.work_dir)
        raise NonFiniteLossError(
            f'iteration {runner.iter + 1}: {" and ".join(wrong)}; pictures of the '
            f'batch: {pictures}; '
            + (
                f'the last good checkpoint is {good}'
                if good
                else f'{runner.work_dir} holds no good checkpoint yet'
            )
            + '; lower the learning rate, or look at these pictures and their '
            'annotations (tools/check_data.py)'
        )


def pictures_of(batch: Any) -> list[str]:
    """Returns the file names of the pictures of a batch, as far as it has them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [str(s.img_path) for s in samples or [] if 'img_path' in s]


def last_good_checkpoint(work_dir: str) -> str | None:
    """Returns the newest checkpoint of a folder whose weights are all finite."""
    files = sorted(
        Path(work_dir).glob('*.pth'),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in files:
        try:
            state = read_checkpoint(str(path)).get('state_dict', {})
        except ValueError:
            continue
        if state and all(
            value.isfinite().all()
            for value in state.values()
            if isinstance(value, Tensor)
        ):
            return str(path)
    return None

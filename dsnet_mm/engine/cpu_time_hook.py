"""Processor time of training iterations."""

import time

from mmengine.hooks import Hook
from mmengine.runner import Runner

from dsnet_mm.registry import HOOKS


@HOOKS.register_module()
class CpuTimeHook(Hook):
    """Logs the processor seconds of each training iteration, ``train/cpu_time``.

    They are those of all threads of this process and contain the loading of data
    without workers. Other programs change them far less than the wall time.
    """

    def before_train(self, runner: Runner) -> None:
        """Starts the clock."""
        self._start = time.process_time()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Logs the seconds since the last iteration."""
        now = time.process_time()
        runner.message_hub.update_scalar('train/cpu_time', now - self._start)
        self._start = now

    def after_val(self, runner: Runner) -> None:
        """Starts the clock again, without the seconds of the validation."""
        self._start = time.process_time()

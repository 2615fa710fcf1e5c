"""Tests with a model that is fused for inference."""

from copy import deepcopy

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from dsnet_mm.models import fuse_for_inference
from dsnet_mm.registry import HOOKS


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
        if is_model_wrapper(model):  # for several GPUs
            model = model.module
        runner.model = fuse_for_inference(deepcopy(model))

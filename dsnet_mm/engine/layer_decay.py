"""Layer-wise learning rate decay for detectors."""

from collections.abc import Callable
from functools import partial

from mmpretrain.engine import LearningRateDecayOptimWrapperConstructor
from torch import nn

from dsnet_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(LearningRateDecayOptimWrapperConstructor):
    """mmpretrain's layer-wise decay, for any model with a ``backbone``.

    mmpretrain asks the model for the depth of a parameter; a detector cannot
    answer, its backbone can. ``paramwise_cfg`` takes ``layer_decay_rate``,
    ``norm_decay_mult``, ``bias_decay_mult`` and ``flat_decay_mult``.
    """

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        get_layer_depth: Callable | None = None,
        **kwargs,
    ) -> None:
        """Adds the parameters of a module, each with the rate of its layer."""
        if get_layer_depth is None:
            get_layer_depth = partial(
                module.backbone.get_layer_depth, prefix='backbone.'
            )
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)

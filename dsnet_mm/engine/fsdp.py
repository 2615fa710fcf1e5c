"""Training with weights, gradients and optimizer state split over processes (FSDP)."""

from typing import Any

from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import clip_grad_norm_

from dsnet_mm.files import replacing_file
from dsnet_mm.models.layers import DSBlock
from dsnet_mm.registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """MMEngine's FSDPStrategy for models with DS-blocks.

    Each DS-block is gathered as a whole, because it reads the weights of its layers
    directly. The weights in a checkpoint are those of a training without FSDP: one
    file, with whole tensors. The state of the optimizer has parameters by name, so such
    a training goes on only with FSDP.

    It also corrects these faults of MMEngine's strategy (0.10.7 and onedl 0.10.12):

    - Parameter groups are chosen by the shapes of shards, which all have one dimension.
      ``flat_decay_mult=0`` then takes the weight decay from every parameter.
    - ``clip_grad`` takes the norm of the gradients of one process.
    - Resuming fails, since PyTorch 2.1 has another order of arguments. The state of the
      gradient scaler is not in the checkpoint.
    - On the CPU, saving with ``state_dict_cfg='full'`` ends in a segmentation fault.
      ``offload_to_cpu=False`` avoids it.
    - A process that is killed while it saves leaves a part of a file.

    Args:
        **kwargs: Arguments that ``FlexibleRunner`` gives to a strategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        wrapper = dict(
            type='MMFullyShardedDataParallel',
            auto_wrap_policy=ModuleWrapPolicy({DSBlock}),
        )
        states = dict(rank0_only=True, offload_to_cpu=True)
        if get_device() == 'cpu':
            wrapper['device_id'] = 'cpu'
            states['offload_to_cpu'] = False
        super().__init__(
            model_wrapper=wrapper,
            state_dict_cfg=dict(
                state_dict_type='FULL_STATE_DICT',
                state_dict_config=dict(type='FullStateDictConfig', **states),
                optim_state_dict_config=dict(type='FullOptimStateDictConfig', **states),
            ),
            **kwargs,
        )

    def build_optim_wrapper(self, optim_wrapper: dict, model: FSDP) -> BaseOptimWrapper:
        """Builds the optimizer by the shapes of the whole parameters."""
        with FSDP.summon_full_params(model, writeback=False):
            optim_wrapper = super().build_optim_wrapper(optim_wrapper, model.module)
        if getattr(optim_wrapper, 'clip_func', None) is clip_grad_norm_:
            optim_wrapper.clip_func = lambda _, **kwargs: model.clip_grad_norm_(
                **kwargs
            )
        return optim_wrapper

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        """Saves to a temporary file, which then takes the name."""
        with replacing_file(filename) as part:
            super().save_checkpoint(str(part), **kwargs)

    def optim_state_dict(self) -> dict:
        """Returns the state of the optimizer for whole parameters, by their names."""
        state = FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        return self.optim_wrapper.state_dict() | state

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Loads what :meth:`optim_state_dict` returned."""
        state = {key: state_dict[key] for key in ('state', 'param_groups')}
        state = FSDP.optim_state_dict_to_load(
            self.model, self.optim_wrapper.optimizer, state
        )
        self.optim_wrapper.load_state_dict(state_dict | state)

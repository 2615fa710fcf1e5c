"""Checkpoints of random weights."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope
from torch import nn

from tests.conftest import trained


def random_checkpoint(config: Path, registry: Registry, out: Path) -> nn.Module:
    """Writes a checkpoint of random weights. Returns the model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = trained(registry.build(cfg.model)).eval()
    torch.save(dict(state_dict=model.state_dict()), out)
    return model

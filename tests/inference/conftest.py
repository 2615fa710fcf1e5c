"""Checkpoints of random weights."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope
from mmpretrain.registry import MODELS as CLASSIFIERS
from torch import nn

from tests.conftest import trained

# Options that make the detector of ``folder`` quick.
SIZE = [
    'test_dataloader.dataset.pipeline.1.scale=(64,64)',
    'test_dataloader.dataset.pipeline.1.keep_ratio=True',
    'model.test_cfg.rpn.max_per_img=20',
    'model.test_cfg.rcnn.max_per_img=5',
]


def random_checkpoint(config: Path, registry: Registry, out: Path) -> nn.Module:
    """Writes a checkpoint of random weights. Returns the model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = trained(registry.build(cfg.model)).eval()
    torch.save(dict(state_dict=model.state_dict()), out)
    return model


@pytest.fixture(scope='module', autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def checkpoints(folder: Path) -> dict[str, str]:
    """Random weights for the configurations of ``folder``."""
    paths = {}
    for name, registry in (('mask_rcnn', DETECTORS), ('classifier', CLASSIFIERS)):
        paths[name] = str(folder / f'{name}_random.pth')
        model = random_checkpoint(folder / f'{name}.py', registry, paths[name])
        model.init_weights()
        # The detector takes the names of its classes from the configuration.
        meta = dict(dataset_meta=dict(classes=('square', 'disc')))
        meta = meta if name == 'classifier' else {}
        torch.save(dict(state_dict=model.state_dict(), meta=meta), paths[name])
    return paths

"""Fixtures of the few-shot tests."""

import pytest

from tests.conftest import tool as load_tool


@pytest.fixture
def tool(monkeypatch):
    """Calls tools/few_shot.py with arguments."""

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['few_shot.py', *map(str, arguments)])
        load_tool('few_shot.py').main()

    return call


@pytest.fixture
def tiny_config(tiny_clip, image_folder, tmp_path, monkeypatch):
    """Reads a configuration of CLIP-Adapter for a tiny CLIP and few images."""
    from mmengine.config import Config

    from dsnet_mm.engine.config import read_config

    # The Runner formats the configuration six times, which is most of the time.
    monkeypatch.setattr(Config, 'pretty_text', property(repr))

    def read(name='clip-adapter_rn50', encoder=tiny_clip, task=image_folder, steps=2):
        cfg = read_config(name, task)
        cfg.work_dir, cfg.log_level = str(tmp_path), 'WARNING'
        cfg.model.backbone.update(encoder)
        cfg.model.head.encoder = encoder
        for part in ('train', 'val', 'test'):
            if cfg[f'{part}_dataloader'] is None:
                continue
            dataset = cfg[f'{part}_dataloader'].dataset
            dataset.shots = 4
            if dataset.features is None:
                for step in dataset.pipeline:
                    for key in {'scale', 'crop_size'} & set(step):
                        step[key] = 32
            else:
                folder = str(tmp_path / 'cache')
                dataset.features.update(folder=folder, encoder=encoder)
        cfg.train_cfg.update(max_iters=steps, val_interval=steps)
        cfg.default_hooks.checkpoint.interval = steps
        return cfg

    return read

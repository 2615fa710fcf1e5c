"""Training and testing with each configuration, with a tiny CLIP and few images."""

import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain', reason='the configurations inherit from it')

from mmengine.config import Config
from mmengine.runner import Runner

from dsnet_mm.datasets import PUBLIC_DATASETS, load_task
from dsnet_mm.few_shot import METHODS, FeatureCache, FewShotConfig
from dsnet_mm.few_shot.methods.training import train

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'clip_adapter'
TRAINED = [name for name, info in PUBLIC_DATASETS.items() if info.counts[0]]


def load(name):
    return Config.fromfile(FOLDER / f'clip-adapter_{name}.py')


@pytest.mark.parametrize('encoder', ['rn50', 'vit-b16'])
@pytest.mark.parametrize('dataset', TRAINED)
def test_all_parts_have_the_same_data_set_and_encoder(encoder, dataset):
    cfg = load(f'{encoder}_{dataset}')
    few_shot = FewShotConfig(**cfg.few_shot)
    model = {'rn50': 'RN50-quickgelu', 'vit-b16': 'ViT-B-16-quickgelu'}[encoder]
    assert (few_shot.dataset, few_shot.model) == (dataset, model)
    assert few_shot.pretrained == 'openai'
    assert cfg.model.head.class_names == dataset
    assert cfg.model.backbone.model == cfg.model.head.encoder.model == model
    for part in ('train', 'val', 'test'):
        loader = cfg[f'{part}_dataloader']
        if loader is None:
            assert (part, dataset) == ('val', 'imagenet')
            continue
        assert (loader.dataset.dataset, loader.dataset.part) == (dataset, part)
        assert loader.dataset.features.encoder.model == model


def test_number_of_public_data_sets_with_training_images():
    assert len(TRAINED) == 11


def test_recipe_is_that_of_the_default_method():
    cfg, recipe = load('rn50_eurosat'), METHODS['clip_adapter'].defaults
    head, optimizer = cfg.model.head, cfg.optim_wrapper.optimizer
    found = dict(
        alpha=head.adapter.alpha,
        keep=head.keep,
        optimizer=optimizer.type,
        lr=optimizer.lr,
        iterations=cfg.train_cfg.max_iters,
    )
    assert found == recipe
    assert cfg.param_scheduler.end == recipe['iterations']
    settings = inspect.signature(train).parameters
    assert optimizer.weight_decay == settings['weight_decay'].default
    assert cfg.train_dataloader.batch_size == settings['batch_size'].default


@pytest.mark.parametrize(
    'name', sorted(p.stem.removeprefix('clip-adapter_') for p in FOLDER.glob('*.py'))
)
def test_configuration_trains(
    name, tiny_clip, encoder, image_folder, tmp_path, monkeypatch
):
    # The Runner formats the configuration six times, which is most of the time.
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
    cfg = load(name)
    cfg.work_dir, cfg.log_level = str(tmp_path), 'WARNING'
    cfg.model.backbone.update(tiny_clip)
    cfg.model.head.update(encoder=tiny_clip, class_names=str(image_folder))
    for part in ('train', 'val', 'test'):
        if cfg[f'{part}_dataloader'] is None:
            continue
        dataset = cfg[f'{part}_dataloader'].dataset
        dataset.update(dataset=str(image_folder), shots=4)
        if dataset.features is None:
            size = {'RandomResizedCrop': 'scale', 'ResizeEdge': 'scale'}
            for step in dataset.pipeline:
                if step.type in size:
                    step.scale = 32
                if step.type == 'CenterCrop':
                    step.crop_size = 32
        else:
            dataset.features.update(folder=str(tmp_path / 'cache'), encoder=tiny_clip)
    cfg.train_cfg.update(max_iters=2, val_interval=1)
    runner = Runner.from_cfg(cfg)
    runner.model.head.encode_class_names()
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    model = runner.model.eval()
    changed = {
        k for k, v in model.state_dict().items() if not torch.equal(v, before[k])
    }
    adapter = 'head.adapter.visual_adapter'
    assert changed == {f'{adapter}.0.weight', f'{adapter}.2.weight'}

    accuracy = runner.test()['accuracy/top1']
    inputs = [
        model.data_preprocessor(batch)['inputs'] for batch in runner.test_dataloader
    ]
    features = torch.cat([model.backbone(x)[0] for x in inputs])
    cache = FeatureCache(tmp_path / 'cache', encoder)
    expected = cache.images(load_task(image_folder).split['test'])
    error = (features - expected.features[0]).norm()
    spread = expected.features[0] - expected.features[0].mean(0)
    assert error < 0.05 * spread.norm(), 'preprocessing as in the few-shot protocol'
    correct = model.head((features,)).argmax(1) == expected.labels
    assert accuracy == pytest.approx(100 * correct.float().mean().item())

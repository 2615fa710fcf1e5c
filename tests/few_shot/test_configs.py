"""The configurations of CLIP-Adapter, and training with them and a tiny CLIP."""

import inspect
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain', reason='the configurations inherit from it')

from mmengine.runner import Runner

from dsnet_mm.datasets import PUBLIC_DATASETS, load_task
from dsnet_mm.engine.config import TASK, find_config, load_config, read_config
from dsnet_mm.few_shot import METHODS, FeatureCache, FewShotConfig
from dsnet_mm.few_shot.methods.training import RECIPE
from dsnet_mm.models.heads import CLIPAdapterHead

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'clip_adapter'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
TRAINED = [name for name, info in PUBLIC_DATASETS.items() if info.counts[0]]


def test_number_of_public_data_sets_with_training_images():
    assert len(TRAINED) == 11
    assert [f'clip-adapter_{x}' for x in ('rn50', 'rn50_images', 'vit-b16')] == NAMES


@pytest.mark.parametrize('task', [None, *TRAINED])
@pytest.mark.parametrize('name', NAMES)
def test_all_parts_have_the_same_data_set_and_encoder(name, task):
    if task not in (None, 'eurosat') and name != 'clip-adapter_rn50':
        return  # they inherit the parts
    cfg, task = read_config(name, task), task or 'imagenet'
    few_shot, is_imagenet = FewShotConfig(**cfg.few_shot), task == 'imagenet'
    model = 'RN50-quickgelu' if 'rn50' in name else 'ViT-B-16-quickgelu'
    assert (few_shot.dataset, few_shot.model) == (task, model)
    assert few_shot.pretrained == 'openai'
    head, prompts = cfg.model.head, 'imagenet_7' if is_imagenet else None
    assert (head.class_names, head.prompts) == (task, prompts)
    assert few_shot.prompts == prompts
    assert cfg.model.backbone.model == head.encoder.model == model
    assert few_shot.selection == ('cv' if is_imagenet else None)
    overrides = {'clip_adapter_released': {'epochs': 50}} if is_imagenet else {}
    assert few_shot.overrides == overrides
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        assert (cfg[key] is None) == is_imagenet, 'it has no validation images'
    for part in ('train', 'test') if is_imagenet else ('train', 'val', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        assert (dataset.dataset, dataset.part) == (task, part)
        if 'images' not in name:
            assert dataset.features.encoder.model == model
    assert cfg.work_dir == f'work_dirs/{name}_{task}'


def test_choice_of_the_data_set(monkeypatch, tmp_path):
    cfg = load_config(
        'clip-adapter_rn50', {'task': 'my/data/', 'train_cfg.max_iters': 3}
    )
    assert (cfg.task, cfg.train_cfg.max_iters) == ('my/data/', 3)
    assert cfg.work_dir.endswith('clip-adapter_rn50_data')
    assert TASK not in os.environ, 'as before'
    monkeypatch.setenv(TASK, 'dtd')
    assert read_config('clip-adapter_rn50').model.head.class_names == 'dtd'
    assert read_config('clip-adapter_rn50', 'sun397').task == 'sun397'
    assert os.environ[TASK] == 'dtd', 'as before'
    (tmp_path / 'own.py').write_text('model = dict()')
    with pytest.raises(ValueError, match=r'own\.py.*task=dtd'):
        read_config(tmp_path / 'own.py', 'dtd')


@pytest.mark.parametrize(
    ('old', 'new', 'task'),
    [
        ('clip-adapter_rn50_eurosat', 'clip-adapter_rn50', 'eurosat'),
        ('configs/x/clip-adapter_vit-b16_dtd.py', 'clip-adapter_vit-b16', 'dtd'),
        ('clip-adapter_rn50_eurosat_images.py', 'clip-adapter_rn50_images', 'eurosat'),
    ],
)
def test_old_names_say_the_new_form(old, new, task):
    with pytest.raises(FileNotFoundError, match=rf'{new}\b.*task={task}'):
        find_config(old)


def test_recipe_is_that_of_the_default_method():
    cfg, recipe = read_config('clip-adapter_rn50'), METHODS['clip_adapter'].defaults
    head, optimizer = cfg.model.head, cfg.optim_wrapper.optimizer
    found = dict(
        RECIPE,
        **head.adapter,
        optimizer=optimizer.type,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        iterations=cfg.train_cfg.max_iters,
        batch_size=cfg.train_dataloader.batch_size,
    )
    assert found == {key: recipe[key] for key in found}
    assert cfg.param_scheduler.end == recipe['iterations']
    of_head = inspect.signature(CLIPAdapterHead).parameters
    assert of_head['keep'].default is recipe['keep'] is None, 'that of the preset'
    assert of_head['adapter'].default == dict(preset=recipe['preset'])


@pytest.mark.parametrize('name', NAMES)
def test_configuration_trains(name, tiny_config, encoder, image_folder, tmp_path):
    runner = Runner.from_cfg(tiny_config(name))
    runner.model.head.encode_class_names()
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    model = runner.model.eval()
    state = model.state_dict()
    changed = {k for k, v in state.items() if not torch.equal(v, before[k])}
    adapter = 'head.adapter.visual_adapter'
    learnt = {f'{adapter}.0.weight', f'{adapter}.2.weight', 'head.adapter.residual'}
    assert changed == learnt
    assert not model.backbone.clip.training

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


def test_imagenet_trains_without_validation(tiny_config, image_folder):
    cfg = tiny_config(task='imagenet')
    cfg.model.head.update(class_names=str(image_folder), prompts=None)
    for part in ('train', 'test'):
        cfg[f'{part}_dataloader'].dataset.dataset = str(image_folder)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.test()['accuracy/top1'] > 0

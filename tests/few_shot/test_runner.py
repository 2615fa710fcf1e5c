"""CLIP-Adapter in MMEngine's Runner, on images and on cached features."""

import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip('mmpretrain', reason='CLIPAdapterHead extends ClsHead')

from mmengine.config import Config
from mmengine.runner import Runner


def config(tiny_clip, image_folder, work_dir, cached):
    if cached:
        features = dict(folder=str(work_dir / 'cache'), encoder=tiny_clip)
        pipeline = [dict(type='mmpretrain.PackInputs', input_key='features')]
        preprocessor = dict()
    else:
        features = None
        pipeline = [
            dict(type='mmpretrain.LoadImageFromFile'),
            dict(type='mmpretrain.Resize', scale=(32, 32)),
            dict(type='mmpretrain.PackInputs'),
        ]
        preprocessor = dict(mean=[122.8] * 3, std=[68.5] * 3, to_rgb=True)

    def loader(part):
        return dict(
            batch_size=8,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=part == 'train'),
            collate_fn=dict(type='default_collate'),
            dataset=dict(
                type='dsnet_mm.FewShotDataset',
                dataset=str(image_folder),
                part=part,
                shots=8,
                features=features,
                views=3,
                pipeline=pipeline,
            ),
        )

    return Config(
        dict(
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            model=dict(
                type='ImageClassifier',
                data_preprocessor=preprocessor,
                backbone=dict(type='dsnet_mm.OpenCLIPEncoder', **tiny_clip),
                head=dict(
                    type='dsnet_mm.CLIPAdapterHead',
                    encoder=tiny_clip,
                    class_names=str(image_folder),
                    adapter=dict(alpha=0.8),
                    keep=0.0,
                ),
            ),
            train_dataloader=loader('train'),
            test_dataloader=loader('test'),
            test_evaluator=dict(type='Accuracy'),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.03)),
            train_cfg=dict(by_epoch=True, max_epochs=25),
            test_cfg=dict(),
            randomness=dict(seed=0),
            log_level='WARNING',
        )
    )


@pytest.mark.parametrize('cached', [False, True], ids=['images', 'features'])
def test_training_changes_the_adapter_only(tiny_clip, image_folder, tmp_path, cached):
    runner = Runner.from_cfg(config(tiny_clip, image_folder, tmp_path, cached))
    runner.model.head.encode_class_names()
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    runner.train()
    changed = {
        k for k, v in runner.model.state_dict().items() if not torch.equal(v, before[k])
    }
    assert changed == {
        'head.adapter.visual_adapter.0.weight',
        'head.adapter.visual_adapter.2.weight',
    }
    assert not runner.model.backbone.clip.training
    accuracy = runner.test()['accuracy/top1']
    assert accuracy > 60  # the classes are three colours


def test_run_and_test_load_clip_once(tiny_clip, image_folder, tmp_path, loads):
    """Trains, then tests the checkpoint with another Runner."""
    own_clip = {key: shutil.copy(path, tmp_path) for key, path in tiny_clip.items()}
    cfg = config(own_clip, image_folder, tmp_path, cached=True)
    cfg.train_cfg.max_epochs = 1
    runner = Runner.from_cfg(cfg)
    assert loads == ['create_model']
    runner.train()
    accuracy = runner.test()['accuracy/top1']
    assert loads.count('create_model') == 1

    loads.clear()
    cfg.load_from = str(tmp_path / 'epoch_1.pth')
    cfg.experiment_name = 'again'
    cfg.model.head.class_names = 'no/such/folder'
    again = Runner.from_cfg(cfg)
    assert again.test()['accuracy/top1'] == accuracy
    assert loads == ['create_model', 'read_folder'], 'the test set and its encoder'


def test_moving_average_of_an_adapter(tiny_clip, image_folder, tmp_path):
    cfg = config(tiny_clip, image_folder, tmp_path, cached=True)
    cfg.model.head.class_names = ['blue', 'green sea', 'red']
    cfg.train_cfg.max_epochs = 1
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    runner = Runner.from_cfg(cfg)
    runner.train()
    (average,) = (h.ema_model.module for h in runner.hooks if hasattr(h, 'ema_model'))
    text_features = average.head.adapter.text_features
    assert torch.equal(text_features, runner.model.head.adapter.text_features)
    assert text_features.isfinite().all()


def test_head_has_exactly_one_source_of_text_features(tiny_clip, tmp_path):
    from safetensors.torch import save_file

    from dsnet_mm.models.heads import CLIPAdapterHead

    for options in (
        dict(),
        dict(encoder=tiny_clip, class_names=['a', 'b'], **dict(text_features='x')),
    ):
        with pytest.raises(ValueError, match='either encoder and class_names, or'):
            CLIPAdapterHead(**options)
    with pytest.raises(FileNotFoundError, match='there is no file'):
        CLIPAdapterHead(text_features=str(tmp_path / 'none.safetensors'))

    head = CLIPAdapterHead(encoder=tiny_clip, class_names=['a', 'b'])
    head.encode_class_names()
    file = tmp_path / 'text.safetensors'
    adapter = head.adapter
    save_file(
        {'text_features': adapter.text_features, 'logit_scale': adapter.logit_scale},
        file,
    )
    same = CLIPAdapterHead(text_features=str(file))
    features = (torch.randn(2, 16),)
    assert torch.equal(same.adapter.text_features, adapter.text_features)
    assert same(features).isfinite().all()


@pytest.mark.parametrize('keep', [0.0, 3.0])
def test_loss_of_the_head_is_that_of_the_method(tiny_clip, keep):
    from mmpretrain.structures import DataSample

    from dsnet_mm.few_shot.methods.clip_adapter import KeptAdapter
    from dsnet_mm.models.heads import CLIPAdapterHead

    head = CLIPAdapterHead(
        encoder=tiny_clip,
        class_names=['a', 'b'],
        adapter=dict(text=True, alpha=0.6, beta=0.6),
        keep=keep,
    )
    features, labels = torch.randn(5, 16), torch.tensor([0, 1, 1, 0, 1])
    samples = [DataSample().set_gt_label(label) for label in labels]
    losses = head.loss((features,), samples)
    assert (losses['loss_keep'] > 0) == (keep > 0)
    expected = KeptAdapter(head.adapter, keep).loss(features, labels)
    torch.testing.assert_close(losses['loss'] + losses['loss_keep'], expected)


def test_import_of_the_package_imports_neither_mmpretrain_nor_open_clip():
    code = (
        'import sys, dsnet_mm.models, dsnet_mm.datasets\n'
        'print([m for m in ("mmpretrain", "open_clip", "mmdet") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == '[]'
    assert done.stderr == ''


@pytest.mark.parametrize(
    ('missing', 'build'),
    [
        ('mmpretrain', "MODELS.build(dict(type='CLIPAdapterHead'))"),
        ('open_clip', "MODELS.build(dict(type='OpenCLIPEncoder', model='RN50'))"),
    ],
)
def test_error_names_the_missing_package(missing, build):
    code = (
        f'import sys; sys.modules[{missing!r}] = None\n'
        'import dsnet_mm.models\n'
        'from dsnet_mm.registry import MODELS\n'
        f'try: {build}\n'
        'except ImportError as error: print(error)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert missing in done.stdout
    assert 'pip install' in done.stdout

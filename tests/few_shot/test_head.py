"""CLIPAdapterHead, and what it loads, alone and in MMEngine's Runner."""

import shutil

import pytest
import torch

pytest.importorskip('mmpretrain', reason='CLIPAdapterHead extends ClsHead')

from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from safetensors.torch import save_file

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.models.heads import CLIPAdapterHead
from tests.conftest import run_python


@pytest.mark.parametrize('names', ['eurosat', 'no/such/folder', ['a', 'b', 'c']])
def test_head_is_built_without_data_set_and_clip(tiny_clip, loads, names):
    head = CLIPAdapterHead(encoder=tiny_clip, class_names=names)
    assert loads == []
    rows = {'eurosat': 10, 'no/such/folder': 0}.get(str(names), 3)
    assert head.adapter.text_features.shape == (rows, 16)


def test_first_forward_encodes_the_class_names(tiny_clip, encoder, image_folder, loads):
    head = CLIPAdapterHead(encoder=tiny_clip, class_names=str(image_folder))
    assert head.adapter.residual.shape == (3, 16), 'the optimizer needs it'
    features = torch.randn(2, 16)
    logits = head((features,))
    assert loads == 2 * ['read_folder'], 'the towers of the fixture are reused'
    text = encoder.encode_classes(['blue', 'green sea', 'red'], 'a photo of a {}.')
    assert torch.equal(head.adapter.text_features, text)
    assert head.adapter.logit_scale == encoder.logit_scale
    assert torch.equal(head((features,)), logits)
    assert len(loads) == 2


def test_head_with_a_checkpoint_does_not_need_the_data_set(
    tiny_clip, image_folder, loads
):
    trained = CLIPAdapterHead(encoder=tiny_clip, class_names=str(image_folder))
    features = torch.randn(2, 16)
    logits = trained((features,))
    loads.clear()
    for names in ('no/such/folder', 'eurosat', ['a', 'b', 'c']):
        head = CLIPAdapterHead(encoder=tiny_clip, class_names=names)
        head.load_state_dict(trained.state_dict())
        assert torch.equal(head((features,)), logits)
    assert loads == []
    head = CLIPAdapterHead(encoder=tiny_clip, class_names=['a', 'b'])
    for one, other in ((head, trained), (trained, head)):
        with pytest.raises(RuntimeError, match='text_features'):
            one.load_state_dict(other.state_dict())


def test_checkpoint_that_was_saved_before_the_first_forward(tiny_clip, image_folder):
    names = str(image_folder)
    head, other = (
        CLIPAdapterHead(encoder=tiny_clip, class_names=names) for _ in range(2)
    )
    head.load_state_dict(other.state_dict())
    assert head((torch.randn(2, 16),)).isfinite().all()


def test_learnt_text_features_are_computed_by_the_constructor(
    tiny_clip, encoder, image_folder
):
    adapter = dict(preset='cross_modal')
    names = str(image_folder)
    head = CLIPAdapterHead(encoder=tiny_clip, class_names=names, adapter=adapter)
    text = dict(head.named_parameters())['adapter.text_features']
    names = ['blue', 'green sea', 'red']
    assert torch.equal(text, encoder.encode_classes(names, 'photo'))


def test_bad_arguments(tiny_clip, tmp_path):
    both = dict(encoder=tiny_clip, class_names=['a', 'b'], text_features='x')
    for options, error, fact in (
        (dict(encoder=tiny_clip, class_names=['a', 'b', 'a']), ValueError, "'a'"),
        (
            dict(encoder=tiny_clip, class_names='eurosat', prompts=['a photo']),
            *(ValueError, r'\{\}'),
        ),
        (dict(encoder=dict(model='RN51'), class_names=['a']), ValueError, "'RN51'"),
        (dict(), ValueError, 'class_names.*text_features'),
        (both, ValueError, 'class_names.*text_features'),
        (dict(text_features=str(tmp_path / 'no')), FileNotFoundError, 'no'),
    ):
        with pytest.raises(error, match=fact):
            CLIPAdapterHead(**options)
    head = CLIPAdapterHead(encoder=tiny_clip, class_names='no/such/folder')
    with pytest.raises(FileNotFoundError, match='no/such/folder'):
        head((torch.randn(2, 16),))


def test_text_features_of_a_file(tiny_clip, tmp_path):
    head = CLIPAdapterHead(encoder=tiny_clip, class_names=['a', 'b'])
    head.encode_class_names()
    names = ('text_features', 'logit_scale')
    file = tmp_path / 'text.safetensors'
    save_file({name: getattr(head.adapter, name) for name in names}, file)
    same = CLIPAdapterHead(text_features=str(file))
    assert torch.equal(same.adapter.text_features, head.adapter.text_features)
    assert same((torch.randn(2, 16),)).isfinite().all()


@pytest.mark.parametrize(
    ('adapter', 'keep', 'expected'),
    [
        (dict(), None, 20.0),
        (dict(text=True, alpha=0.6, beta=0.6), 3.0, 3.0),
        (dict(preset='released'), None, 0.0),
    ],
)
def test_loss_of_the_head_is_that_of_the_method(tiny_clip, adapter, keep, expected):
    head = CLIPAdapterHead(
        encoder=tiny_clip, class_names=['a', 'b'], adapter=adapter, keep=keep
    )
    assert head.adapter.options['keep'] == expected
    head.encode_class_names()
    labels = torch.tensor([0, 1, 1, 0, 1])
    features = 9 * head.adapter.text_features.detach()[labels] + torch.randn(5, 16)
    samples = [DataSample().set_gt_label(label) for label in labels]
    losses = head.loss((features,), samples)
    total = head.adapter.loss(features, labels)
    torch.testing.assert_close(losses['loss'] + losses['loss_keep'], total)
    assert (losses['loss_keep'] > 0) == (expected > 0)


# --- In the Runner ------------------------------------------------------------------


def test_training_starts_as_the_method_does(tiny_config):
    """The residual starts from all training images, once."""
    cfg = tiny_config(steps=1)
    cfg.train_dataloader.dataset.views = 0
    cfg.custom_hooks = [dict(type='dsnet_mm.AdapterStartHook')]
    cfg.optim_wrapper.optimizer.lr = 0.0
    runner = Runner.from_cfg(cfg)
    runner.train()
    adapter, dataset = runner.model.head.adapter, runner.train_dataloader.dataset
    own = CLIPAdapter(adapter.text_features, adapter.logit_scale.item())
    samples = [dataset[i] for i in range(len(dataset))]
    labels = torch.cat([sample['data_samples'].gt_label for sample in samples])
    features = torch.stack([sample['inputs'] for sample in samples])
    assert own.start(features, labels) > 0
    torch.testing.assert_close(adapter.residual, own.residual)
    with torch.no_grad():
        adapter.residual.fill_(0.5)
    runner.call_hook('before_train')
    assert (adapter.residual == 0.5).all(), 'a started residual goes on'


def test_training_loads_clip_once_and_learns(tiny_config, tiny_clip, tmp_path, loads):
    """Trains, then tests the checkpoint with another Runner."""
    own_clip = {key: shutil.copy(path, tmp_path) for key, path in tiny_clip.items()}
    cfg = tiny_config(encoder=own_clip, steps=60)
    cfg.optim_wrapper.optimizer.lr = 0.03
    cfg.model.head.update(keep=0.0, adapter=dict(alpha=0.8))
    runner = Runner.from_cfg(cfg)
    assert loads == ['create_model', 'read_folder']
    runner.train()
    accuracy = runner.test()['accuracy/top1']
    assert accuracy > 60  # the classes are three colours
    assert loads.count('create_model') == 1

    loads.clear()
    cfg.load_from = str(tmp_path / 'iter_60.pth')
    cfg.experiment_name = 'again'
    cfg.model.head.class_names = 'no/such/folder'
    again = Runner.from_cfg(cfg)
    assert again.test()['accuracy/top1'] == accuracy
    assert loads == ['create_model', 'read_folder'], 'the test set and its encoder'


def test_moving_average_of_an_adapter(tiny_config):
    cfg = tiny_config()
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    runner = Runner.from_cfg(cfg)
    runner.train()
    (average,) = (h.ema_model.module for h in runner.hooks if hasattr(h, 'ema_model'))
    text_features = average.head.adapter.text_features
    assert torch.equal(text_features, runner.model.head.adapter.text_features)
    assert text_features.isfinite().all()


def test_optional_packages():
    """The package does not import them, and names them when they are missing."""
    done = run_python(
        'import sys, dsnet_mm.models, dsnet_mm.datasets\n'
        'names = "mmpretrain", "open_clip", "mmdet"\n'
        'print([name for name in names if name in sys.modules])\n'
        'sys.modules |= dict.fromkeys(names)\n'
        'from dsnet_mm.registry import MODELS\n'
        'for kind in ("CLIPAdapterHead", "OpenCLIPEncoder"):\n'
        '    try: MODELS.build(dict(type=kind, model="RN50"))\n'
        '    except ImportError as error: print(error)'
    )
    assert done.stderr == ''
    imported, head, encoder = done.stdout.splitlines()
    assert imported == '[]'
    assert 'mmpretrain' in head and 'pip install' in head
    assert 'open_clip' in encoder and 'pip install' in encoder

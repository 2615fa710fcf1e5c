"""CLIP models and data sets are loaded only when needed, and only once."""

import gc
import os
import shutil
import weakref

import pytest
import torch

from dsnet_mm.datasets.few_shot_dataset import FewShotDataset
from dsnet_mm.models import OpenCLIPEncoder


@pytest.fixture
def own_clip(tiny_clip, tmp_path):
    """Copies of the files of the tiny CLIP, which no other test has loaded."""
    return {key: shutil.copy(path, tmp_path) for key, path in tiny_clip.items()}


# --- Encoders that share their towers ---------------------------------------------


def test_encoders_of_the_same_weights_share_the_towers(own_clip, loads):
    first = OpenCLIPEncoder(**own_clip)
    second = OpenCLIPEncoder.shared(**own_clip, amp='bfloat16')
    third = OpenCLIPEncoder.shared(**own_clip)
    assert loads == ['create_model']
    assert first.clip is second.clip is third.clip
    assert (first.amp, second.amp, third.amp) == (None, 'bfloat16', None)
    assert second.digest() == first.digest()
    OpenCLIPEncoder(**own_clip)
    assert len(loads) == 2, 'the constructor always loads'
    with pytest.raises(ValueError, match='amp must be None'):
        OpenCLIPEncoder.shared(**own_clip, amp='float8')


def test_towers_are_freed_with_the_last_encoder(own_clip):
    first = OpenCLIPEncoder(**own_clip)
    second = OpenCLIPEncoder.shared(**own_clip)
    clip = weakref.ref(first.clip)
    del first
    gc.collect()
    assert OpenCLIPEncoder.shared(**own_clip).clip is clip()
    del second
    gc.collect()
    assert clip() is None


def test_other_weights_are_not_shared(own_clip):
    first = OpenCLIPEncoder(**own_clip)
    weights = own_clip['pretrained']
    state = torch.load(weights)
    state['logit_scale'] += 1
    torch.save(state, weights)
    os.utime(weights, ns=(1, 1))
    second = OpenCLIPEncoder.shared(**own_clip)
    assert second.logit_scale == pytest.approx(first.logit_scale * 2.71828, rel=1e-4)


@pytest.mark.parametrize('change', ['load_state_dict', 'double'])
def test_changed_towers_are_not_shared(own_clip, change):
    first = OpenCLIPEncoder(**own_clip)
    digest = first.digest()
    if change == 'double':
        first.double()
    else:
        other = OpenCLIPEncoder(own_clip['model'])
        first.load_state_dict(other.state_dict())
        assert first.digest() == other.digest() != digest
    second = OpenCLIPEncoder.shared(**own_clip)
    assert second.clip is not first.clip
    assert second.digest() == digest


def test_towers_on_another_device_are_not_shared(own_clip):
    first = OpenCLIPEncoder(**own_clip).to('meta')
    second = OpenCLIPEncoder.shared(**own_clip)
    assert next(first.parameters()).is_meta
    assert not next(second.parameters()).is_meta


def test_data_sets_with_features_load_one_clip(own_clip, image_folder, tmp_path, loads):
    features = dict(folder=str(tmp_path / 'cache'), encoder=own_clip)
    datasets = [
        FewShotDataset(str(image_folder), part, 4, features=features)
        for part in ('train', 'val', 'test')
    ]
    assert loads.count('create_model') == 1
    for dataset in datasets:  # copies and worker processes do not need the encoder
        modules = [v for v in vars(dataset).values() if isinstance(v, torch.nn.Module)]
        assert not modules


# --- The head ---------------------------------------------------------------------


@pytest.fixture
def head_class():
    pytest.importorskip('mmpretrain', reason='CLIPAdapterHead extends ClsHead')
    from dsnet_mm.models.heads import CLIPAdapterHead

    return CLIPAdapterHead


@pytest.mark.parametrize('names', ['eurosat', 'no/such/folder', ['a', 'b', 'c']])
def test_head_is_built_without_data_set_and_clip(head_class, tiny_clip, loads, names):
    head = head_class(encoder=tiny_clip, class_names=names)
    assert loads == []
    rows = {'eurosat': 10, 'no/such/folder': 0}.get(str(names), 3)
    assert head.adapter.text_features.shape == (rows, 16)


def test_first_forward_encodes_the_class_names(
    head_class, tiny_clip, encoder, image_folder, loads
):
    head = head_class(encoder=tiny_clip, class_names=str(image_folder))
    features = torch.randn(2, 16)
    logits = head((features,))
    assert loads == ['read_folder'], 'the towers of the fixture are reused'
    names = ['blue', 'green sea', 'red']
    text = encoder.encode_classes(names, 'a photo of a {}.')
    assert torch.equal(head.adapter.text_features, text)
    assert head.adapter.logit_scale == encoder.logit_scale
    assert torch.equal(head((features,)), logits)
    assert len(loads) == 1


def test_head_with_a_checkpoint_does_not_need_the_data_set(
    head_class, tiny_clip, image_folder, loads
):
    trained = head_class(encoder=tiny_clip, class_names=str(image_folder))
    features = torch.randn(2, 16)
    logits = trained((features,))
    loads.clear()
    for names in ('no/such/folder', 'eurosat', ['a', 'b', 'c']):
        head = head_class(encoder=tiny_clip, class_names=names)
        head.load_state_dict(trained.state_dict())
        assert torch.equal(head((features,)), logits)
    assert loads == []
    head = head_class(encoder=tiny_clip, class_names=['a', 'b'])
    with pytest.raises(RuntimeError, match='size mismatch'):
        head.load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match='size mismatch'):
        trained.load_state_dict(head.state_dict())


def test_checkpoint_that_was_saved_before_the_first_forward(
    head_class, tiny_clip, image_folder
):
    names = str(image_folder)
    head, other = (head_class(encoder=tiny_clip, class_names=names) for _ in range(2))
    head.load_state_dict(other.state_dict())
    assert head((torch.randn(2, 16),)).isfinite().all()


def test_learnt_text_features_are_computed_by_the_constructor(
    head_class, tiny_clip, encoder, image_folder
):
    head = head_class(
        encoder=tiny_clip,
        class_names=str(image_folder),
        adapter=dict(preset='cross_modal'),
    )
    text = dict(head.named_parameters())['adapter.text_features']
    names = ['blue', 'green sea', 'red']
    assert torch.equal(text, encoder.encode_classes(names, 'photo'))


def test_constructor_raises_for_bad_names_and_prompts(head_class, tiny_clip):
    with pytest.raises(ValueError, match="duplicate class names 'a'"):
        head_class(encoder=tiny_clip, class_names=['a', 'b', 'a'])
    with pytest.raises(ValueError, match=r'must contain \{\} once'):
        head_class(encoder=tiny_clip, class_names='eurosat', prompts=['a photo'])
    with pytest.raises(ValueError, match="no model 'RN51'"):
        head_class(encoder=dict(model='RN51'), class_names=['a', 'b'])
    head = head_class(encoder=tiny_clip, class_names='no/such/folder')
    with pytest.raises(FileNotFoundError, match="'no/such/folder' is neither"):
        head((torch.randn(2, 16),))

"""Caches and classifier files belong to one encoder, not only to one set of weights."""

import copy
import json
import zipfile
from pathlib import Path

import pytest
import torch

from dsnet_mm.datasets import load_task
from dsnet_mm.few_shot import FeatureCache, load_classifier, save_classifier
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier
from dsnet_mm.models import OpenCLIPEncoder

CHANGES = {
    'quick_gelu': {'quick_gelu': True},
    'head_width': {'vision_cfg': {'head_width': 32}},
    'tokenizer': {'text_cfg': {'tokenizer_kwargs': {'clean': 'canonicalize'}}},
}


def configuration(tiny_clip: dict, change: dict) -> dict:
    config = json.loads(Path(tiny_clip['model']).read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize('name', CHANGES)
def test_same_weights_in_another_model(
    encoder, tiny_clip, image_folder, tmp_path, name
):
    file = tmp_path / 'changed.json'
    file.write_text(json.dumps(configuration(tiny_clip, CHANGES[name])))
    other = OpenCLIPEncoder(str(file), tiny_clip['pretrained'])
    assert other.digest() == encoder.digest()
    assert other.identity() != encoder.identity()
    items = load_task(image_folder).split['val'][:2]
    for which in (encoder, other):
        cache = FeatureCache(tmp_path / 'cache', which)
        cache.images(items)
        cache.texts(['a, b', 'c'], ['a {}.'])
    assert len(list((tmp_path / 'cache').iterdir())) == 4

    file = tmp_path / 'classifier.safetensors'
    classifier = CosineClassifier(torch.eye(2, 16), 100.0)
    save_classifier(file, classifier, encoder, ['a', 'b'], 'clip')
    assert load_classifier(file, encoder).class_names == ('a', 'b')
    with pytest.raises(ValueError, match='the encoder has other config'):
        load_classifier(file, other)


def test_tokenizer_with_other_tokens(encoder):
    other = copy.copy(encoder)
    other.tokenizer = lambda texts: encoder.tokenizer(texts).roll(1, 1)
    assert other.identity()['tokenizer'] != encoder.identity()['tokenizer']


def test_another_version_of_open_clip(encoder, tmp_path, monkeypatch):
    """The features are computed again, and the classifier can still be used."""
    import open_clip

    file = tmp_path / 'classifier.safetensors'
    classifier = CosineClassifier(torch.eye(2, 16), 100.0)
    save_classifier(file, classifier, encoder, ['a', 'b'], 'clip')
    before = encoder.identity()
    monkeypatch.setattr(open_clip, '__version__', '9.0')
    assert encoder.identity() == {**before, 'open_clip': '9.0'}
    load_classifier(file, encoder)


@pytest.mark.parametrize(
    'kind', ['state dict of OpenAI', 'TorchScript', 'name', 'cache', 'configuration']
)
def test_file_trained_with_another_gelu(tiny_clip, tmp_path, kind):
    """The tiny model has plain GELU."""
    weights = torch.load(tiny_clip['pretrained'])
    file = tmp_path / 'weights.pt'
    if kind == 'name':
        file = tmp_path / 'rn50-quickgelu-yfcc15m-455df137.pt'
    elif kind == 'cache':
        file = tmp_path / 'models--timm--resnet50_clip.openai' / 'snapshots' / 'x.pt'
        file.parent.mkdir(parents=True)
    elif kind == 'configuration':
        model = {'model_cfg': configuration(tiny_clip, {'quick_gelu': True})}
        (tmp_path / 'open_clip_config.json').write_text(json.dumps(model))
    elif kind == 'state dict of OpenAI':
        extra = ('input_resolution', 'context_length', 'vocab_size')
        weights.update({name: torch.tensor(1) for name in extra})
    torch.save(weights, file)
    if kind == 'TorchScript':
        with zipfile.ZipFile(file, 'a') as archive:
            archive.writestr('weights/constants.pkl', b'')
    with pytest.raises(
        ValueError, match=r'were trained with QuickGELU.* quick_gelu to'
    ):
        OpenCLIPEncoder(tiny_clip['model'], str(file))


def test_file_of_unknown_gelu_is_loaded(tiny_clip, tmp_path):
    """The name is that of OpenAI's file, and the content is not."""
    file = tmp_path / 'RN50.pt'
    file.write_bytes(Path(tiny_clip['pretrained']).read_bytes())
    OpenCLIPEncoder(tiny_clip['model'], str(file))

"""OpenCLIPEncoder: towers, errors, and the identity that caches and files hold."""

import copy
import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets import load_task
from dsnet_mm.few_shot import FeatureCache, load_classifier, save_classifier
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier


def test_towers_are_frozen_and_in_eval(encoder):
    assert encoder.train() is encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert (encoder.embed_dims, encoder.image_size) == (16, 32)
    (features,) = encoder(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 16)
    assert encoder(features)[0] is features


def test_prompt_ensemble_is_the_mean_of_normalised_features(encoder):
    names, prompts = ['cat', 'sea_lake'], ['a {}.', 'the {}.']
    single = [encoder.encode_classes(names, [prompt]) for prompt in prompts]
    expected = F.normalize((single[0] + single[1]) / 2, dim=-1)
    torch.testing.assert_close(encoder.encode_classes(names, prompts), expected)
    same = encoder.encode_classes(['cat', 'sea lake'], prompts)
    assert torch.equal(encoder.encode_classes(names, prompts), same)


def test_bfloat16_is_close_to_float32(tiny_clip, encoder):
    images = torch.randn(4, 3, 32, 32)
    low, full = (
        OpenCLIPEncoder(**tiny_clip, amp=amp)(images)[0] for amp in ('bfloat16', None)
    )
    assert torch.equal(full, encoder(images)[0])
    assert not torch.equal(low, full)
    assert F.cosine_similarity(low, full).min() > 0.99


def test_bad_arguments(tiny_clip, encoder):
    for model, tag, error, fact in (
        ('RN51', None, ValueError, "'RN51'"),
        ('RN50-quickgelu', 'opnai', ValueError, "'opnai'.*openai"),
        ('none.json', None, FileNotFoundError, r'none\.json'),
    ):
        with pytest.raises(error, match=fact):
            OpenCLIPEncoder(model, tag)
    with pytest.raises(ValueError, match='float64'):
        OpenCLIPEncoder(**tiny_clip, amp='float64')
    half = OpenCLIPEncoder(**tiny_clip, amp='float16')
    for which, dtype in ((half, torch.float32), (encoder, torch.float16)):
        with pytest.raises(ValueError, match='CPU'):
            which(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    import open_clip

    def create_model(*args, **kwargs):
        raise RuntimeError('Failed to download weights')

    monkeypatch.setattr(open_clip, 'create_model', create_model)
    with pytest.raises(FileNotFoundError, match=r'openai.*pretrained'):
        OpenCLIPEncoder('RN50-quickgelu', 'openai')


# --- Identity -----------------------------------------------------------------------


def configuration(tiny_clip: dict, change: dict) -> dict:
    config = json.loads(Path(tiny_clip['model']).read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


@pytest.fixture
def classifier_file(encoder, tmp_path):
    file = tmp_path / 'classifier.safetensors'
    classifier = CosineClassifier(torch.eye(2, 16), 100.0)
    save_classifier(file, classifier, encoder, ['a', 'b'], 'clip')
    return file


@pytest.mark.parametrize(
    'change',
    [
        {'quick_gelu': True},
        {'vision_cfg': {'head_width': 32}},
        {'text_cfg': {'tokenizer_kwargs': {'clean': 'canonicalize'}}},
    ],
    ids=str,
)
def test_same_weights_in_another_model(
    encoder, tiny_clip, image_folder, classifier_file, tmp_path, change
):
    changed = configuration(tiny_clip, change)
    other = OpenCLIPEncoder(changed, tiny_clip['pretrained'])
    assert other.digest() == encoder.digest()
    assert other.identity() != encoder.identity()
    assert OpenCLIPEncoder(changed).digest() != encoder.digest(), 'random weights'
    items = load_task(image_folder).split['val'][:2]
    for which in (encoder, other):
        cache = FeatureCache(tmp_path / 'cache', which)
        cache.images(items)
        cache.texts(['a, b', 'c'], ['a {}.'])
    assert len(list((tmp_path / 'cache').iterdir())) == 4
    assert load_classifier(classifier_file, encoder).class_names == ('a', 'b')
    with pytest.raises(ValueError, match='config'):
        load_classifier(classifier_file, other)


def test_identity_has_tokenizer_and_version(encoder, classifier_file, monkeypatch):
    """With another open_clip features are computed again; classifiers can be used."""
    import open_clip

    before = encoder.identity()
    other = copy.copy(encoder)
    other.tokenizer = lambda texts: encoder.tokenizer(texts).roll(1, 1)
    assert other.identity()['tokenizer'] != before['tokenizer']
    monkeypatch.setattr(open_clip, '__version__', '9.0')
    assert encoder.identity() == {**before, 'open_clip': '9.0'}
    load_classifier(classifier_file, encoder)


# --- GELU ---------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r'QuickGELU.*quick_gelu'):
        OpenCLIPEncoder(tiny_clip['model'], str(file))


def test_file_of_unknown_gelu_is_loaded(tiny_clip, tmp_path):
    """The name is that of OpenAI's file, and the content is not."""
    file = tmp_path / 'RN50.pt'
    file.write_bytes(Path(tiny_clip['pretrained']).read_bytes())
    OpenCLIPEncoder(tiny_clip['model'], str(file))


def test_refused_pairs_name_a_model_that_has_the_weights():
    import open_clip

    from dsnet_mm.clip.loading import check_model

    check_model('roberta-ViT-B-32', 'laion2b_s12b_b32k')
    advised, unlisted = {}, ('ViT-B-32-quickgelu', 'laion2b_s34b_b79k')
    for model, tag in (*open_clip.list_pretrained(), unlisted):
        try:
            check_model(model, tag)
        except ValueError as error:
            advised[model, tag] = str(error).split("use model='")[1].removesuffix("'.")
            check_model(advised[model, tag], tag)
    assert advised['RN50', 'openai'] == 'RN50-quickgelu'
    assert advised[unlisted] == 'ViT-B-32'
    assert len(advised) > 20
    with pytest.raises(ValueError, match='RN50-quickgelu'):
        OpenCLIPEncoder('RN50', 'openai')

"""Other encoders: their own preprocessing, tokenizers and text towers."""

import json
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets.images import build_transform
from dsnet_mm.few_shot import FewShotConfig, load_classifier, run, save_classifier
from dsnet_mm.few_shot.encode import encode
from dsnet_mm.few_shot.methods.coop import PromptLearner
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier

VISION = {
    'image_size': 32,
    'layers': 1,
    'width': 32,
    'head_width': 16,
    'patch_size': 16,
}
TEXT = {'context_length': 24, 'vocab_size': 20, 'width': 16, 'heads': 2, 'layers': 1}
WORDS = ['x', 'y', 'a', 'photo', 'of', 'cat', 'dog', 'two', 'dogs', 'very', 'old']
SIGLIP = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'resize_mode': 'squash'}
MOBILE = {'mean': [0] * 3, 'std': [1] * 3, 'interpolation': 'bilinear'}


def write_tokenizer(folder, start: bool):
    """A tokenizer of words that pads with 1, as SigLIP's, or with a start token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ['<unk>', '</s>', '<s>']
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>' if start else '$A </s>',
        special_tokens=[(word, vocabulary[word]) for word in special[1:]],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token='<unk>',
        pad_token='</s>',
        eos_token='</s>',
        bos_token='<s>',
    ).save_pretrained(folder)


def write_model(folder, kind: str, preprocess: dict) -> str:
    """Writes a model with random weights as open_clip publishes them on the hub."""
    import open_clip

    text = {**TEXT, 'hf_tokenizer_name': str(folder)}
    if kind == 'roberta':
        from transformers import RobertaConfig

        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        RobertaConfig(
            **sizes, intermediate_size=16, vocab_size=20, pad_token_id=1
        ).save_pretrained(folder)
        text = {
            'hf_model_name': str(folder),
            'hf_tokenizer_name': str(folder),
            'hf_pooler_type': 'mean_pooler',
            'context_length': 24,
        }
    else:
        text |= {'no_causal_mask': True, 'pool_type': 'last'}
    model = {'embed_dim': 16, 'custom_text': True, 'vision_cfg': VISION}
    model['text_cfg'] = text
    write_tokenizer(folder, start=kind == 'roberta')
    (folder / 'open_clip_config.json').write_text(
        json.dumps({'model_cfg': model, 'preprocess_cfg': preprocess})
    )
    name = f'local-dir:{folder}'
    torch.manual_seed(0)
    state = open_clip.create_model(name, pretrained_text=False).state_dict()
    torch.save(state, folder / 'open_clip_pytorch_model.bin')
    return name


@pytest.fixture(scope='module', params=['siglip', 'roberta'])
def other_encoder(request, tmp_path_factory):
    pytest.importorskip('transformers', reason='an optional library')
    folder = tmp_path_factory.mktemp(request.param)
    kind = SIGLIP if request.param == 'siglip' else MOBILE
    return OpenCLIPEncoder(write_model(folder, request.param, kind), download=False)


def test_preprocessing_of_the_model(other_encoder):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32] = 255
    wide = Image.fromarray(pixels)
    found = build_transform(other_encoder, 'clip')(wide)
    views = build_transform(other_encoder, 'clip', (0.5, 1))(wide)
    assert found.shape == views.shape == (3, 32, 32)
    if other_encoder.preprocess['resize_mode'] == 'squash':
        assert found[:, :, :8].mean() > 0.99 and found[:, :, 14:].mean() < -0.99
        assert -1 <= views.min() < 0 and views.max() <= 1
    else:
        assert found.abs().max() == 0, 'the centre, neither shifted nor scaled'
        assert views.min() >= 0 and views.max() <= 1


def test_coop_with_other_padding(other_encoder):
    learner = PromptLearner(other_encoder, ['cat', 'two dogs'], n_ctx=3)
    start = int(other_encoder.tokenizer(['x'])[0, 0] == 2)
    assert learner.places.tolist() == [start, start + 1, start + 2]
    token = other_encoder.tokenizer(['x'])[0, start]
    learner.context.data = learner.embedding[0].weight[token].repeat(3, 1)
    expected = other_encoder.encode_classes(['cat.', 'two dogs.'], ['X X X {}'])
    assert torch.allclose(learner.classifier(), expected, atol=1e-6)
    learner.classifier().square().sum().backward()
    assert learner.context.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r'24 tokens .*n_ctx'):
        PromptLearner(other_encoder, ['cat', 'very ' * 10 + 'old dog'], n_ctx=16)


def test_classifier_of_a_folder_model(other_encoder, tmp_path, monkeypatch):
    file = tmp_path / 'classifier.safetensors'
    names = ['cat', 'dog']
    text_features = other_encoder.encode_classes(names, 'photo')
    classifier = CosineClassifier(text_features, other_encoder.logit_scale)
    save_classifier(file, classifier, other_encoder, names, 'clip')
    monkeypatch.chdir(tmp_path)
    deployed = load_classifier(file, model=other_encoder.source()['model'])
    image = Image.new('RGB', (40, 30), 'red')
    assert deployed([image]).sum() == pytest.approx(1)


def test_file_has_the_preprocessing_of_the_tags():
    """All of open_clip's weights of a SigLIP are squashed; a file does not say so."""
    from dsnet_mm.clip import loading

    found = loading._preprocessing_of_tags('ViT-B-16-SigLIP')
    assert found['resize_mode'] == 'squash' and found['mean'] == (0.5, 0.5, 0.5)
    assert loading._preprocessing_of_tags('RN50')['resize_mode'] == 'shortest'
    assert loading._preprocessing_of_tags('ViT-L-14') is None, 'they differ'


def test_nothing_is_fetched_unless_asked(tmp_path, image_folder, monkeypatch):
    class AskedError(BaseException):
        """No library catches it."""

    def refuse(*args, **kwargs):
        raise AskedError

    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    # Weights that earlier programs have fetched are not seen.
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    file = tmp_path / 'classifier.safetensors'
    classifier = CosineClassifier(torch.eye(2, 16), 10.0)
    for model, pretrained in (
        ('RN50-quickgelu', 'openai'),
        ('ViT-B-16-SigLIP', 'webli'),
        ('hf-hub:somebody/something', None),
    ):
        made_by = {'model': model, 'pretrained': pretrained, 'identity': None}
        save_classifier(file, classifier, made_by, ['a', 'b'], 'clip')
        with pytest.raises(FileNotFoundError, match='not on this machine'):
            load_classifier(file)
    with pytest.raises(AskedError):
        load_classifier(file, download=True)
    config = FewShotConfig(
        dataset=str(image_folder),
        model='RN50-quickgelu',
        pretrained='openai',
        shots=(1,),
        cache_dir=str(tmp_path / 'cache'),
    )
    for command in (run, encode):
        with pytest.raises(FileNotFoundError, match='--download'):
            command(config, tmp_path / 'out')
        with pytest.raises(AskedError):
            command(replace(config, download=True), tmp_path / 'out')


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'open_clip_config\.json'):
        OpenCLIPEncoder(f'local-dir:{tmp_path / "none"}')

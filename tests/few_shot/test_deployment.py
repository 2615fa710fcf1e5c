"""Use of classifier files: predict, test, export, from any folder."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from dsnet_mm.datasets import load_task
from dsnet_mm.few_shot import FeatureCache, load_classifier, save_classifier, transfer
from dsnet_mm.few_shot.methods.linear_adapter import LinearAdapter
from dsnet_mm.few_shot.methods.linear_probe import LinearClassifier
from dsnet_mm.few_shot.methods.proker import ProKeR
from dsnet_mm.few_shot.methods.tip_adapter import TipAdapter
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier
from dsnet_mm.few_shot.transfer import Transfer, plot_confusion, table, write_transfer
from dsnet_mm.models import CLIPAdapter, OpenCLIPEncoder

ROOT = Path(__file__).resolve().parents[2]
NAMES = ('blue', 'green sea', 'red')


@pytest.fixture
def tool(monkeypatch):
    """Calls tools/few_shot.py with arguments."""
    import runpy

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['few_shot.py', *map(str, arguments)])
        runpy.run_path(str(ROOT / 'tools' / 'few_shot.py'), run_name='__main__')

    return call


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


def saved(encoder, folder: Path, name: str) -> Path:
    file = folder / f'{name}.safetensors'
    save_classifier(file, classifiers(encoder)[name].eval(), encoder, NAMES, 'clip')
    return file


KINDS = ['cosine', 'linear', 'adapter', 'text_adapter', 'tip', 'proker']
KINDS.append('linear_adapter')


@pytest.mark.parametrize('name', KINDS)
def test_file_of_each_kind_in_batches(encoder, image_folder, tmp_path, name):
    images = sorted(image_folder.glob('*/1*.png'))[:7]
    deployed = load_classifier(saved(encoder, tmp_path, name), encoder)
    found = deployed(images, batch_size=3)
    prepared = torch.stack([deployed.prepare(p) for p in images])
    logits = classifiers(encoder)[name].eval()(encoder(prepared)[0])
    assert torch.allclose(found, logits.softmax(-1), atol=1e-5)
    assert not found.requires_grad
    assert deployed([]).shape == (0, 3)


def test_classifier_of_features_from_elsewhere(encoder, tiny_clip, tmp_path, caplog):
    file = tmp_path / 'elsewhere.safetensors'
    made_by = {'model': tiny_clip['model'], 'pretrained': None, 'identity': None}
    save_classifier(file, classifiers(encoder)['cosine'], made_by, NAMES, 'clip')
    deployed = load_classifier(file, pretrained=tiny_clip['pretrained'])
    assert deployed.encoder.digest() == encoder.digest()
    assert 'cannot be checked' in caplog.text


# --- predict ----------------------------------------------------------------------


@pytest.fixture
def elsewhere(tiny_clip, image_folder, tmp_path, monkeypatch):
    """A classifier that was saved with relative paths, and another current folder."""
    made, used = tmp_path / 'made', tmp_path / 'used'
    made.mkdir()
    used.mkdir()
    config = shutil.copy(tiny_clip['model'], made / 'own_clip.json')
    shutil.copy(tiny_clip['pretrained'], made / 'own.pt')
    monkeypatch.chdir(made)
    encoder = OpenCLIPEncoder('own_clip.json', 'own.pt')
    file = saved(encoder, made, 'cosine')
    Path(config).unlink()  # the classifier file describes the model
    monkeypatch.chdir(used)
    for name in ('a', 'b'):
        for image in sorted(image_folder.glob('red/*.png'))[:3]:
            (used / 'album' / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, used / 'album' / name)
    return file


def test_predict_from_another_folder(tool, elsewhere, capsys, tmp_path):
    Path('album/a/bad.jpg').write_bytes(b'no image')
    Path('album/b/phone.HEIC').touch()
    tool('predict', elsewhere, 'album', '--top', '2', '--batch-size', '2')
    shown = capsys.readouterr()
    assert shown.out.count('album/') == 6 and '3.' not in shown.out.splitlines()[1]
    assert 'not read in album: 1 .heic.' in shown.err
    assert 'skipped: the image album/a/bad.jpg cannot be read' in shown.err
    assert '6 of 7 images classified, 1 skipped.' in shown.err

    out = tmp_path / 'out'
    options = ('--json', out / 'a.json', '--csv', out / 'a.csv')
    tool('predict', elsewhere, 'album', *options)
    content = json.loads((out / 'a.json').read_text())
    assert len(content['predictions']) == 6 and len(content['skipped']) == 1
    rows = list(csv.DictReader((out / 'a.csv').open()))
    deployed = load_classifier(elsewhere)
    for row, entry in zip(rows, content['predictions'], strict=True):
        (expected,) = deployed([row['image']])
        order = expected.argsort(descending=True)
        assert [c['class'] for c in entry['classes']] == [NAMES[i] for i in order]
        assert row['class_1'] == NAMES[order[0]]
        assert float(row['probability_1']) == pytest.approx(
            expected.max().item(), abs=1e-5
        )

    # It is found before anything is classified.
    with pytest.raises(SystemExit, match=r'a\.json exists; choose another name'):
        tool('predict', 'no_such_file', 'album', *options)
    Path('album/[bold]').mkdir()
    (named,) = Path('album/a').glob('0.png')
    named = shutil.copy(named, 'album/[bold]/a[').replace('\\', '/')
    capsys.readouterr()
    tool('predict', elsewhere, named)
    assert '[bold]/a[' in capsys.readouterr().out
    assert torch.equal(deployed(named), deployed([named]))
    for bad, sentence in (
        (('none.jpg',), 'error: there is no image or folder none.jpg'),
        ((out,), r'error: no image in .*out'),
        (('album/a/bad.jpg',), 'error: none of the images can be read'),
        (('album', '--top', '0'), 'error: top must be at least 1'),
        (('album', '--device', 'cuda:7'), "error: there is no device 'cuda:7'"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            tool('predict', elsewhere, *bad)


# --- test -------------------------------------------------------------------------


def test_the_whole_folder_is_tested(tool, elsewhere, image_folder, capsys):
    shutil.copytree(image_folder, 'mine')
    Path('mine/red/bad.png').write_bytes(b'no image')
    tool('test', elsewhere, 'mine')
    assert '72 images of 3 classes' in ' '.join(capsys.readouterr().out.split())
    out = Path('work_dirs/test_cosine_mine')
    found = json.loads((out / 'test.json').read_text())
    deployed = load_classifier(elsewhere)
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for label, name in enumerate(('blue', 'green_sea', 'red')):
        for guess in deployed(sorted(image_folder.glob(f'{name}/*.png'))).argmax(1):
            confusion[label, guess] += 1
    assert found['confusion'] == confusion.tolist()
    assert (found['pictures'], found['skipped']) == (72, 1)
    assert found['accuracy'] == pytest.approx(100 * confusion.trace().item() / 72)
    with Image.open(out / 'confusion.png') as image:
        assert min(image.size) > 300
    tool('test', elsewhere, 'mine')  # the same test may be repeated
    with pytest.raises(SystemExit, match='test of another classifier or data set'):
        tool('test', elsewhere, image_folder, '--out', out)


def test_some_of_the_classes(encoder, image_folder, tmp_path):
    deployed = load_classifier(saved(encoder, tmp_path, 'linear'), encoder)
    for name in ('red', 'blue'):
        shutil.copytree(image_folder / name, tmp_path / 'two' / name)
    items = load_task(tmp_path / 'two', test_only=True).split['test']
    assert len(items) == 48
    features = FeatureCache(tmp_path / 'cache', encoder, quiet=True).images(items)
    logits = deployed.classifier(features.features[0])[:, [0, 2]]
    expected = (logits.argmax(1) == features.labels).float().mean()
    two = transfer(deployed, tmp_path / 'two', cache_dir=tmp_path / 'cache')
    assert two.score.accuracy == pytest.approx(100 * expected.item())
    shutil.rmtree(tmp_path / 'two' / 'blue')
    one = transfer(deployed, tmp_path / 'two', cache_dir=tmp_path / 'cache')
    assert (one.images, one.class_names) == (24, ('red',))
    (tmp_path / 'two' / 'red').rename(tmp_path / 'two' / 'mauve')
    with pytest.raises(ValueError, match=r"does not know 1 of .* such as 'mauve'"):
        transfer(deployed, tmp_path / 'two', cache_dir=tmp_path / 'cache')


def test_a_split_of_the_folder_is_kept(encoder, image_folder, tmp_path):
    deployed = load_classifier(saved(encoder, tmp_path, 'linear'), encoder)
    for part, count in (('train', 5), ('test', 2)):
        for image in image_folder.glob('*/*.png'):
            if int(image.stem) < count:
                to = tmp_path / 'own' / part / image.parent.name
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, to)
    found = transfer(deployed, tmp_path / 'own', cache_dir=tmp_path / 'cache')
    assert found.images == 6


def test_table_and_image_of_many_classes(tmp_path):
    from dsnet_mm.few_shot.evaluation import Score

    count = 120
    confusion = torch.eye(count, dtype=torch.long) * 3
    confusion[5, 7] = 2
    confusion[9] = 0
    result = Transfer(
        'set', Score(99.4, 1, 1), tuple(map(str, range(count))), confusion, 0
    )
    text = table(result)
    assert '| 5 | 5 | 3 | 60.0 | 7 (2) |' in text
    assert '| 9 | 0 | 0 | - | - |' in text
    assert '359 images of 120 classes' in text
    names = ('a|b', *result.class_names[1:])
    assert '| a\\|b | ' in table(replace(result, class_names=names))
    assert plot_confusion(result).startswith(b'\x89PNG')
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='not empty and not a test'):
        write_transfer(tmp_path, 'c.safetensors', result)


# --- Export -----------------------------------------------------------------------


def test_onnx(tool, encoder, elsewhere, image_folder, tmp_path, monkeypatch, capsys):
    for library in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(library, reason='an optional library')
    import onnx
    import onnxruntime

    from dsnet_mm.few_shot import export
    from dsnet_mm.few_shot.export import export_onnx

    programs = []

    def export_once(*args, **kwargs):
        programs.append(programs[0] if programs else torch_export(*args, **kwargs))
        return programs[0]

    torch_export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, 'export', export_once)
    file, out = saved(encoder, tmp_path, 'tip'), tmp_path / 'out' / 'it.onnx'
    deployed = load_classifier(file, encoder)
    with pytest.raises(ValueError, match='would differ from PyTorch by'):
        export_onnx(deployed, out, tolerance=-1.0)
    assert not list(out.parent.iterdir())

    tool('export', file, out)
    assert 'differ from PyTorch by' in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == ['it.onnx']
    images = sorted(image_folder.glob('*/1.png'))
    pixels = torch.stack([deployed.prepare(p) for p in images])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    session = onnxruntime.InferenceSession(str(out))
    (found,) = session.run(None, {'pixels': (pixels * std + mean).numpy()})
    assert torch.allclose(torch.from_numpy(found), deployed(images), atol=1e-5)
    about = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert json.loads(about['class_names']) == list(NAMES)
    with pytest.raises(SystemExit, match=r'it\.onnx exists'):
        tool('export', file, out)

    monkeypatch.setattr(export, 'MOST_IN_ONE_FILE', 0)
    large = tmp_path / 'large' / 'it.onnx'
    export_onnx(deployed, large)
    assert {p.name for p in large.parent.iterdir()} == {'it.onnx', 'it.onnx.data'}
    assert large.stat().st_size < out.stat().st_size
    session = onnxruntime.InferenceSession(str(large))
    (same,) = session.run(None, {'pixels': (pixels * std + mean).numpy()})
    assert (same == found).all()
    large.unlink()
    with pytest.raises(FileExistsError, match=r'it\.onnx\.data exists'):
        export_onnx(deployed, large)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'text_adapter'])
def test_weight_matrix(tool, encoder, tmp_path, name):
    out = tmp_path / 'matrix.safetensors'
    tool('export', saved(encoder, tmp_path, name), out, '--format', 'matrix')
    matrix, f = load_file(out), torch.randn(5, 16)
    logits = F.normalize(f, dim=-1) @ matrix['weight'].t() + matrix['bias']
    expected = classifiers(encoder)[name].eval()(f)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_adapter_in_the_projection_of_open_clip(tool, encoder, tiny_clip, tmp_path):
    import open_clip

    out = tmp_path / 'folded.safetensors'
    file = saved(encoder, tmp_path, 'linear_adapter')
    tool('export', file, out, '--format', 'open_clip')
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


def test_classifiers_that_cannot_be_folded(tool, encoder, tmp_path):
    adapter, out = saved(encoder, tmp_path, 'adapter'), tmp_path / 'out.safetensors'
    with pytest.raises(SystemExit, match='a CLIPAdapter is not linear'):
        tool('export', adapter, out, '--format', 'matrix')
    with pytest.raises(SystemExit, match='only a LinearAdapter can be'):
        tool('export', adapter, out, '--format', 'open_clip')
    with pytest.raises(SystemExit, match='name it with --config'):
        tool('export', adapter, out, '--format', 'classifier')


# --- From MMEngine ----------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_clip, tmp_path):
    """A checkpoint of a head, its configuration and the head."""
    pytest.importorskip('mmpretrain', reason='CLIPAdapterHead extends ClsHead')
    from dsnet_mm.models.heads import CLIPAdapterHead

    head = CLIPAdapterHead(
        encoder=tiny_clip, class_names=['cat', 'dog'], adapter=dict(preset='released')
    ).eval()
    head((torch.randn(2, 16),))
    state = {f'head.{k}': v for k, v in head.state_dict().items()}
    meta = dict(dataset_meta=dict(classes=('cat', 'red_fox')))
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=state, meta=meta), file)
    config = tmp_path / 'config.py'
    config.write_text(
        f'encoder = {tiny_clip!r}\n'
        "model = dict(backbone=dict(type='dsnet_mm.OpenCLIPEncoder', **encoder),\n"
        "    head=dict(type='dsnet_mm.CLIPAdapterHead', class_names='eurosat',\n"
        "              adapter=dict(preset='released')))\n"
    )
    return file, config, head


def test_checkpoint_of_mmengine(tool, checkpoint, encoder, tmp_path):
    file, config, head = checkpoint
    out = tmp_path / 'it.safetensors'
    options = ('--format', 'classifier', '--config', config)
    tool('export', file, out, *options)
    deployed = load_classifier(out, encoder)
    assert deployed.class_names == ('cat', 'red fox')
    f = torch.randn(3, 16)
    assert torch.equal(deployed.classifier(f), head((f,)))

    out.unlink()
    found = torch.load(file, weights_only=False)
    state = found['state_dict']
    for change, sentence in (
        ({'meta': {}}, 'does not hold its class names'),
        ({'meta': {'dataset_meta': {'classes': ('a',)}}}, '2 classes, but 1 class'),
        ({'state_dict': {'backbone.x': torch.zeros(1)}}, 'no CLIP-Adapter with text'),
        (
            {'state_dict': {**state, 'backbone.clip.logit_scale': torch.tensor(0.0)}},
            r'other weights of the encoder .*logit_scale differs',
        ),
    ):
        torch.save({**found, **change}, file)
        with pytest.raises(SystemExit, match=sentence):
            tool('export', file, out, *options)
    torch.save(found, file)
    config.write_text(config.read_text().replace("'released'", "'biased'"))
    with pytest.raises(SystemExit, match='is not that of'):
        tool('export', file, out, *options)
    assert not out.exists()


# --- Data of the datasets library -------------------------------------------------


def write_parquet(path: Path, rows: list[tuple[str, object]], names=None, **columns):
    import io

    import pyarrow as pa
    from pyarrow import parquet

    images = []
    for colour, _ in rows:
        buffer = io.BytesIO()
        Image.new('RGB', (16, 16), colour).save(buffer, 'PNG')
        images.append({'bytes': buffer.getvalue(), 'path': f'{colour}.png'})
    data = pa.table({'image': images, 'label': [label for _, label in rows]} | columns)
    if names:
        features = {'label': {'names': names, '_type': 'ClassLabel'}}
        about = json.dumps({'info': {'features': features}})
        data = data.replace_schema_metadata({'huggingface': about})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(data, path)


def test_parquet_of_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip('pyarrow', reason='an optional library')
    monkeypatch.chdir(tmp_path)
    rows = [('red', 1), ('blue', 0)] * 2
    for part, count in (('train', 4), ('validation', 2), ('test', 2)):
        file = tmp_path / 'set' / 'data' / f'{part}-00000-of-00001.parquet'
        write_parquet(file, rows[:count], ['sea', 'red_fox'])
    task = load_task('set')
    assert task.class_names == ('sea', 'red fox')
    assert [len(task.split[p]) for p in ('train', 'val', 'test')] == [4, 2, 2]
    path, label, name = task.split['test'][0]
    assert (label, name) == (1, 'red_fox')
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    monkeypatch.setattr('dsnet_mm.datasets.parquet._unpack', None)
    assert load_task('set') == task, 'the images are unpacked once'
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    Path('set/data/test-00000-of-00001.parquet').unlink()
    with pytest.raises(ValueError, match=r'\.parquet .* are of train and val; name'):
        load_task('set')


def test_parquet_without_split_and_with_names_as_labels(tmp_path, monkeypatch):
    pytest.importorskip('pyarrow', reason='an optional library')
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'all.parquet'
    write_parquet(file, [('red', 'fox'), ('blue', 'sea')] * 4)
    task = load_task(file)
    assert task.class_names == ('fox', 'sea')
    assert [len(task.split[p]) for p in ('train', 'val', 'test')] == [4, 0, 4]
    assert len(load_task(file, test_only=True).split['test']) == 8

    write_parquet(file, [('red', 0), ('blue', 1)] * 4)
    with pytest.raises(ValueError, match=r'all\.parquet .* no names of labels'):
        load_task(file)
    file.write_bytes(b'garbage')
    with pytest.raises(ValueError, match=r'all\.parquet cannot be read as parquet'):
        load_task(file)
    assert not list((tmp_path / 'work_dirs').rglob('.*'))


def test_parquet_of_other_content(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip('pyarrow', reason='an optional library')
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (8, 8)).save('a.png')
    image = {'bytes': Path('a.png').read_bytes(), 'path': 'a.png'}
    for name, label, sentence in (
        ('list', [['cat'], ['dog']], 'labels must be numbers or names'),
        ('none', [], 'have no rows'),
        ('number', [0, 1], 'no names of labels'),
    ):
        table = pyarrow.table({'image': [image] * len(label), 'label': label})
        for metadata in ('{"info": 3}', '{'):  # not of the datasets library
            other = table.replace_schema_metadata({'huggingface': metadata})
            parquet.write_table(other, f'{name}.parquet')
            with pytest.raises(ValueError, match=sentence) as error:
                load_task(f'{name}.parquet')
            assert f'{name}.parquet' in str(error.value)


def test_pyarrow_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'all.parquet').write_bytes(b'x')
    with pytest.raises(ImportError, match=r'all\.parquet needs pyarrow: pip install'):
        load_task('all.parquet')

"""Bad input: one sentence with the name of the file, and no traceback."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dsnet_mm.clip.prompts import resolve_prompts
from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.images import open_image
from dsnet_mm.few_shot import FeatureCache, load_classifier, save_classifier
from dsnet_mm.few_shot.methods.linear_probe import LinearClassifier
from dsnet_mm.few_shot.methods.tip_adapter import TipAdapter
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier
from dsnet_mm.models import OpenCLIPEncoder


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert '\n' not in text and 'Traceback' not in text
    return text


# --- Images ---------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, 'big')
        return len(data).to_bytes(4, 'big') + kind + data + crc

    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\x00\0\0\0'
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IEND', b'')


def saved(path: Path, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path.read_bytes()


def bomb(path: Path) -> None:
    path.write_bytes(png_header(60_000, 60_000))


def truncated(path: Path) -> None:
    path.write_bytes(saved(path)[:700])


def empty(path: Path) -> None:
    path.write_bytes(b'')


def text(path: Path) -> None:
    path.write_text('no image')


def float_grey(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path)


@pytest.mark.parametrize(
    ('name', 'make'),
    [
        ('a.png', bomb),
        ('a.jpg', truncated),
        ('a.png', truncated),
        ('a.tif', truncated),
        ('a.bmp', truncated),
        ('a.jpg', empty),
        ('a.heic', text),
        ('a.tif', float_grey),
    ],
)
def test_unreadable_image(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError, match='cannot be read') as error:
        open_image(tmp_path / name)
    assert name in one_sentence(error)


@pytest.mark.parametrize('suffix', ['bmp', 'tif'])
def test_flipped_bytes_raise_value_errors_only(tmp_path, suffix):
    path = tmp_path / f'a.{suffix}'
    content = saved(path)
    rng = np.random.default_rng(0)
    refused = 0
    for place in range(64):  # the headers of both formats are at the start or the end
        for at in (place, -place - 1):
            changed = bytearray(content)
            changed[at] ^= int(rng.integers(1, 256))
            path.write_bytes(changed)
            try:
                open_image(path)
            except ValueError as error:
                refused += 1
                assert path.name in str(error)
    assert refused > 5


def test_sixteen_bit_grey_is_scaled(tmp_path):
    grey = np.array([[0, 0x4040], [0x8080, 0xFFFF]], np.uint16)
    for suffix in ('png', 'tif'):
        Image.fromarray(grey).save(tmp_path / f'a.{suffix}')
        found = np.asarray(open_image(tmp_path / f'a.{suffix}'))
        assert found[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]]


def test_rotated_image_is_upright_on_all_routes(tmp_path, encoder):
    from mmcv import imread

    from dsnet_mm.few_shot.deployment import DeployedClassifier

    half = np.zeros((32, 64, 3), np.uint8)
    half[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = tmp_path / 'a.jpg'
    Image.fromarray(half).save(path, exif=exif, quality=95)
    upright = np.asarray(open_image(path)).astype(int)
    assert upright.shape == (64, 32, 3)
    assert upright[:30].min() > 200 and upright[34:].max() < 55
    assert abs(upright - imread(str(path), channel_order='rgb')).max() < 20
    deployed = DeployedClassifier(torch.nn.Identity(), encoder, ['a'] * 16, 'clip')
    with Image.open(path) as image:
        assert torch.equal(deployed.prepare(image), deployed.prepare(path))
        assert image.size == (64, 32), 'the image of the caller is left as it is'


# --- Folders and CSV files --------------------------------------------------------


def folder_of(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (8, 8), (i, 0, 0)).save(root / name / f'{i}.png')
    return root


def test_folder_with_train_and_without_test(tmp_path):
    folder_of(tmp_path / 'mine' / 'train', {'a': 2, 'b': 2})
    folder_of(tmp_path / 'mine' / 'validation', {'a': 2, 'b': 2})
    with pytest.raises(ValueError, match='but no folder test') as error:
        load_task(tmp_path / 'mine')
    assert 'mine' in one_sentence(error)
    folder_of(tmp_path / 'mine' / 'test', {'a': 1, 'b': 1})
    split = load_task(tmp_path / 'mine').split
    assert [len(split[part]) for part in ('train', 'val', 'test')] == [4, 4, 2]


def test_class_named_train(tmp_path):
    task = load_task(folder_of(tmp_path, {'bus': 4, 'train': 4}))
    assert task.class_names == ('bus', 'train')


def test_files_that_are_not_read_are_counted(tmp_path, caplog):
    folder_of(tmp_path, {'a': 2, 'b': 2})
    for i in range(3):
        (tmp_path / 'a' / f'{i}.HEIC').touch()
    (tmp_path / 'notes.txt').touch()
    load_task(tmp_path)
    assert '3 .heic, 1 .txt' in caplog.text
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / '1.heic').touch()
    with pytest.raises(ValueError, match=r'no image, but 1 \.heic; convert') as error:
        load_task(tmp_path)
    assert str(tmp_path / 'c') in one_sentence(error)


@pytest.mark.parametrize('names', [('Fox', 'fox'), ('red fox', 'red_ fox')])
def test_class_names_that_differ_in_case_or_blanks(tmp_path, names):
    folder_of(tmp_path / 'mine', dict.fromkeys(names, 2))
    with pytest.raises(ValueError, match='duplicate class names') as error:
        load_task(tmp_path / 'mine')
    assert 'mine' in one_sentence(error)


def test_class_names_with_the_same_first_tokens(encoder):
    names = [f'{"very " * 30}old {animal}' for animal in ('cat', 'dog')]
    with pytest.raises(ValueError, match='the same first 24 tokens') as error:
        encoder.encode_classes(names, 'photo')
    assert "cat'" in one_sentence(error)
    assert len(encoder.encode_classes(['missile', 'missile'], 'photo')) == 2


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        ('path,class\na.png,caf\xe9\n'.encode('latin-1'), 'not in UTF-8 .line 2.'),
        (b'path,class\na.png,x\nb.png\n', 'line 3 does not have one value'),
        (b'path,class\na.png,x,y\n', 'line 2 does not have one value'),
        (b'path,class\na.png,\n', 'line 2 does not have one value'),
        (b'path,class\n"a.png,x\n', 'is no CSV'),
        (b'"path,class\n', 'line 1 is no CSV'),
        (b'', 'must have the columns path and class'),
        (b'path,class,split\na.png,x,dev\n', "got 'dev'"),
        (b'path,class\na.png,x\n', 'at least two'),
    ],
)
def test_bad_csv(tmp_path, content, sentence):
    (tmp_path / 'list.csv').write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        load_task(tmp_path / 'list.csv')
    assert 'list.csv' in one_sentence(error)


def test_csv_with_byte_order_mark_and_upper_case_suffix(tmp_path):
    rows = [f'{name}{i}.png,{name}' for name in 'ab' for i in range(2)]
    (tmp_path / 'LIST.CSV').write_text(
        '\n'.join(['path,class', *rows]), encoding='utf-8-sig'
    )
    assert load_task(tmp_path / 'LIST.CSV').class_names == ('a', 'b')
    (tmp_path / 'metadata.csv').write_text('\n'.join(['file_name,label', *rows]))
    assert load_task(tmp_path / 'metadata.csv').class_names == ('a', 'b')


def test_file_of_prompts(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('a café {}.\n\nan old {}.\n', encoding='utf-8-sig')
    assert resolve_prompts(path) == ('a café {}.', 'an old {}.')
    path.write_text('a café {}.', encoding='latin-1')
    with pytest.raises(ValueError, match=r'prompts\.txt is not in UTF-8'):
        resolve_prompts(path)


def test_folder_in_the_place_of_a_cache_file(encoder, tmp_path):
    cache = FeatureCache(tmp_path / 'cache', encoder, quiet=True)
    image = folder_of(tmp_path / 'mine', {'a': 1}) / 'a' / '0.png'
    items = [(str(image), 0, 'a')]
    features = cache.images(items)
    cache.texts(['a', 'b'], ['{}'])
    for file in list((tmp_path / 'cache').rglob('*.safetensors')):
        file.unlink()
        file.mkdir()
    again = FeatureCache(tmp_path / 'cache', encoder, quiet=True)
    with pytest.raises(FileExistsError, match=r'texts_.* is a folder') as error:
        again.texts(['a', 'b'], ['{}'])
    one_sentence(error)
    with pytest.raises(FileExistsError, match=r'images_.* is a folder') as error:
        again.images(items)
    one_sentence(error)
    assert len(features) == 1


# --- Weights ----------------------------------------------------------------------


def no_weights(good: Path, bad: Path) -> None:
    bad.write_bytes(b'')


def garbage(good: Path, bad: Path) -> None:
    bad.write_bytes(b'garbage' * 100)


def half_a_file(good: Path, bad: Path) -> None:
    bad.write_bytes(good.read_bytes()[:10_000])


def incomplete(good: Path, bad: Path) -> None:
    state = torch.load(good)
    state.pop('visual.proj')
    torch.save(state, bad)


def empty_state(good: Path, bad: Path) -> None:
    torch.save({}, bad)


def another_model(good: Path, bad: Path) -> None:
    state = torch.load(good)
    torch.save({k: v[..., :1].clone() if v.dim() else v for k, v in state.items()}, bad)


def nan(good: Path, bad: Path) -> None:
    state = torch.load(good)
    state['visual.proj'][0, 0] = torch.nan
    torch.save(state, bad)


@pytest.mark.parametrize(
    ('damage', 'suffix'),
    [
        *((d, 'pt') for d in (no_weights, garbage, half_a_file, incomplete)),
        *((d, 'pt') for d in (empty_state, another_model, nan)),
        *((d, 'safetensors') for d in (no_weights, garbage, half_a_file)),
    ],
)
def test_bad_weights(tiny_clip, tmp_path, damage, suffix):
    bad = tmp_path / f'weights.{suffix}'
    damage(Path(tiny_clip['pretrained']), bad)
    with pytest.raises(ValueError, match=r'weights\.') as error:
        OpenCLIPEncoder(tiny_clip['model'], str(bad))
    one_sentence(error)
    assert 'weights_only' not in str(error.value)


def test_torchscript_archive(encoder, tiny_clip, tmp_path):
    """OpenAI's files are TorchScript archives with three more entries."""

    class Archive(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            for name, module in clip.named_children():
                self.add_module(name, module)
            for name, value in (
                *clip.named_parameters(recurse=False),
                ('input_resolution', torch.tensor(32)),
                ('context_length', torch.tensor(24)),
                ('vocab_size', torch.tensor(49408)),
            ):
                self.register_buffer(name, value.detach())

        def forward(self, x):
            return self.visual(x)

    config = json.loads(Path(tiny_clip['model']).read_text())
    config['quick_gelu'] = True  # as OpenAI's models have
    own = OpenCLIPEncoder(config, tiny_clip['pretrained'])
    traced = torch.jit.trace(Archive(own.clip), torch.randn(1, 3, 32, 32))
    torch.jit.save(traced, tmp_path / 'RN50.pt')
    loaded = OpenCLIPEncoder(config, str(tmp_path / 'RN50.pt'))
    assert loaded.digest() == own.digest()


# --- Classifier files -------------------------------------------------------------


@pytest.fixture
def classifier_file(encoder, tmp_path):
    path = tmp_path / 'good.safetensors'
    save_classifier(
        path, CosineClassifier(torch.eye(3, 16), 10.0), encoder, ['a', 'b', 'c'], 'clip'
    )
    return path


def rewrite(source: Path, target: Path, change_about=None, change_tensors=None) -> None:
    from safetensors import safe_open

    with safe_open(source, 'pt') as file:
        about = json.loads(file.metadata()['dsnet_mm'])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_about:
        about = change_about(about)
    if change_tensors:
        change_tensors(tensors)
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, target, {'dsnet_mm': text})


DAMAGES = {
    'no JSON': (lambda a: '{"kind"', None),
    'a list': (lambda a: [], None),
    'unknown kind': (lambda a: a | {'kind': 'Oracle'}, None),
    'no kind': (lambda a: {k: v for k, v in a.items() if k != 'kind'}, None),
    'no names': (lambda a: {k: v for k, v in a.items() if k != 'class_names'}, None),
    'too few names': (lambda a: a | {'class_names': ['a']}, None),
    'names are a text': (lambda a: a | {'class_names': 'abc'}, None),
    'model is a number': (lambda a: a | {'model': 5}, None),
    'identity is a list': (lambda a: a | {'identity': []}, None),
    'identity without model': (lambda a: a | {'model': None}, None),
    'configuration': (lambda a: a | {'identity': {'config': 1}}, None),
    'names are numbers': (lambda a: a | {'class_names': [1, 2, 3]}, None),
    'no model': (lambda a: {k: v for k, v in a.items() if k != 'model'}, None),
    'swapped kinds': (lambda a: a | {'kind': 'LinearClassifier'}, None),
    'unknown option': (lambda a: a | {'options': {'gamma': 1}}, None),
    'preprocessing': (lambda a: a | {'preprocessing': 'stretch'}, None),
    'no tensor': (None, lambda t: t.pop('text_features')),
    'no numbers': (None, lambda t: t['text_features'].fill_(torch.nan)),
    'shape': (None, lambda t: t.update(text_features=torch.eye(16)[0])),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_classifier_file(classifier_file, tmp_path, name):
    bad = tmp_path / 'bad.safetensors'
    rewrite(classifier_file, bad, *DAMAGES[name])
    with pytest.raises(ValueError, match=r'bad\.safetensors is a damaged') as error:
        load_classifier(bad)
    one_sentence(error)


def test_files_that_are_no_classifiers(classifier_file, encoder, tiny_clip, tmp_path):
    bad = tmp_path / 'bad.safetensors'
    for content in (b'', b'garbage', classifier_file.read_bytes()[:-9]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r'bad\.safetensors is not a class'):
            load_classifier(bad, encoder)
    save_file({'weight': torch.eye(3)}, bad)
    with pytest.raises(ValueError, match=r'bad\.safetensors .* but no classifier'):
        load_classifier(bad, encoder)
    with pytest.raises(ValueError, match=r'tiny\.pt is not a classifier'):
        load_classifier(tiny_clip['pretrained'], encoder)
    with pytest.raises(FileNotFoundError, match='there is no classifier file'):
        load_classifier(tmp_path / 'none.safetensors', encoder)


def test_labels_of_no_class(encoder, tmp_path):
    keys, text_features = torch.eye(4, 16), torch.eye(3, 16)
    tip = TipAdapter(keys, torch.tensor([0, 1, 2, 3]), text_features, 10.0)
    save_classifier(tmp_path / 'tip.safetensors', tip, encoder, ['a', 'b', 'c'], 'clip')
    with pytest.raises(ValueError, match=r'tip\.safetensors is a damaged'):
        load_classifier(tmp_path / 'tip.safetensors', encoder)


def test_classifier_of_another_width(encoder, tmp_path):
    file = tmp_path / 'wide.safetensors'
    made_by = {'model': None, 'pretrained': None, 'identity': None}
    save_classifier(
        file, LinearClassifier(torch.eye(2, 8)), made_by, ['a', 'b'], 'clip'
    )
    with pytest.raises(ValueError, match='features of width 8'):
        load_classifier(file, encoder)
    for about in (made_by, {**made_by, 'model': 'ViT-B-32'}):
        save_classifier(
            file, LinearClassifier(torch.eye(2, 8)), about, ['a', 'b'], 'clip'
        )
        with pytest.raises(ValueError, match='does not name its encoder'):
            load_classifier(file)


def test_moved_weights(classifier_file, tiny_clip, tmp_path):
    own = Path(shutil.copy(tiny_clip['pretrained'], tmp_path / 'own.pt'))
    encoder = OpenCLIPEncoder(tiny_clip['model'], str(own))
    file = tmp_path / 'moved.safetensors'
    classifier = CosineClassifier(torch.eye(2, 16), 10.0)
    save_classifier(file, classifier, encoder, ['a', 'b'], 'clip')
    own.rename(tmp_path / 'elsewhere.pt')
    with pytest.raises(FileNotFoundError, match=r'own\.pt, which are not there'):
        load_classifier(file)
    load_classifier(file, pretrained=str(tmp_path / 'elsewhere.pt'))

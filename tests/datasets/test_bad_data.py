"""Images, folders, CSV and parquet files: what is read, and what is refused."""

import csv
import io
import json
import os
import sys
import tempfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.features import FeatureCache
from dsnet_mm.datasets.images import is_image, open_image
from dsnet_mm.datasets.readers import PART_NAMES
from dsnet_mm.few_shot.deployment import DeployedClassifier
from tests.damage import damaged_bytes, damaged_json, quick, read_or_refuse
from tests.datasets.test_tasks import make_folder

# --- Images ---------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, 'big')
        return len(data).to_bytes(4, 'big') + kind + data + crc

    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\x00\0\0\0'
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IEND', b'')


def encoded(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(
        buffer, {'jpg': 'jpeg', 'tif': 'tiff'}.get(suffix, suffix)
    )
    return buffer.getvalue()


def test_unreadable_images(tmp_path):
    cut = {f'{suffix}.{suffix}': encoded(suffix)[:700] for suffix in ('jpg', 'png')}
    cut |= {f'{suffix}.{suffix}': encoded(suffix)[:700] for suffix in ('tif', 'bmp')}
    bomb = {'bomb.png': png_header(60_000, 60_000)}
    for name, content in {**cut, **bomb, 'no.jpg': b'', 'a.heic': b'text'}.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / 'float.tif')
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 8
    for path in paths:
        with pytest.raises(ValueError, match=path.name) as error:
            open_image(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('suffix', ['bmp', 'tif'])
def test_flipped_bytes_raise_value_errors_only(tmp_path, suffix):
    path, content = tmp_path / f'a.{suffix}', encoded(suffix)
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


def test_files_that_are_not_read_are_counted(tmp_path, caplog):
    make_folder(tmp_path, {'a': 2, 'b': 2})
    for name in ('a/1.HEIC', 'a/2.HEIC', 'a/3.HEIC', 'notes.txt'):
        (tmp_path / name).touch()
    load_task(tmp_path)
    assert '3 .heic, 1 .txt' in caplog.text
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / '1.heic').touch()
    with pytest.raises(ValueError, match=r'\.heic') as error:
        load_task(tmp_path)
    assert str(tmp_path / 'c') in str(error.value)


@pytest.mark.parametrize('names', [('Fox', 'fox'), ('red fox', 'red_ fox')])
def test_class_names_that_differ_in_case_or_blanks(tmp_path, names):
    make_folder(tmp_path / 'mine', dict.fromkeys(names, 2))
    with pytest.raises(ValueError, match='mine'):
        load_task(tmp_path / 'mine')


@pytest.mark.parametrize(
    ('content', 'fact'),
    [
        ('path,class\na.png,caf\xe9\n'.encode('latin-1'), 'UTF-8.*line 2'),
        (b'path,class\na.png,x\nb.png\n', 'line 3'),
        (b'path,class\na.png,x,y\n', 'line 2'),
        (b'path,class\na.png,\n', 'line 2'),
        (b'path,class\n"a.png,x\n', 'CSV'),
        (b'"path,class\n', 'line 1'),
        (b'', 'path and class'),
        (b'path,class,split\na.png,x,dev\n', "'dev'"),
        (b'path,class,file_name\na.png,x,b.png\n', 'file_name'),
        (b'path,class\na.png,x\n', 'at least two'),
    ],
)
def test_bad_csv(tmp_path, content, fact):
    (tmp_path / 'list.csv').write_bytes(content)
    with pytest.raises(ValueError, match=fact) as error:
        load_task(tmp_path / 'list.csv')
    assert 'list.csv' in str(error.value) and '\n' not in str(error.value)


cells = st.sampled_from(('4.png', 'c', '"a, b"', '"\n"', ' ', '\0', '"'))
parts = st.sampled_from(('train', 'val', 'test', 'dev'))
CSV = 'path,class,split\nx/1.png,"a, b",train\n2.png,c,train\n3.png,c,test\n'


@quick
@given(
    damaged_bytes(CSV.encode()) | st.lists(st.tuples(cells, cells, parts), max_size=3)
)
def test_damaged_csv(tmp_path, content):
    if not isinstance(content, bytes):
        content = (CSV + '\n'.join(map(','.join, content))).encode()
    path = tmp_path / 'list.csv'
    path.write_bytes(content)
    if task := read_or_refuse(lambda: load_task(path), path.name):
        text = io.StringIO(content.decode('utf-8-sig'), newline='')
        columns, *rows = [row for row in csv.reader(text) if row]
        assert {(p, cls) for items in task.split.values() for p, _, cls in items} == {
            (str(tmp_path / row[at('path')]), row[at('class')])
            for at in [[name.strip() for name in columns].index]
            for row in rows
        }


folders = st.sampled_from(
    ('train', 'test', 'Test', 'val', 'valid', 'a', 'b_c', '.d', 'e.png')
)
files = st.sampled_from(('1.png', '2.JPG', '.3.png', '4.txt', ''))
CLASSES = [((name,), file) for name in ('a', 'b_c') for file in ('5.png', '6.png')]
PARTS = [((part, *cls), file) for part in ('train', 'Test') for cls, file in CLASSES]


@settings(quick, max_examples=60)
@given(
    st.sampled_from((CLASSES, PARTS)),
    st.lists(st.tuples(st.lists(folders, min_size=1, max_size=3), files), max_size=4),
)
@example(CLASSES, [(['a', 'e.png'], '')])  # a folder with the name of an image
@example(PARTS, [(['valid', 'a'], '1.png'), (['val', 'a'], '1.png')])
def test_any_tree_of_folders(whole, tree):
    with tempfile.TemporaryDirectory(prefix='mine') as root:
        for place, name in [*whole, *tree]:
            folder = Path(root, *place)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        task = read_or_refuse(lambda: load_task(root), root)
        if task is None:
            return
        found = {
            Path(item[0]).relative_to(root)
            for part in task.split.values()
            for item in part
        }
        depth = min(len(path.parts) for path in found)
        assert found == {
            path
            for path in (
                p.relative_to(root) for p in Path(root).rglob('*') if p.is_file()
            )
            if len(path.parts) >= depth
            and is_image(path)
            and not any(name.startswith('.') for name in path.parts)
            and (depth == 2 or path.parts[0].lower() in PART_NAMES)
        }


def test_csv_with_byte_order_mark_and_upper_case_suffix(tmp_path):
    rows = [f'{name}{i}.png,{name}' for name in 'ab' for i in range(2)]
    (tmp_path / 'LIST.CSV').write_text(
        '\n'.join(['path,class', *rows]), encoding='utf-8-sig'
    )
    assert load_task(tmp_path / 'LIST.CSV').class_names == ('a', 'b')
    (tmp_path / 'metadata.csv').write_text('\n'.join(['file_name,label', *rows]))
    assert load_task(tmp_path / 'metadata.csv').class_names == ('a', 'b')


def test_folder_in_the_place_of_a_cache_file(encoder, tmp_path):
    image = make_folder(tmp_path / 'mine', {'a': 1}) / 'a' / '0.png'
    items = [(str(image), 0, 'a')]
    cache = FeatureCache(tmp_path / 'cache', encoder, quiet=True)
    cache.images(items)
    cache.texts(['a', 'b'], ['{}'])
    for file in list((tmp_path / 'cache').rglob('*.safetensors')):
        file.unlink()
        file.mkdir()
    again = FeatureCache(tmp_path / 'cache', encoder, quiet=True)
    with pytest.raises(FileExistsError, match=r'texts_.* folder'):
        again.texts(['a', 'b'], ['{}'])
    with pytest.raises(FileExistsError, match=r'images_.* folder'):
        again.images(items)


# --- Data of the datasets library -------------------------------------------------


def write_parquet(path: Path, rows: list[tuple[str, object]], names=None, about=None):
    import pyarrow as pa
    from pyarrow import parquet

    images = []
    for colour, _ in rows:
        buffer = BytesIO()
        Image.new('RGB', (16, 16), colour).save(buffer, 'PNG')
        images.append({'bytes': buffer.getvalue(), 'path': f'{colour}.png'})
    data = pa.table({'image': images, 'label': [label for _, label in rows]})
    if names:
        features = {'label': {'names': names, '_type': 'ClassLabel'}}
        about = json.dumps({'info': {'features': features}})
    if about:
        data = data.replace_schema_metadata({'huggingface': about})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(data, path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    pytest.importorskip('pyarrow', reason='an optional library')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parquet_of_the_datasets_library(here):
    rows = [('red', 1), ('blue', 0)] * 2
    for part, count in (('train', 4), ('validation', 2), ('test', 2)):
        file = Path('set/data') / f'{part}-00000-of-00001.parquet'
        write_parquet(file, rows[:count], ['sea', 'red_fox'])
    task = load_task('set')
    assert task.class_names == ('sea', 'red fox')
    assert [len(task.split[p]) for p in ('train', 'val', 'test')] == [4, 2, 2]
    path, label, name = task.split['test'][0]
    assert (label, name) == (1, 'red_fox')
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    unpacked = os.stat(path).st_mtime_ns
    assert load_task('set') == task
    assert os.stat(path).st_mtime_ns == unpacked, 'the images are unpacked once'
    Path('set/data/test-00000-of-00001.parquet').unlink()
    with pytest.raises(ValueError, match=r'\.parquet.*train and val'):
        load_task('set')


def test_parquet_without_split_and_with_names_as_labels(here):
    file = here / 'all.parquet'
    write_parquet(file, [('red', 'fox'), ('blue', 'sea')] * 4)
    task = load_task(file)
    assert task.class_names == ('fox', 'sea')
    assert [len(task.split[p]) for p in ('train', 'val', 'test')] == [4, 0, 4]
    assert len(load_task(file, test_only=True).split['test']) == 8
    file.write_bytes(b'garbage')
    with pytest.raises(ValueError, match=r'all\.parquet'):
        load_task(file)
    assert not list((here / 'work_dirs').rglob('.*'))


def test_parquet_of_other_content(here):
    for name, labels, fact in (
        ('list', [['cat'], ['dog']], 'label'),
        ('none', [], 'row'),
        ('number', [0, 1], 'names of labels'),
    ):
        for about in ('{"info": 3}', '{'):  # not of the datasets library
            rows = [('red', label) for label in labels]
            write_parquet(here / f'{name}.parquet', rows, about=about)
            with pytest.raises(ValueError, match=fact) as error:
                load_task(f'{name}.parquet')
            assert f'{name}.parquet' in str(error.value)


@given(st.data())
@quick
def test_damaged_parquet(here, data):
    file = here / 'all.parquet'
    about = {'info': {'features': {'label': {'names': ['sea', 'fox']}}}}
    if damage_names := data.draw(st.booleans()):
        about = data.draw(damaged_json(about))
    write_parquet(file, [('red', 1), ('blue', 0)] * 2, about=json.dumps(about))
    if not damage_names:
        file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    task = read_or_refuse(lambda: load_task(file), 'all')
    if task and damage_names:
        assert len(task.class_names) >= 2 and len(task.split['test']) == 2


def test_pyarrow_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'all.parquet').write_bytes(b'x')
    with pytest.raises(ImportError, match=r'all\.parquet.*pip install'):
        load_task('all.parquet')

"""The converters of CIFAR-10 and the nuclei, on small files in the sets' layouts."""

import json
import pickle
import shutil
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from mmengine.registry import DATASETS, init_default_scope
from pycocotools.coco import COCO

from dsnet_mm.engine.config import load_config
from tests.conftest import tool
from tests.damage import damaged_bytes, quick, read_or_refuse

CLASSES = ('bird', 'cat')
# The splits of nuclei images that have been public since 2018.
NAMES = {
    '00071198d059ba7f5914a526d124d28e6d010c92466da21d4a04cd5413362552': 'train',
    '0287e7ee5b007c91ae2bd7628d09735e70496bc6127ecb7f3dd043e04ce37426': 'val',
}


def convert_cifar(source: Path, out: Path) -> None:
    tool('dataset_converters/cifar10_to_folders.py').main([str(source), str(out)])


def convert_nuclei(source: Path, out: Path) -> None:
    args = [str(source), str(out), '--max-pixels', '5000']
    tool('dataset_converters/nuclei_to_coco.py').main(args)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive of 20 training and 2 test images of each class of CIFAR-10."""
    path = tmp_path / 'cifar10.zip'
    with zipfile.ZipFile(path, 'w') as file:
        for split, count in (('train', 20), ('test', 2)):
            for kind in CLASSES:
                for i in range(count):
                    _, png = cv2.imencode('.png', np.full((32, 32, 3), i, np.uint8))
                    file.writestr(f'{split}/{kind}/{i:02}.png', png.tobytes())
    return path


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    """Two images of 40 x 30 pixels with two nuclei each, and a large one."""
    for name, size in {**dict.fromkeys(NAMES, (40, 30)), 'large': (300, 300)}.items():
        folder = tmp_path / 'stage1_train' / name
        (folder / 'images').mkdir(parents=True)
        (folder / 'masks').mkdir()
        cv2.imwrite(str(folder / 'images' / f'{name}.png'), np.zeros((*size, 4)))
        for i, (x, y, w, h) in enumerate(((2, 3, 5, 7), (20, 10, 9, 4))):
            mask = np.zeros(size, np.uint8)
            mask[y : y + h, x : x + w] = 255
            cv2.imwrite(str(folder / 'masks' / f'{i}.png'), mask)
        cv2.imwrite(str(folder / 'masks' / 'empty.png'), np.zeros(size))
    return tmp_path / 'stage1_train'


def test_archive_of_cifar(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'cifar10'
    convert_cifar(archive, out)
    counts = 'train: 36 images, val: 4 images, test: 4 images'
    assert counts in capsys.readouterr().out
    lists = {
        name: (out / f'{name}.txt').read_text().split('\n')[:-1]
        for name in ('train', 'val', 'test')
    }
    assert not set(lists['train']) & set(lists['val'])
    assert lists['val'][:2] == ['bird/00.png 0', 'bird/10.png 0']
    assert lists['test'][-1] == 'cat/01.png 1'
    for name, lines in lists.items():
        folder = out / ('test' if name == 'test' else 'train')
        for line in lines:
            image = cv2.imread(str(folder / line.split()[0]))
            assert (image == int(line.split()[0][-6:-4])).all()


def zip_of(**members: bytes) -> bytes:
    """An archive of members with / for __ and .png at the end."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace('__', '/') + '.png', content)
    return buffer.getvalue()


MEMBERS = {
    f'{split}__{kind}__{i}': bytes([i]) * 9
    for split, count in (('train', 3), ('test', 1))
    for kind in CLASSES
    for i in range(count)
}
CIFAR = tool('dataset_converters/cifar10_to_folders.py')


@quick
@given(damaged_bytes(zip_of(**MEMBERS)))
def test_damaged_archive(tmp_path: Path, content: bytes) -> None:
    source, out = tmp_path / 'odd.zip', tmp_path / 'out'
    source.write_bytes(content)
    if read_or_refuse(lambda: CIFAR.convert(source, out), source.name):
        found = {
            '__'.join(path.relative_to(out).with_suffix('').parts): path.read_bytes()
            for path in out.rglob('*.png')
        }
        assert found == MEMBERS
        shutil.rmtree(out)
    assert not out.exists()


def test_archives_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = bytes(2_000_000)
    cut = zip_of(**MEMBERS)
    lies = zip_of(train__cat__0=zeros).replace(
        len(zeros).to_bytes(4, 'little'), (9).to_bytes(4, 'little')
    )
    encrypted = bytearray(zip_of(**MEMBERS))
    encrypted[6] |= 1  # the flags of the first member, and in the directory at the end
    encrypted[encrypted.index(b'PK\1\2') + 8] |= 1
    monkeypatch.setattr(CIFAR, 'MOST_BYTES', 3_000_000)
    packed = BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_BZIP2) as file:
        file.writestr('train/cat/0.png', b'')
    for content, fact in (
        (zip_of(train__cat__0=zeros), '2000000'),
        (lies, 'CRC'),
        (zip_of(**{f'train__cat__{i}': zeros[: 2**20] for i in range(3)}), '3000000'),
        (packed.getvalue(), 'deflate'),
        (bytes(encrypted), 'encrypted'),
        (cut[: len(cut) // 2], 'zip'),
        (zip_of(**{'train__..__0': b''}), '..'),
        (zip_of(**{'train__ca\nt__0': b''}), 'train/CLASS'),
        (zip_of(**{'a__train__cat__0': b'', 'b__train__cat__0': b''}), 'twice'),
        (zip_of(), 'classes'),
    ):
        (tmp_path / 'odd.zip').write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r'odd\.zip') as error:
            CIFAR.convert(tmp_path / 'odd.zip', tmp_path / 'out')
        assert fact in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 2**24, 'bytes at once'
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ['odd.zip']


def test_official_files_of_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels and rows of the images are where the published files have them."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    red = np.zeros((2, 3, 32, 32), np.uint8)
    red[:, 0, 5] = 255  # the sixth row
    for name in ('data_batch_1', 'test_batch'):
        batch = dict(data=red.reshape(2, -1), labels=[0, 1])
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = dict(label_names=list(CLASSES))
    (folder / 'batches.meta').write_bytes(pickle.dumps(meta))
    # The published checksums are those of other images.
    monkeypatch.setattr(CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr(CIFAR10, 'train_list', [['data_batch_1', None]])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test_batch', None]])
    monkeypatch.setitem(CIFAR10.meta, 'md5', None)
    convert_cifar(tmp_path, tmp_path / 'out')
    image = cv2.imread(str(tmp_path / 'out' / 'test' / 'cat' / '00001.png'))
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[5, :, 2] = 255  # OpenCV: blue, green, red
    assert (image == expected).all()


def test_nuclei(nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / 'nuclei'
    convert_nuclei(nuclei, out)
    assert 'val: 1 images, 2 nuclei' in capsys.readouterr().out
    for name, split in NAMES.items():
        coco = COCO(out / 'annotations' / f'instances_{split}.json')
        (image,) = coco.imgs.values()
        assert image['source'] == name
        assert (image['height'], image['width']) == (40, 30)
        pixels = cv2.imread(str(out / split / image['file_name']))
        assert pixels.shape == (40, 30, 3)
        first, second = coco.loadAnns(coco.getAnnIds())
        assert (first['bbox'], first['area']) == ([2, 3, 5, 7], 35)
        mask = coco.annToMask(second)
        assert mask.sum() == 36 and mask[10:14, 20:29].all()
    test = json.loads((out / 'annotations' / 'instances_test.json').read_text())
    assert not test['images'], 'the large image is left out'


def split_nuclei(*args: str) -> None:
    tool('dataset_converters/nuclei_by_stain.py').main([*args])


def test_nuclei_by_stain(
    nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And the configuration of the nuclei weights reads the parts."""
    pytest.importorskip('mmdet')
    out = tmp_path / 'nuclei'
    with pytest.raises(SystemExit, match='2'):
        split_nuclei(str(out))
    assert str(out / 'annotations') in capsys.readouterr().err
    purple = '0121d6759c5adb290c8e828fc882f37dfaf3663ec885c663859948c154a443ed'
    shutil.copytree(nuclei / next(iter(NAMES)), nuclei / purple)
    image = nuclei / purple / 'images' / f'{purple}.png'
    cv2.imwrite(str(image), np.full((40, 30, 3), (200, 90, 180)))
    next((nuclei / purple / 'images').glob('0007*')).unlink()
    convert_nuclei(nuclei, out)
    split_nuclei(str(out))
    parts = {}
    for stain in ('fluorescence', 'stained'):
        path = out / 'annotations' / f'instances_train_{stain}.json'
        content = json.loads(path.read_text())
        parts[stain] = [image['source'] for image in content['images']]
        assert {a['image_id'] for a in content['annotations']} == {
            image['id'] for image in content['images']
        }
    assert parts == {'fluorescence': [next(iter(NAMES))], 'stained': [purple]}
    with pytest.raises(SystemExit, match='2'):
        split_nuclei(str(out))
    split_nuclei(str(out), '--overwrite')

    init_default_scope('mmdet')
    data_root = {'data_root': str(out)}
    cfg = load_config('mask_rcnn_dsnet_long_nuclei', data_root)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 3, 'stained images come twice'
    assert dataset[0]['inputs'].shape == (3, 320, 320)


def test_errors(
    archive: Path, nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'out'

    def refused(fact: str, source: Path, out: Path = out) -> None:
        convert = (
            convert_nuclei if nuclei in (source, *source.parents) else convert_cifar
        )
        with pytest.raises(SystemExit, match='2'):
            convert(source, out)
        assert fact in ' '.join(capsys.readouterr().err.split())

    refused('nothing.zip', tmp_path / 'nothing.zip')
    refused(str(tmp_path), archive, tmp_path)
    refused('cifar-10-batches-py', tmp_path)
    other = tmp_path / 'other.zip'
    other.write_text('no archive')
    refused('other.zip', other)

    refused('BBBC038', nuclei / 'nothing')
    refused(str(tmp_path), nuclei, tmp_path)
    first = nuclei / next(iter(NAMES))
    mask = first / 'masks' / '0.png'
    cv2.imwrite(str(mask), np.ones((5, 5), np.uint8))
    refused('(5, 5)', nuclei)
    mask.write_text('no image')
    refused('0.png', nuclei)
    mask.write_bytes(b'P5 60000 60000 255\n' + bytes(99))  # too large for OpenCV
    refused('0.png', nuclei)
    next((first / 'images').iterdir()).unlink()
    refused('0 images', nuclei)
    assert not list(tmp_path.glob('*out*')), 'nothing half-written is left'

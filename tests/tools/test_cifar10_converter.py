"""The converter of CIFAR-10, on a small archive and on files as the set's own."""

import pickle
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import tool

CLASSES = ('bird', 'cat')


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An archive of 20 training and 2 test images of each class."""
    path = tmp_path / 'cifar10.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        for split, count in (('train', 20), ('test', 2)):
            for kind in CLASSES:
                for i in range(count):
                    _, png = cv2.imencode('.png', np.full((32, 32, 3), i, np.uint8))
                    archive.writestr(f'{split}/{kind}/{i:02}.png', png.tobytes())
    return path


def convert(source: Path, out: Path) -> None:
    tool('dataset_converters/cifar10_to_folders.py').main([str(source), str(out)])


def test_layout(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / 'cifar10'
    convert(source, out)
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


def test_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    out = tmp_path / 'out'
    convert(tmp_path, out)
    image = cv2.imread(str(out / 'test' / 'cat' / '00001.png'))
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[5, :, 2] = 255  # OpenCV: blue, green, red
    assert (image == expected).all()


def test_errors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(source: Path, out: Path) -> str:
        with pytest.raises(SystemExit, match='2'):
            convert(source, out)
        return capsys.readouterr().err

    out = tmp_path / 'out'
    assert 'there is no' in refused(tmp_path / 'nothing.zip', out)
    assert 'is left alone' in refused(source, tmp_path)
    assert 'does not hold cifar-10-batches-py' in refused(tmp_path, out)
    other = tmp_path / 'other.zip'
    other.write_text('no archive')
    assert 'is no zip archive' in refused(other, out)
    with zipfile.ZipFile(other, 'w') as archive:
        archive.writestr('train/cat/0.png', b'')
    assert 'same classes in train and test' in refused(other, out)
    with zipfile.ZipFile(other, 'w') as archive:
        archive.writestr('0.png', b'')
    assert 'train/CLASS/IMAGE' in refused(other, out)
    assert not out.exists()

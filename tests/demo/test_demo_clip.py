"""The images of tools/demo_clip.py."""

from io import BytesIO
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from dsnet_mm.datasets import load_task
from tests.conftest import tool


@pytest.fixture(scope='module')
def demo():
    return tool('demo_clip.py')


def sizes(folder) -> dict[str, int]:
    return {part: len(items) for part, items in load_task(folder).split.items()}


def test_drawn_images(demo, tmp_path):
    for name in ('a', 'b'):
        demo.write_drawn(tmp_path / name, train=2, test=1)
    assert sizes(tmp_path / 'a') == {'train': 24, 'val': 0, 'test': 12}
    first, second = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / x).rglob('*.png'))]
        for x in ('a', 'b')
    )
    assert all(map(np.array_equal, first, second))
    assert len({image.tobytes() for image in first}) == 36


def test_cifar_from_an_archive(demo, tmp_path):
    with ZipFile(tmp_path / 'cifar.zip', 'w') as file:
        for part in ('train', 'test'):
            for name in demo.CIFAR_ROWS:
                for i in range(9):
                    buffer = BytesIO()
                    Image.new('RGB', (32, 32), (25 * i, 0, 0)).save(buffer, 'JPEG')
                    path = f'cifar10/{part}/{name}/{i}.jpg'
                    file.writestr(path, buffer.getvalue())
    demo.write_cifar(tmp_path / 'images', tmp_path / 'cifar.zip', train=8, test=3)
    assert sizes(tmp_path / 'images') == {'train': 80, 'val': 0, 'test': 30}
    assert set(load_task(tmp_path / 'images').class_names) == set(demo.CIFAR_ROWS)


def test_rows_are_classes_of_imagenet(demo):
    from dsnet_mm.clip import TimmEncoder

    encoder = TimmEncoder('timm:test_vit')
    assert len(encoder.encode_classes([*demo.CIFAR_ROWS], rows=demo.CIFAR_ROWS)) == 10


def test_archive_without_cifar(demo, tmp_path):
    with ZipFile(tmp_path / 'other.zip', 'w') as file:
        file.writestr('photos/cat.jpg', b'')
    with pytest.raises(ValueError, match=r"cifar10/train/.* 'photos/cat\.jpg'"):
        demo.write_cifar(tmp_path / 'images', tmp_path / 'other.zip')
    assert [path.name for path in tmp_path.iterdir()] == ['other.zip']

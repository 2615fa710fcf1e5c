"""The converter of the nuclei, on small written files in the layout of the set."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from tests.conftest import tool

# The splits of images that have been public since 2018.
NAMES = {
    '00071198d059ba7f5914a526d124d28e6d010c92466da21d4a04cd5413362552': 'train',
    '0287e7ee5b007c91ae2bd7628d09735e70496bc6127ecb7f3dd043e04ce37426': 'val',
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two images of 40 x 30 pixels with two nuclei each, and a large one."""
    for name, size in {**dict.fromkeys(NAMES, (40, 30)), 'large': (300, 300)}.items():
        folder = tmp_path / 'stage1_train' / name
        (folder / 'images').mkdir(parents=True)
        (folder / 'masks').mkdir()
        cv2.imwrite(str(folder / 'images' / f'{name}.png'), np.zeros((*size, 4)))
        for i, box in enumerate(((2, 3, 5, 7), (20, 10, 9, 4))):
            x, y, w, h = box
            mask = np.zeros(size, np.uint8)
            mask[y : y + h, x : x + w] = 255
            cv2.imwrite(str(folder / 'masks' / f'{i}.png'), mask)
        cv2.imwrite(str(folder / 'masks' / 'empty.png'), np.zeros(size))
    return tmp_path / 'stage1_train'


def convert(source: Path, out: Path) -> None:
    tool('dataset_converters/nuclei_to_coco.py').main(
        [str(source), str(out), '--max-pixels', '5000']
    )


def test_layout(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / 'nuclei'
    convert(source, out)
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


def test_errors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def refused(source: Path, out: Path) -> str:
        with pytest.raises(SystemExit, match='2'):
            convert(source, out)
        return capsys.readouterr().err

    assert re.search(
        r'there is no folder .*BBBC038',
        refused(tmp_path / 'nothing', tmp_path / 'nuclei'),
    )
    assert re.search('left alone', refused(source, tmp_path))
    first = source / next(iter(NAMES))
    mask = first / 'masks' / '0.png'
    cv2.imwrite(str(mask), np.ones((5, 5), np.uint8))
    assert re.search(
        r'0\.png has the shape \(5, 5\)', refused(source, tmp_path / 'nuclei')
    )
    mask.write_text('no image')
    assert re.search('cannot be read as an image', refused(source, tmp_path / 'nuclei'))
    next((first / 'images').iterdir()).unlink()
    assert re.search('holds 0 images', refused(source, tmp_path / 'nuclei'))
    assert not (tmp_path / 'nuclei').exists()
    assert not list(tmp_path.glob('.nuclei*')), 'nothing half-written is left'

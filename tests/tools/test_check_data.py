"""tools/check_data.py, on a data set with one example of each damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import COCO, FOLDERS, tool

MASKS = ['mask_rcnn.py', '--cfg-options', COCO]


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of data and configurations, to damage it."""
    root = tmp_path / 'copy'
    shutil.copytree(folder, root)
    monkeypatch.chdir(root)
    return root


def check(args: list[str], capsys: pytest.CaptureFixture) -> tuple[int, dict, str]:
    """Returns exit status, places by split and finding, and what was printed."""
    Path('found.json').unlink(missing_ok=True)
    status = 0
    try:
        tool('check_data.py').main(['--out=found.json', *args])
    except SystemExit as exit_:
        status = exit_.code
    found = {
        (entry['split'], entry['finding']): entry['places']
        for entry in json.loads(Path('found.json').read_text())
    }
    return status, found, capsys.readouterr().out


def test_whole_data_has_no_errors(copy: Path, capsys: pytest.CaptureFixture) -> None:
    status, found, printed = check(MASKS, capsys)
    assert (status, found) == (0, {})
    # The test split is that of validation.
    assert '6 images of train, val: 0 errors, 0 warnings.' in printed
    status, found, printed = check(['classifier.py', '--cfg-options', FOLDERS], capsys)
    assert (status, found) == (0, {})
    assert '12 images of train, val: 0 errors, 0 warnings.' in printed


def test_each_damage_of_annotations_is_found(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    path = Path('sets/coco/annotations/instances_train2017.json')
    content = json.loads(path.read_text())
    images, annotations = content['images'], content['annotations']
    whole = annotations[0]

    def add(**changes: Any) -> int:
        number = 100 + len(annotations)
        box = [number % 30, 3, 9, 9]
        annotations.append({**whole, 'id': number, 'bbox': box, **changes})
        return number

    expected = {
        'unknown image_id': [f'annotation {add(image_id=77)}: 77'],
        'unknown category_id': [f'annotation {add(category_id=9)}: 9'],
        'id of an annotation is not unique': [f'annotation {add(id=1) and 1}'],
        'box of less than a pixel': [
            f'annotation {add(bbox=[5, 5, 0, 9])}: [5, 5, 0, 9], area {whole["area"]}',
            f'annotation {add(area=0)}: [18, 3, 9, 9], area 0',
        ],
        'box outside the image': [
            f'annotation {add(bbox=[70, 5, 9, 9])}: [70, 5, 9, 9] in [64, 64]'
        ],
        'box reaches out of the image': [
            f'annotation {add(bbox=[60, 5, 9, 9])}: [60, 5, 9, 9] in [64, 64]'
        ],
        'bbox or area is missing or no number': [
            f'annotation {add(bbox=[1, 2, 3])}: [1, 2, 3], {whole["area"]}'
        ],
        'polygon of fewer than three points': [
            f'annotation {add(segmentation=[[1, 1, 5, 5]])}: 4 numbers'
        ],
        'object without a mask': [f'annotation {add(segmentation=[])}'],
        'annotation twice': [f'annotation {add(bbox=whole["bbox"])}'],
        'class of the configuration is not in the file': [f"'disc' is not in {path}"],
        'class of the file is not in the configuration': ['ring', 'star'],
        'class without objects': [],
        'image listed twice': ['1.png'],
        'id of an image is not unique': ['image 2'],
        'image without objects': ['1.png'],
    }
    images.append({**images[0], 'id': 50})
    images.append({**images[0], 'id': 2, 'file_name': '3.png'})
    expected['image listed twice'].append('3.png')
    content['categories'] = [
        dict(id=1, name='square'),
        dict(id=2, name='ring'),
        dict(id=3, name='star'),
    ]
    del expected['class without objects']
    path.write_text(json.dumps(content))
    status, found, printed = check([*MASKS, '--no-images', '--splits', 'train'], capsys)
    found = {
        finding: [place.replace('(64, 64)', '[64, 64]') for place in places]
        for (_, finding), places in found.items()
    }
    assert found == expected
    assert status == 1
    assert '7 errors, 7 warnings.' in printed


def test_classes_in_another_order(copy: Path, capsys: pytest.CaptureFixture) -> None:
    path = Path('sets/coco/annotations/instances_val2017.json')
    content = json.loads(path.read_text())
    content['categories'].reverse()
    content['annotations'] = content['annotations'][:1]
    path.write_text(json.dumps(content))
    status, found, _ = check([*MASKS, '--splits', 'val', '--no-images'], capsys)
    assert status == 1
    assert found == {
        ('val', 'classes in another order than in the file'): [
            f'disc, square in {path}'
        ],
        ('val', 'class without objects'): ['square'],
        ('val', 'image without objects'): ['2.png'],
    }


def test_each_damage_of_images_is_found(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    train = Path('sets/folders/train')
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    (train / 'disc/0.png').write_text('no image')
    (train / 'disc/1.png').write_bytes((train / 'square/1.png').read_bytes()[:900])
    (train / 'disc/2.png').write_bytes((train / 'square/2.png').read_bytes())
    (train / 'disc/3.png').write_bytes(Path('sets/folders/val/disc/0.png').read_bytes())
    cv2.imwrite(str(train / 'square/deep.png'), image[..., 0].astype(np.uint16) * 257)
    Image.fromarray(image).convert('CMYK').save(train / 'square/print.jpg')
    Image.fromarray(image).convert('RGBA').save(train / 'square/clear.png')
    Image.fromarray(image).convert('L').save(train / 'square/grey.png')
    turned = Image.fromarray(image)
    turned.getexif()[274] = 6
    turned.save(train / 'square/turned.jpg', exif=turned.getexif())
    shutil.rmtree('sets/folders/val/square')
    Path('sets/folders/val/square').mkdir()
    status, found, _ = check(['classifier.py', '--cfg-options', FOLDERS], capsys)
    names = {
        key: [Path(place.split(': ')[0].split(' and ')[0]).name for place in places]
        for key, places in found.items()
    }
    assert status == 1
    assert names == {
        ('train', 'image cannot be read'): ['0.png'],
        ('train', 'image is cut off'): ['1.png'],
        ('train', 'same image under two names'): ['2.png'],
        ('val', 'same image in another split'): ['0.png'],
        ('train', '16-bit'): ['deep.png'],
        ('train', 'grey'): ['deep.png', 'grey.png'],
        ('train', 'CMYK'): ['print.jpg'],
        ('train', 'transparent'): ['clear.png'],
        ('train', 'rotated by EXIF'): ['turned.jpg'],
        ('val', 'class without objects'): ['square'],
    }


def test_sizes_and_missing_images(copy: Path, capsys: pytest.CaptureFixture) -> None:
    images = Path('sets/coco/val2017')
    cv2.imwrite(str(images / '1.png'), np.zeros((32, 64, 3), np.uint8))
    (images / '2.png').unlink()
    status, found, _ = check([*MASKS, '--splits', 'val'], capsys)
    assert status == 1
    assert found == {
        ('val', 'size differs from the annotations'): [
            'sets/coco/val2017/1.png: (64, 32) and not (64, 64)'
        ],
        ('val', 'no such image'): ['sets/coco/val2017/2.png'],
    }
    path = Path('sets/coco/annotations/instances_val2017.json')
    content = json.loads(path.read_text())
    for broken in (
        {'images': []},
        content | {'images': [{'id': 1}]},
        content | {'categories': ['disc']},
        content | {'annotations': [3]},
    ):
        path.write_text(json.dumps(broken))
        status, found, _ = check([*MASKS, '--splits', 'val'], capsys)
        assert status == 1
        assert list(found) == [('val', 'annotations cannot be read')]
    content['annotations'][0]['segmentation'] = [1, 1, 5, 1, 5, 5]  # not in a list
    path.write_text(json.dumps(content))
    _, found, _ = check([*MASKS, '--splits', 'val', '--no-images'], capsys)
    assert list(found) == [('val', 'object without a mask')]


def test_images_that_pillow_does_not_read(
    copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)  # refuses more than 100
    train = Path('sets/folders/train')
    for i, path in enumerate(sorted(train.glob('*/*.png'))):
        Image.new('RGB', (8, 8), (i, 0, 0)).save(path)
    Image.new('RGB', (30, 30)).save(train / 'disc/[red]large[.png')
    image = Image.new('RGB', (8, 8), (9, 9, 9))
    image.save(train / 'disc/exif.jpg', exif=b'Exif\0\0no EXIF entry')
    monkeypatch.setenv('COLUMNS', '400')
    args = ['classifier.py', '--splits', 'train', '--cfg-options', FOLDERS]
    status, found, printed = check(args, capsys)
    assert status == 0
    assert found == {
        ('train', 'image is too large to be checked'): [
            'sets/folders/train/disc/[red]large[.png'
        ]
    }
    assert '[red]' in printed

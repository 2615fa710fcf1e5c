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
CLASSES = ['classifier.py', '--cfg-options', FOLDERS]
TRAIN, VAL = (
    Path(f'sets/coco/annotations/instances_{split}2017.json')
    for split in ('train', 'val')
)


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of data and configurations, to damage it."""
    root = tmp_path / 'copy'
    shutil.copytree(folder, root)
    monkeypatch.chdir(root)
    return root


def check(args: list[str], status: int = 1) -> dict[tuple[str, str], list[str]]:
    """Returns the places by split and finding."""
    out = Path('found.json')
    out.unlink(missing_ok=True)
    try:
        tool('check_data.py').main(['--out=found.json', *args])
        assert status == 0
    except SystemExit as stop:
        assert stop.code == status
    entries = json.loads(out.read_text())
    return {(entry['split'], entry['finding']): entry['places'] for entry in entries}


def test_whole_data_has_no_errors(copy: Path, capsys: pytest.CaptureFixture) -> None:
    # The test split is that of validation.
    for args, images in ((MASKS, 6), (CLASSES, 12)):
        assert not check(args, 0)
        printed = capsys.readouterr().out
        assert f'{images} images of train, val: 0 errors, 0 warnings.' in printed
    with pytest.raises(SystemExit, match='2'):
        tool('check_data.py').main(['--out=found.json', *MASKS])
    assert 'found.json' in capsys.readouterr().err, 'nothing is overwritten'


def test_each_damage_of_annotations_is_found(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads(TRAIN.read_text())
    images, annotations = content['images'], content['annotations']
    whole = annotations[0]

    def add(**changes: Any) -> str:
        number = 100 + len(annotations)
        box = [number % 30, 3, 9, 9]
        annotations.append({**whole, 'id': number, 'bbox': box, **changes})
        return f'annotation {annotations[-1]["id"]}'

    expected = {
        'unknown image_id': [f'{add(image_id=77)}: 77'],
        'unknown category_id': [f'{add(category_id=9)}: 9'],
        'id of an annotation is not unique': [add(id=1)],
        'box of less than a pixel': [
            f'{add(bbox=[5, 5, 0, 9])}: [5, 5, 0, 9], area {whole["area"]}',
            f'{add(area=0)}: [18, 3, 9, 9], area 0',
        ],
        'box outside the image': [
            f'{add(bbox=[70, 5, 9, 9])}: [70, 5, 9, 9] in (64, 64)'
        ],
        'box reaches out of the image': [
            f'{add(bbox=[60, 5, 9, 9])}: [60, 5, 9, 9] in (64, 64)'
        ],
        'bbox or area is missing or no number': [
            f'{add(bbox=[1, 2, 3])}: [1, 2, 3], {whole["area"]}',
            f'{add(bbox=[1, 2, 3, float("nan")])}: [1, 2, 3, nan], {whole["area"]}',
        ],
        'polygon of fewer than three points': [
            f'{add(segmentation=[[1, 1, 5, 5]])}: 4 numbers'
        ],
        'object without a mask': [
            add(segmentation=[]),
            add(segmentation=[1, 1, 5, 1, 5, 5]),
            add(segmentation=[[1, 1, 5, 1, 5, 5], 3]),
        ],
        'annotation twice': [add(bbox=whole['bbox'])],
        'class of the configuration is not in the file': [f"'disc' is not in {TRAIN}"],
        'class of the file is not in the configuration': ['ring', 'star'],
        'image listed twice': ['1.png', '3.png'],
        'id of an image is not unique': ['image 2'],
        'image without objects': ['1.png'],
    }
    images.append({**images[0], 'id': 50})
    images.append({**images[0], 'id': 2, 'file_name': '3.png'})
    names = ('square', 'ring', 'star')
    content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    TRAIN.write_text(json.dumps(content))
    found = check([*MASKS, '--no-images', '--splits', 'train'])
    assert {finding: places for (_, finding), places in found.items()} == expected
    assert '10 errors, 7 warnings.' in capsys.readouterr().out


def test_classes_in_another_order(copy: Path) -> None:
    content = json.loads(VAL.read_text())
    content['categories'].reverse()
    content['annotations'] = content['annotations'][:1]
    VAL.write_text(json.dumps(content))
    assert check([*MASKS, '--splits', 'val', '--no-images']) == {
        ('val', 'classes in another order than in the file'): [
            f'disc, square in {VAL}'
        ],
        ('val', 'class without objects'): ['square'],
        ('val', 'image without objects'): ['2.png'],
    }


def test_each_damage_of_images_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train, val = Path('sets/folders/train'), Path('sets/folders/val')
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    (train / 'disc/0.png').write_text('no image')
    (train / 'disc/1.png').write_bytes((train / 'square/1.png').read_bytes()[:900])
    (train / 'disc/2.png').write_bytes((train / 'square/2.png').read_bytes())
    (train / 'disc/3.png').write_bytes((val / 'disc/0.png').read_bytes())
    cv2.imwrite(str(train / 'square/deep.png'), image[..., 0].astype(np.uint16) * 257)
    for mode, name in (('CMYK', 'print.jpg'), ('RGBA', 'clear.png'), ('L', 'grey.png')):
        Image.fromarray(image).convert(mode).save(train / 'square' / name)
    turned = Image.fromarray(image)
    turned.getexif()[274] = 6
    turned.save(train / 'square/turned.jpg', exif=turned.getexif())
    odd = Image.fromarray(image[:20])
    odd.save(train / 'square/exif.jpg', exif=b'Exif\0\0no EXIF entry')  # no finding
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64)  # refuses twice as many
    Image.new('RGB', (100, 100)).save(train / 'disc/[red]large[.png')
    shutil.rmtree(val / 'square')
    (val / 'square').mkdir()
    monkeypatch.setenv('COLUMNS', '400')
    found = check(CLASSES)
    names = {
        key: [Path(place.split(': ')[0].split(' and ')[0]).name for place in places]
        for key, places in found.items()
    }
    assert names == {
        ('train', 'image cannot be read'): ['0.png'],
        ('train', 'image is cut off'): ['1.png'],
        ('train', 'image is too large to be checked'): ['[red]large[.png'],
        ('train', 'same image under two names'): ['2.png'],
        ('val', 'same image in another split'): ['0.png'],
        ('train', '16-bit'): ['deep.png'],
        ('train', 'grey'): ['deep.png', 'grey.png'],
        ('train', 'CMYK'): ['print.jpg'],
        ('train', 'transparent'): ['clear.png'],
        ('train', 'rotated by EXIF'): ['turned.jpg'],
        ('val', 'class without objects'): ['square'],
    }
    assert '[red]large[' in capsys.readouterr().out


def test_sizes_missing_images_and_broken_annotations(copy: Path) -> None:
    images = Path('sets/coco/val2017')
    cv2.imwrite(str(images / '1.png'), np.zeros((32, 64, 3), np.uint8))
    (images / '2.png').unlink()
    args = [*MASKS, '--splits', 'val']
    assert check(args) == {
        ('val', 'size differs from the annotations'): [
            f'{images}/1.png: (64, 32) and not (64, 64)'
        ],
        ('val', 'no such image'): [f'{images}/2.png'],
    }
    content = json.loads(VAL.read_text())
    for broken in (
        {'images': []},
        content | {'images': [{'id': 1}]},
        content | {'categories': ['disc']},
        content | {'annotations': [3]},
    ):
        VAL.write_text(json.dumps(broken))
        assert list(check(args)) == [('val', 'annotations cannot be read')]

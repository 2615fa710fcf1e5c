"""tools/check_data.py, on a data set with one example of each damage."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from tests.conftest import COCO, FOLDERS, tool
from tests.damage import damaged_json, quick

CHECK = tool('check_data.py')
MASKS = ['mask_rcnn.py', '--cfg-options', COCO]
CLASSES = ['classifier.py', '--cfg-options', FOLDERS]
TRAIN, VAL = (
    Path(f'sets/coco/annotations/instances_{split}2017.json')
    for split in ('train', 'val')
)


BAD_CODES = (
    'text',
    {'size': [64, 64]},
    {'counts': [4096]},
    {'size': [32, 128], 'counts': [4096]},
    {'size': [64, 64], 'counts': [4000, 95]},
    {'size': [64, 64], 'counts': [4097, -1]},
    {'size': [64, 64], 'counts': [4096.0]},
    {'size': [64, 64], 'counts': 'P'},  # it goes on
    {'size': [64, 64], 'counts': '0\u00e9'},
    {'size': [64, 64], 'counts': 'PP3'},  # 4096 is PP4
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
        'object without a mask': [add(segmentation=[]), add(segmentation=None)],
        'mask is damaged': [
            f'{add(segmentation=mask)}: {fact}'
            for fact, masks in (
                ('no lists of numbers', ([1, 1, 5, 1, 5, 5], [[1, 1, 5, 1, 5, '5']])),
                ('no run-length code of (64, 64)', BAD_CODES),
            )
            for mask in masks
        ],
        'annotation twice': [add(bbox=whole['bbox'])],
        'class of the configuration is not in the file': [f"'disc' is not in {TRAIN}"],
        'class of the file is not in the configuration': ['ring', 'star'],
        'image listed twice': ['1.png', '3.png'],
        'id of an image is not unique': ['image 2'],
        # Those with objects of another class, and the one with id 50.
        'image without objects': ['1.png', '3.png', '1.png'],
    }
    code = coco_mask.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    add(segmentation=code | {'counts': code['counts'].decode()}, bbox=[1, 1, 9, 9])
    add(segmentation={'size': [64, 64], 'counts': [4000, 96]}, bbox=[2, 2, 9, 9])
    images.append({**images[0], 'id': 50})
    images.append({**images[0], 'id': 2, 'file_name': '3.png'})
    names = ('square', 'ring', 'star')
    content['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    TRAIN.write_text(json.dumps(content))
    found = check([*MASKS, '--no-images', '--splits', 'train'])
    assert {finding: places for (_, finding), places in found.items()} == expected
    assert f'{11 + len(BAD_CODES)} errors, 7 warnings.' in capsys.readouterr().out


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
    VAL.write_text(json.dumps(content)[:-9])
    assert list(check(args)) == [('val', 'annotations cannot be read')]
    VAL.write_text(json.dumps({'images': []}))
    assert list(check(args)) == [('val', 'annotations cannot be read')]
    content['annotations'].append({'image_id': 1, 'category_id': 1})
    VAL.write_text(json.dumps(content))
    found = check(args)
    assert (
        'annotations[2]: id' in found['val', 'field is missing or of another type'][0]
    )


def test_more_classes_than_the_model_has(copy: Path) -> None:
    shutil.copytree('sets/folders/train/disc', 'sets/folders/train/ring')
    found = check([*CLASSES, '--no-images', '--splits', 'train'])
    assert ('train', 'more classes than the model has') in found
    options = ['model.roi_head.bbox_head.num_classes=1']
    found = check([*MASKS, *options, '--no-images', '--splits', 'val'])
    assert list(found) == [('val', 'more classes than the model has')]


@settings(quick, max_examples=50)
@given(st.data())
def test_annotations_without_errors_are_read(folder: Path, data: st.DataObject) -> None:
    """What the check does not call an error is no error of mmdet."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    root = folder / 'sets' / 'coco'
    content = json.loads((root / 'annotations/instances_train2017.json').read_text())
    for annotation, counts in zip(
        content['annotations'], ([4000, 96], 'PP4'), strict=False
    ):
        annotation['segmentation'] = {'size': [64, 64], 'counts': counts}
    (root / 'odd.json').write_text(json.dumps(data.draw(damaged_json(content))))
    node = dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='odd.json',
        data_prefix=dict(img='train2017'),
        metainfo=dict(classes=('square', 'disc')),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    )
    found = defaultdict(list)
    for item in CHECK.check_coco(node, True, 2, found):
        for finding, place in CHECK.check_image(item)[0]:
            found[finding].append(place)
    if not any(
        found[name] and CHECK.FINDINGS[name][0] == CHECK.ERROR for name in found
    ):
        dataset = DATASETS.build(node)
        assert len([dataset[i] for i in range(len(dataset))]) > 0

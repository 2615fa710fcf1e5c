"""Classes of annotation files in COCO's format, before a training."""

import json
from pathlib import Path

import pytest

from dsnet_mm.datasets import coco
from dsnet_mm.datasets.coco import check_class_order, read_coco
from tests.conftest import COCO, tool

CATEGORIES = [dict(id=i, name=name) for i, name in enumerate('abc', 1)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / 'boxes.json'


@pytest.mark.parametrize(
    ('name', 'entry', 'fields'),
    [
        ('images', {'id': 1, 'file_name': 'x'}, 'width, height'),
        (
            'images',
            {'id': [1], 'file_name': 1, 'width': 1, 'height': '1'},
            'id, file_name',
        ),
        ('annotations', {'image_id': 1, 'category_id': 1}, 'id'),
        ('annotations', 3, 'id, image_id, category_id'),
        ('categories', {'id': None, 'name': 3}, 'id, name'),
    ],
)
def test_entries_without_their_fields(
    file: Path, name: str, entry: object, fields: str
) -> None:
    content = dict(images=[], annotations=[], categories=CATEGORIES)
    file.write_text(json.dumps(content | {name: [entry, *content[name]]}))
    good, (place,) = read_coco(str(file))
    assert place.startswith(f'{name}[0]: {fields}') and good == content
    del content[name]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf'boxes\.json.*{name}'):
        read_coco(str(file))


@pytest.mark.parametrize('order', [1, -1])
def test_only_the_categories_are_parsed(
    file: Path, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ['"images": ' + '[broken, ' * 9, f'"categories" : {json.dumps(CATEGORIES)}']
    file.write_text('{' + ', '.join(parts[::order]) + '}')
    monkeypatch.setattr(coco, '_read_categories', None)
    for classes in ('abc', 'ab', 'ac', 'c', 'abcd'):
        check_class_order(str(file), tuple(classes))


def test_other_classes_are_refused(file: Path) -> None:
    content = dict(images=[], annotations=[], categories=CATEGORIES)
    file.write_text(json.dumps(content))
    for classes, fact in (
        ('ba', 'label 0'),
        ('acb', 'label 1'),
        ('abdc', 'label 2'),
        ('de', "'d'.* None"),
    ):
        with pytest.raises(
            ValueError, match=rf'boxes\.json.*{fact}|{fact}.*boxes\.json'
        ):
            check_class_order(str(file), tuple(classes))
    # Categories of something else, and of a class that the file has twice.
    content['images'] = [dict(id=1, categories=[dict(name='x')])]
    file.write_text(json.dumps(dict(categories=CATEGORIES) | content))
    check_class_order(str(file), ('a', 'b'))
    file.write_text(json.dumps(content | {'categories': CATEGORIES[:1] * 2}))
    with pytest.raises(ValueError, match='label 1'):
        check_class_order(str(file), ('a',))
    file.write_text('')
    with pytest.raises(ValueError, match='JSON'):
        check_class_order(str(file), ('a',))


TRAIN = 'train_dataloader.dataset.metainfo.classes='


@pytest.mark.parametrize(
    ('option', 'fact'),
    [
        (TRAIN + "('disc','square')", "'square' in sets/coco"),
        (TRAIN + "('cat',)", 'cat'),
        (TRAIN + 'disc', "'d' in metainfo.classes"),  # a comma is missing
        ('model.roi_head.bbox_head.num_classes=1', 'num_classes=1'),
    ],
)
def test_training_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    option: str,
    fact: str,
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match='2'):
        tool('train.py').main(['mask_rcnn.py', '--cfg-options', COCO, option])
    assert fact in ' '.join(capsys.readouterr().err.split())
    assert not Path('work_dirs').exists()


@pytest.mark.parametrize('loader', ['train', 'val'])
def test_a_file_that_mmdet_cannot_read_is_named(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    loader: str,
) -> None:
    monkeypatch.chdir(folder)
    name = f'instances_{loader}2017.json'
    annotations = folder / 'sets' / 'coco' / 'annotations' / name
    content = json.loads(annotations.read_text())
    del content['images'][1]['width']
    damaged = tmp_path / 'damaged.json'
    damaged.write_text(json.dumps(content))
    options = [COCO, f'{loader}_dataloader.dataset.ann_file={damaged}']
    words = ['mask_rcnn.py', '--work-dir', str(tmp_path / 'run'), '--cfg-options']
    with pytest.raises(SystemExit, match='2'):
        tool('train.py').main([*words, *options])
    error = ' '.join(capsys.readouterr().err.split())
    assert 'damaged.json' in error
    assert 'images[1]: width' in error

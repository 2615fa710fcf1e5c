"""The synthetic data set: the recorded images, masks, COCO files, the folder."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import make_scenes as tool
from dsnet_mm.demo.scenes import COLOURS, SHAPES, TEXTURES, SceneObject, draw_scene
from make_scenes import DETECTION_CLASSES, SceneSettings, make_scenes, sample_scene

SMALL = SceneSettings(train=12, val=6, cls_train=2, cls_val=1, seed=3)

# SHA-256 of the names, pixels and annotations of SMALL. Results of the demo and in
# results/scenes hold for the set with this generator: do not change it.
RECORDED = '24ad6c9c176400bb18f06de8e575dabefdb750647e50ed437a7351d3425b8f44'


def content(folder: Path) -> dict[str, bytes]:
    """Pixels of the images and bytes of the COCO files, which hold the masks."""
    paths = [*folder.rglob('0*.png'), *folder.rglob('instances_*.json')]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.suffix == '.json'
        else cv2.imread(str(path)).tobytes()
        for path in sorted(paths)
    }


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def obj(name: str, centre: tuple[float, float], radius: float) -> SceneObject:
    return SceneObject(name, COLOURS['red'], centre, radius)


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('small') / 'new' / 'scenes'
    manifest = make_scenes(out, SMALL)
    assert json.loads((out / 'manifest.json').read_text()) == manifest
    assert [path.name for path in out.parent.iterdir()] == ['scenes']
    return out


def test_the_set_is_the_recorded_one(small):
    digest = hashlib.sha256()
    for name, value in content(small).items():
        digest.update(name.encode() + value)
    assert digest.hexdigest() == RECORDED


def test_a_larger_set_begins_with_a_smaller_one(small, tmp_path):
    larger = replace(SMALL, train=14, val=7, cls_train=3, cls_val=2)
    make_scenes(tmp_path / 'more', larger)
    make_scenes(tmp_path / 'other', replace(SMALL, seed=4))
    first, more, other = map(content, (small, tmp_path / 'more', tmp_path / 'other'))
    images = [name for name in first if name.endswith('.png')]
    assert len(images) == 12 + 6 + 3 * len(DETECTION_CLASSES)
    assert len({first[name] for name in images}) == len(images)
    assert all(first[name] == more[name] != other[name] for name in images)


@pytest.mark.parametrize('index', range(4))
def test_masks_are_exact_and_disjoint(index):
    objects = sample_scene(rng(0, index), 128)
    image, masks = draw_scene(objects, 128, rng(9, index))
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert masks.shape == (len(objects), 128, 128)
    assert masks.sum(axis=0).max() == 1
    for position, (old, mask) in enumerate(zip(objects, masks, strict=True)):
        name = f'checked {old.name.split()[1]}'
        changed = [
            *objects[:position],
            old._replace(name=name),
            *objects[position + 1 :],
        ]
        repainted, same_masks = draw_scene(changed, 128, rng(9, index))
        assert (same_masks == masks).all()
        different = (repainted != image).any(axis=2)
        assert different.any()
        assert not (different & ~mask).any()


def test_later_objects_cover_earlier_ones_and_images_cut_them():
    back, front = obj('striped square', (60, 60), 30), obj('dotted disc', (70, 60), 8)
    _, (lone,) = draw_scene([back], 128, rng(0))
    _, (behind, before) = draw_scene([back, front], 128, rng(0))
    assert (behind == (lone & ~before)).all() and behind.sum() < lone.sum()
    _, (outside,) = draw_scene([obj('plain star', (-500, 40), 30)], 64, rng(0))
    assert not outside.any()


@pytest.mark.parametrize('texture', TEXTURES)
@pytest.mark.parametrize('shape', SHAPES)
def test_every_shape_and_texture(shape, texture):
    red = obj(f'{texture} {shape}', (64, 64), 40)
    image, (mask,) = draw_scene([red], 128, rng(0))
    rows, columns = np.nonzero(mask)
    # The shape lies in its circle. Its width or height is close to the diameter.
    assert np.hypot(rows - 64, columns - 64).max() <= 42
    assert max(np.ptp(rows), np.ptp(columns)) >= 55
    # Pixels have the colour of the object, and a texture also has lighter pixels.
    lighter = (image[mask] > np.add(COLOURS['red'], (10, 60, 60))).all(axis=1)
    assert (image[mask] >= COLOURS['red']).all()
    assert not lighter.any() if texture == 'plain' else 0.25 < lighter.mean() < 0.7


def test_coco_files_hold_the_drawn_masks(small):
    for part, (split, count) in enumerate((('train', 12), ('val', 6))):
        coco = COCO(str(small / 'annotations' / f'instances_{split}.json'))
        assert sorted(coco.getImgIds()) == list(range(1, count + 1))
        assert [c['name'] for c in coco.loadCats([1, 2, 3, 4])] == [*DETECTION_CLASSES]
        assert {a['category_id'] for a in coco.dataset['annotations']} == {1, 2, 3, 4}
        for entry in coco.dataset['images']:
            generator = rng(SMALL.seed, part, entry['id'] - 1)
            objects = sample_scene(generator, 128)
            image, masks = draw_scene(objects, 128, generator)
            stored = cv2.imread(str(small / split / entry['file_name']))
            assert (stored[..., ::-1] == image).all()
            assert (entry['height'], entry['width']) == image.shape[:2]
            pairs = zip(objects, masks, strict=True)
            drawn = [(o.name, m) for o, m in pairs if o.name in DETECTION_CLASSES]
            found = coco.loadAnns(coco.getAnnIds(imgIds=entry['id']))
            for item, (name, mask) in zip(found, drawn, strict=True):
                assert DETECTION_CLASSES[item['category_id'] - 1] == name
                assert (coco.annToMask(item) == mask).all()
                rows, columns = np.nonzero(mask)
                left, top = columns.min(), rows.min()
                size = [columns.max() + 1 - left, rows.max() + 1 - top]
                assert item['bbox'] == [left, top, *size]
                assert item['area'] == mask.sum() and item['iscrowd'] == 0


def test_preview_shows_the_first_validation_images(small):
    sheet = cv2.imread(str(small / 'preview.png'))
    image = cv2.imread(str(small / 'val' / '000001.png'))
    # At the top left, three times as large, with outlines and names.
    same = (sheet[3:386:3, 3:386:3] == image).all(axis=2)
    assert 0.6 < same.mean() < 1


ARGUMENTS = ['--train=1', '--val=1', '--size=64', '--cls-train=1', '--cls-val=0']


def test_tool(tmp_path, capsys):
    main, out = tool.main, tmp_path / 'scenes'
    call = [str(out), *ARGUMENTS]
    main(call)
    assert f'preview: {out / "preview.png"}' in capsys.readouterr().out
    (out / 'note.txt').write_text('mine')
    before = content(out)
    for arguments in (call, [*call, '--overwrite']):
        main(arguments)
        assert 'nothing to do' in capsys.readouterr().out
    for option, fact in (
        (['--seed', '1'], 'seed 0, not 1'),
        (['--train', '0'], 'train must be at least 1, got 0'),
        (['--cls-val', '-1'], 'cls_val must be at least 0, got -1'),
        (['--size', '63'], 'size must be at least 64, got 63'),
        (['--seed', '-5', '--overwrite'], 'seed must be at least 0, got -5'),
    ):
        with pytest.raises(SystemExit, match=fact):
            main([*call, *option])
    assert content(out) == before and (out / 'note.txt').read_text() == 'mine'
    main([*call, '--seed', '1', '--overwrite'])
    assert json.loads((out / 'manifest.json').read_text())['settings']['seed'] == 1
    assert not (out / 'note.txt').exists()


@pytest.mark.parametrize('option', [[], ['--overwrite']])
def test_folder_with_other_files_is_not_replaced(option, tmp_path):
    (tmp_path / 'photo.png').write_bytes(b'mine')
    (tmp_path / 'manifest.json').write_text('{"settings": 1}')
    for out in (tmp_path, tmp_path / 'photo.png'):
        with pytest.raises(SystemExit, match='no data set of this generator'):
            tool.main([str(out), *ARGUMENTS, *option])
    assert (tmp_path / 'photo.png').read_bytes() == b'mine'


def test_failure_keeps_the_old_data_set(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('disk full')

    main, out = tool.main, tmp_path / 'scenes'
    main([str(out), *ARGUMENTS])
    before = content(out)
    monkeypatch.setattr(tool, '_write_classification', fail)
    with pytest.raises(SystemExit, match='disk full'):
        main([str(out), *ARGUMENTS, '--seed', '9', '--overwrite'])
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']

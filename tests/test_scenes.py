"""The drawn data set: determinism, exact truth, COCO files, the whole folder."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from dsnet_mm.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    DETECTION_CLASSES,
    MIN_VISIBLE,
    SHAPES,
    TEXTURES,
    SceneObject,
    SceneSettings,
    draw_scene,
    make_scenes,
    preview,
    sample_portrait,
    sample_scene,
    write_classification,
    write_detection,
)

SMALL = SceneSettings(train=3, val=2, cls_train=1, cls_val=1, size=64, seed=3)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


@pytest.fixture(scope='module')
def detection(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('scenes')
    write_detection(out, num_train=80, num_val=20, size=128, seed=0)
    return out


@pytest.fixture(scope='module')
def command():
    path = Path(__file__).parents[1] / 'tools' / 'make_scenes.py'
    spec = importlib.util.spec_from_file_location('make_scenes_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


# --- Determinism ----------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(tmp_path):
    make_scenes(tmp_path / 'a', SMALL)
    make_scenes(tmp_path / 'b', SMALL)
    make_scenes(tmp_path / 'c', replace(SMALL, seed=4))
    first, second, other = (digests(tmp_path / name) for name in 'abc')
    assert first == second
    pictures = [name for name in first if '/' in name and name.endswith('.png')]
    assert len(pictures) == 3 + 2 + 2 * len(DETECTION_CLASSES)
    assert all(first[name] != other[name] for name in pictures)
    assert len({first[name] for name in pictures}) == len(pictures)


def test_more_pictures_keep_the_first_ones(tmp_path):
    few, many = tmp_path / 'few', tmp_path / 'many'
    for out, count in ((few, 2), (many, 5)):
        write_detection(out, num_train=count, num_val=count, size=64, seed=1)
        write_classification(out, num_train=count, num_val=count, size=64, seed=1)
    before, after = digests(few), digests(many)
    pictures = [name for name in before if name.endswith('.png')]
    assert len(pictures) == 2 * 2 + 2 * 2 * len(DETECTION_CLASSES)
    assert all(before[name] == after[name] for name in pictures)
    for split in ('train', 'val'):
        name = f'annotations/instances_{split}.json'
        short = json.loads((few / name).read_text())['annotations']
        long = json.loads((many / name).read_text())['annotations']
        assert short == long[: len(short)]


# --- Drawing --------------------------------------------------------------------


@pytest.mark.parametrize('index', range(6))
def test_masks_are_exact_and_disjoint(index):
    objects = sample_scene(rng(0, index), 128)
    image, masks = draw_scene(objects, 128, rng(9, index))
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert masks.shape == (len(objects), 128, 128) and masks.dtype == bool
    assert masks.sum(axis=0).max() == 1
    for position, mask in enumerate(masks):
        changed = list(objects)
        other = 'plain' if objects[position].texture == 'checked' else 'checked'
        changed[position] = replace(objects[position], texture=other)
        repainted, same_masks = draw_scene(changed, 128, rng(9, index))
        assert (same_masks == masks).all()
        different = (repainted != image).any(axis=2)
        assert different.any()
        assert not (different & ~mask).any()


def test_a_later_object_covers_an_earlier_one():
    back = SceneObject('square', 'striped', 'red', (60, 60), 30)
    front = SceneObject('disc', 'dotted', 'blue', (70, 60), 8)
    _, (lone,) = draw_scene([back], 128, rng(0))
    _, (behind, before) = draw_scene([back, front], 128, rng(0))
    _, (hidden, _) = draw_scene([front, back], 128, rng(0))
    assert (behind == (lone & ~before)).all()
    assert behind.sum() < lone.sum()
    assert not hidden.any()


@pytest.mark.parametrize('centre', [(-500, 40), (40, 900), (-500, -500)])
def test_an_object_outside_the_picture_leaves_no_trace(centre):
    _, masks = draw_scene([SceneObject('star', 'plain', 'red', centre, 30)], 64, rng(0))
    assert not masks.any()


@pytest.mark.parametrize('texture', TEXTURES)
@pytest.mark.parametrize('shape', SHAPES)
def test_every_shape_and_texture_is_drawn_as_named(shape, texture):
    obj = SceneObject(shape, texture, 'red', (64, 64), 40)
    assert obj.name == f'{texture} {shape}'
    image, (mask,) = draw_scene([obj], 128, rng(0))
    rows, columns = np.nonzero(mask)
    # The shape fits in its circle and nearly fills it one way.
    assert np.hypot(rows - 64, columns - 64).max() <= 42
    assert max(np.ptp(rows), np.ptp(columns)) >= 55
    # Its named colour, and a lighter one on a fair share of it.
    lighter = (image[mask] > np.add(COLOURS['red'], (10, 60, 60))).all(axis=1)
    assert (image[mask] >= COLOURS['red']).all()
    assert not lighter.any() if texture == 'plain' else 0.25 < lighter.mean() < 0.7


def test_shapes_differ():
    masks = [
        draw_scene([SceneObject(s, 'plain', 'red', (64, 64), 40)], 128, rng(0))[1][0]
        for s in SHAPES
    ]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert (first & second).sum() / (first | second).sum() < 0.85


def test_turning_is_clockwise_and_takes_the_texture_along():
    upright = SceneObject('triangle', 'striped', 'red', (64, 64), 40)
    image, (mask,) = draw_scene([upright], 128, rng(0))
    turned, (turned_mask,) = draw_scene([replace(upright, angle=90)], 128, rng(0))
    rows, columns = np.nonzero(mask)
    assert columns[rows.argmin()] == 64
    rows, columns = np.nonzero(turned_mask)
    assert rows[columns.argmax()] == 64
    # Stripes run across the upright triangle, and down the turned one.
    assert np.ptp(image[64, 58:70].astype(int), axis=0).max() == 0
    assert np.ptp(turned[58:70, 64].astype(int), axis=0).max() == 0


def test_the_background_has_as_much_contrast_as_the_objects():
    inside, outside = [], []
    for index in range(60):
        objects = [sample_portrait(rng(1, index), 96, 'striped disc')]
        image, (mask,) = draw_scene(objects, 96, rng(2, index))
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        inside.append(grey[mask].std())
        outside.append(grey[~mask].std())
    assert min(inside) > 12
    assert min(outside) > 8
    assert 0.5 < np.mean(outside) / np.mean(inside) < 1


@pytest.mark.parametrize('name', BACKGROUNDS)
def test_background_patterns_vary_and_are_finite(name):
    pattern = BACKGROUNDS[name](rng(0), 64)
    assert pattern.shape == (64, 64)
    assert np.isfinite(pattern).all() and pattern.std() > 0.1


# --- Sampling -------------------------------------------------------------------


def test_sampled_scenes_hold_what_they_promise():
    radii, hidden, cut = [], 0, 0
    for index in range(150):
        objects = sample_scene(rng(5, index), 128)
        classes = [obj for obj in objects if obj.name in DETECTION_CLASSES]
        assert 1 <= len(classes) <= 5
        assert len(objects) - len(classes) <= 2
        _, masks = draw_scene(objects, 128, rng(0))
        for obj, mask in zip(objects, masks, strict=True):
            # The whole of it, in a picture that it cannot leave.
            moved = replace(obj, centre=(obj.centre[0] + 64, obj.centre[1] + 64))
            full = draw_scene([moved], 256, rng(0))[1][0]
            inside = full[64:192, 64:192].sum()
            assert mask.sum() >= MIN_VISIBLE * full.sum()
            assert 3 <= obj.period <= 6 and 2 * obj.radius >= 3 * obj.period
            cut += inside < full.sum()
            hidden += mask.sum() < 0.9 * inside
            radii.append(obj.radius)
    assert min(radii) < 10 and max(radii) > 36
    assert 0.4 < np.mean(np.array(radii) < 20) < 0.7
    assert hidden > 30 and cut > 50


def test_sizes_follow_the_picture():
    radii = [o.radius for i in range(60) for o in sample_scene(rng(6, i), 256)]
    assert 17 < min(radii) < 22 and 68 < max(radii) < 80


# --- Files ----------------------------------------------------------------------


@pytest.mark.parametrize(('split', 'count'), [('train', 80), ('val', 20)])
def test_coco_reads_the_annotations(detection, split, count):
    path = detection / 'annotations' / f'instances_{split}.json'
    coco = COCO(str(path))
    assert coco.dataset['info']['seed'] == 0
    assert sorted(coco.getImgIds()) == list(range(1, count + 1))
    assert [c['name'] for c in coco.loadCats([1, 2, 3, 4])] == list(DETECTION_CLASSES)
    annotations = coco.dataset['annotations']
    assert [a['id'] for a in annotations] == list(range(1, len(annotations) + 1))
    assert {a['category_id'] for a in annotations} == {1, 2, 3, 4}
    for entry in annotations:
        mask = coco.annToMask(entry)
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert entry['bbox'] == box
        assert entry['area'] == mask.sum() > 0
        assert entry['iscrowd'] == 0
    for entry in coco.dataset['images']:
        image = cv2.imread(str(detection / split / entry['file_name']))
        assert image.shape == (entry['height'], entry['width'], 3)


def test_files_hold_the_drawn_scene(detection):
    generator = rng(0, 1, 4)
    objects = sample_scene(generator, 128)
    image, masks = draw_scene(objects, 128, generator)
    stored = cv2.imread(str(detection / 'val' / '000005.png'))[..., ::-1]
    assert (stored == image).all()
    coco = COCO(str(detection / 'annotations' / 'instances_val.json'))
    entries = coco.loadAnns(coco.getAnnIds(imgIds=5))
    expected = [
        (obj.name, mask)
        for obj, mask in zip(objects, masks, strict=True)
        if obj.name in DETECTION_CLASSES
    ]
    assert len(entries) == len(expected)
    for entry, (name, mask) in zip(entries, expected, strict=True):
        assert DETECTION_CLASSES[entry['category_id'] - 1] == name
        assert (coco.annToMask(entry) == mask).all()


def test_classification_folders(tmp_path):
    write_classification(tmp_path, num_train=2, num_val=1, size=64)
    for split, count in (('train', 2), ('val', 1)):
        folders = sorted((tmp_path / 'cls' / split).iterdir())
        names = sorted(name.replace(' ', '_') for name in DETECTION_CLASSES)
        assert [folder.name for folder in folders] == names
        for folder in folders:
            assert len(list(folder.glob('*.png'))) == count


def test_parts_do_not_write_over_files(tmp_path):
    (tmp_path / 'val').mkdir()
    (tmp_path / 'cls').mkdir()
    with pytest.raises(FileExistsError, match='val exists already'):
        write_detection(tmp_path, num_train=1, num_val=1)
    with pytest.raises(FileExistsError, match='cls exists already'):
        write_classification(tmp_path, num_train=1, num_val=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cls', 'val']


def test_preview_shows_up_to_twelve_pictures(detection, tmp_path):
    sheet = cv2.imread(str(preview(detection)))
    assert sheet.shape[0] > 3 * 3 * 128 and sheet.shape[1] > 4 * 3 * 128
    with pytest.raises(FileNotFoundError, match='no detection set'):
        preview(tmp_path)


# --- The whole folder -----------------------------------------------------------


def test_second_call_does_nothing_and_other_settings_stop(tmp_path):
    out = tmp_path / 'new' / 'scenes'
    manifest = make_scenes(out, SMALL)
    assert json.loads((out / 'manifest.json').read_text()) == manifest
    assert manifest['objects'] > 0
    assert [path.name for path in out.parent.iterdir()] == ['scenes']
    before = digests(out)
    (out / 'note.txt').write_text('mine')
    assert make_scenes(out, SMALL) is None
    assert make_scenes(out, SMALL, overwrite=True) is None
    other = replace(SMALL, train=4)
    with pytest.raises(FileExistsError, match='train 3, not 4'):
        make_scenes(out, other)
    assert digests(out).items() >= before.items()
    assert (out / 'note.txt').read_text() == 'mine'
    make_scenes(out, other, overwrite=True)
    assert len(list((out / 'train').iterdir())) == 4
    assert [path.name for path in out.parent.iterdir()] == ['scenes']


def test_a_foreign_folder_is_never_replaced(tmp_path):
    (tmp_path / 'photo.png').write_bytes(b'mine')
    (tmp_path / 'manifest.json').write_text('{"settings": 1}')
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match='no data set of this generator'):
            make_scenes(tmp_path, SMALL, overwrite=overwrite)
    assert (tmp_path / 'photo.png').read_bytes() == b'mine'


def test_a_failure_leaves_the_old_set_and_no_rubbish(tmp_path, monkeypatch):
    out = tmp_path / 'scenes'
    make_scenes(out, SMALL)
    before = digests(out)

    def fail(path):
        raise OSError('disk full')

    monkeypatch.setattr('dsnet_mm.demo.scenes.data_set.preview', fail)
    with pytest.raises(OSError, match='disk full'):
        make_scenes(out, replace(SMALL, seed=9), overwrite=True)
    assert digests(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


def test_command_line(command, tmp_path, capsys):
    out = tmp_path / 'scenes'
    arguments = [str(out), '--train', '2', '--val', '1', '--size', '64']
    arguments += ['--cls-train', '1', '--cls-val', '0']
    command(arguments)
    assert f'preview: {out / "preview.png"}' in capsys.readouterr().out
    command(arguments)
    assert 'nothing to do' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='seed 0, not 1'):
        command([*arguments, '--seed', '1'])
    with pytest.raises(SystemExit, match='size must be at least 64, got 32'):
        command([*arguments, '--size', '32'])
    command([*arguments, '--seed', '1', '--overwrite'])
    assert json.loads((out / 'manifest.json').read_text())['settings']['seed'] == 1


# --- Errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'shape': 'blob'}, "shape must be one of disc, .*, got 'blob'"),
        ({'texture': 'furry'}, "texture must be one of plain, .*, got 'furry'"),
        ({'colour': 'beige'}, "colour must be one of red, .*, got 'beige'"),
        ({'colour': (0, 0, 256)}, r'0 to 255, got \(0, 0, 256\)'),
        ({'radius': 0}, 'radius must be at least 1 pixel, got 0'),
        ({'period': 1}, 'period must be at least 2 pixels, got 1'),
    ],
)
def test_bad_objects(change, message):
    good = SceneObject('disc', 'plain', 'red', (5, 5), 4)
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'train': 0}, ValueError, 'train must be at least 1, got 0'),
        ({'cls_val': -1}, ValueError, 'cls_val must be at least 0, got -1'),
        ({'size': 63}, ValueError, 'size must be at least 64, got 63'),
        ({'seed': -5}, ValueError, 'seed must be at least 0, got -5'),
        ({'val': 2.5}, TypeError, 'val must be an integer, got 2.5'),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        SceneSettings(**change)


def test_bad_arguments_of_the_parts(tmp_path):
    out = tmp_path / 'scenes'
    with pytest.raises(ValueError, match='num_val must be at least 1, got -3'):
        write_detection(out, num_train=1, num_val=-3)
    with pytest.raises(ValueError, match='num_train must be at least 0, got -1'):
        write_classification(out, num_train=-1, num_val=1)
    with pytest.raises(ValueError, match='size must be at least 64, got 10'):
        draw_scene([], 10, rng(0))
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'plain disc'"):
        sample_portrait(rng(0), 64, 'plain disc')
    assert not out.exists()

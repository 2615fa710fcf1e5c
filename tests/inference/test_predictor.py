"""An image in, a result out: dsnet_mm.infer and tools/infer.py."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS as DETECTORS
from mmpretrain.registry import MODELS as CLASSIFIERS
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import dsnet_mm
from dsnet_mm.inference import DetectedObject, Mask, Predictor
from dsnet_mm.inference.predictor import (
    MAX_SIDE,
    list_images,
    make_view,
    mask_in_image,
)
from dsnet_mm.inference.tiling import Tile, make_tiles, merge_tiles
from tests.conftest import REPO, draw, tool
from tests.inference.conftest import random_checkpoint

SIZE = [
    'test_dataloader.dataset.pipeline.1.scale=(64,64)',
    'test_dataloader.dataset.pipeline.1.keep_ratio=True',
    'model.test_cfg.rpn.max_per_img=20',
    'model.test_cfg.rcnn.max_per_img=5',
]


@pytest.fixture(scope='module', autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def checkpoints(folder: Path) -> dict[str, str]:
    """Random weights for the configurations of ``folder``."""
    paths = {}
    for name, registry in (('mask_rcnn', DETECTORS), ('classifier', CLASSIFIERS)):
        paths[name] = str(folder / f'{name}_random.pth')
        model = random_checkpoint(folder / f'{name}.py', registry, paths[name])
        model.init_weights()
        # The detector takes the names of its classes from the configuration.
        meta = dict(dataset_meta=dict(classes=('square', 'disc')))
        meta = meta if name == 'classifier' else {}
        torch.save(dict(state_dict=model.state_dict(), meta=meta), paths[name])
    return paths


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of many kinds, two of which cannot be read."""
    root = tmp_path / 'images'
    (root / 'below').mkdir(parents=True)
    rng = np.random.default_rng(0)
    image, _ = draw(rng, 0)
    cv2.imwrite(str(root / 'a.png'), image)
    cv2.imwrite(str(root / 'below' / 'a.bmp'), image[:40])
    cv2.imwrite(str(root / 'deep.png'), image.astype(np.uint16) * 257)
    cv2.imwrite(str(root / 'grey.jpg'), image[..., 0])
    cv2.imwrite(str(root / 'pixel.png'), image[:1, :1])
    cv2.imwrite(str(root / 'wide.png'), np.zeros((1, 20000, 3), np.uint8))
    (root / 'damaged.jpg').write_bytes((root / 'grey.jpg').read_bytes()[:20])
    (root / 'text.png').write_text('no image')
    (root / 'readme.txt').write_text('not tried')
    return root


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('mask_rcnn', ['--batch-size=3']),
        ('mask_rcnn', ['--fuse', '--tile=32', '--overlap=8', '--batch-size=8']),
        ('classifier', ['--batch-size=4', '--fuse']),
    ],
    ids=['detector', 'tiles', 'classifier'],
)
def test_a_folder_of_images(
    name: str,
    options: list[str],
    folder: Path,
    checkpoints: dict[str, str],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / 'out'
    if name == 'mask_rcnn':
        options = [*options, '--cfg-options', *SIZE]
        cv2.imwrite(str(images / 'wide.png'), np.zeros((1, 500, 3), np.uint8))
    args = [str(folder / f'{name}.py'), checkpoints[name], str(images), f'--out={out}']
    tool('infer.py').main([*args, '--score-thr=0.02', *options])
    printed = capsys.readouterr().out
    for fact in (images / 'damaged.jpg', images / 'text.png', '6 of 8 images'):
        assert str(fact) in printed

    index = COCO(str(out / 'images.json'))
    sizes = {i['file_name']: (i['height'], i['width']) for i in index.imgs.values()}
    assert sizes['pixel.png'] == (1, 1) and sizes['below/a.bmp'] == (40, 64)
    assert [c['name'] for c in index.loadCats(index.getCatIds())] == ['square', 'disc']
    entries = json.loads((out / 'predictions.json').read_text())
    assert {entry['image_id'] for entry in entries} <= set(index.imgs)
    drawn = {str(p.relative_to(out / 'images')) for p in out.rglob('*.*g')}
    names = 'a.png below/a.bmp.jpg deep.png grey.jpg pixel.png wide.png'
    assert drawn == set(names.split())
    if name == 'classifier':
        scores = [e['score'] for e in entries if e['image_id'] == 1]
        assert sum(scores) == pytest.approx(1, abs=1e-4)
        return
    results = index.loadRes(str(out / 'predictions.json'))
    assert results.anns
    for entry in results.anns.values():
        height, width = sizes[index.imgs[entry['image_id']]['file_name']]
        left, top, wide, high = entry['bbox']
        assert min(left, top) >= 0 and min(wide, high) > 0
        assert left + wide <= width + 0.02 and top + high <= height + 0.02
        assert results.annToMask(entry).shape == (height, width)


def test_infer_equals_the_inferencer_of_mmdet(
    folder: Path, checkpoints: dict[str, str]
) -> None:
    image, _ = draw(np.random.default_rng(1), 1)
    config = str(folder / 'mask_rcnn.py')
    weights = checkpoints['mask_rcnn']
    (prediction,) = dsnet_mm.infer(config, weights, image, score_thr=0, device='cpu')
    expected = DetInferencer(config, weights, device='cpu', show_progress=False)(image)
    (expected,) = expected['predictions']
    assert prediction.objects
    # Objects whose boxes are empty are left out.
    for found in prediction.objects:
        i = np.abs(np.array(expected['bboxes']) - found.box).sum(1).argmin()
        assert expected['bboxes'][i] == pytest.approx(found.box, abs=1e-4)
        assert found.label in np.array(expected['labels'])
        rle = found.mask.to_rle(64, 64)
        masks = [m for m in expected['masks'] if m['counts'] == rle['counts']]
        assert masks or not found.mask.pixels.size


def test_a_path_and_an_array_give_the_same(
    folder: Path, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    image, _ = draw(np.random.default_rng(1), 1)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    args = folder / 'classifier.py', checkpoints['classifier']
    with pytest.warns(UserWarning, match=r'b\.png cannot be read as an image'):
        (tmp_path / 'b.png').touch()
        images = [tmp_path / 'a.png', tmp_path / 'b.png', image]
        predictions = dsnet_mm.infer(*args, images, batch_size=2)
    assert [p.image for p in predictions] == [str(tmp_path / 'a.png'), '2']
    assert np.array_equal(predictions[0].scores, predictions[1].scores)
    assert predictions[0].label in ('square', 'disc')
    with pytest.warns(FutureWarning, match='image'):
        assert predictions[1].picture == '2'


@pytest.mark.parametrize('name', ['mask_rcnn', 'classifier'])
def test_numbers_instead_of_unknown_names(
    name: str,
    folder: Path,
    checkpoints: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Predictor, '_metainfo', lambda self, cfg: {})
    bare, image, out = (tmp_path / name for name in ('bare.pth', 'a.png', 'out'))
    torch.save(dict(state_dict=torch.load(checkpoints[name])['state_dict']), bare)
    cv2.imwrite(str(image), draw(np.random.default_rng(1), 1)[0])
    args = [str(folder / f'{name}.py'), str(bare), str(image), f'--out={out}']
    tool('infer.py').main([*args, '--score-thr=0'])
    categories = json.loads((out / 'images.json').read_text())['categories']
    assert all(c['name'] == str(c['id'] - 1) for c in categories)
    entries = json.loads((out / 'predictions.json').read_text())
    assert {e['category_id'] for e in entries} <= {c['id'] for c in categories}
    assert (out / 'images' / 'a.png').is_file()


@pytest.mark.parametrize('name', ['mask_rcnn', 'classifier'])
def test_each_class_of_the_model_needs_a_name(
    name: str, folder: Path, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    checkpoint = torch.load(checkpoints[name])
    checkpoint['meta'] = dict(dataset_meta=dict(classes=['square']))
    torch.save(checkpoint, tmp_path / 'few.pth')
    with pytest.raises(ValueError, match=r'few\.pth.* 1 .* 2 '):
        Predictor(folder / f'{name}.py', tmp_path / 'few.pth')


@pytest.mark.parametrize(
    ('options', 'fact'),
    [
        (dict(batch_size=0), '0'),
        (dict(score_thr=30), '30'),
        (dict(tile=64, overlap=64), '64 and 64'),
        (dict(tile=64, overlap=8), 'classifier'),
        (dict(device='cuda:99'), 'cuda:99'),
    ],
)
def test_wrong_options(options: dict, fact: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=fact):
        Predictor(folder / 'classifier.py', 'none.pth', **options)


@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 4), (0, 8, 3), (2, 8, 8, 3)])
def test_arrays_that_are_no_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        list_images(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        ('mask_rcnn_dsnet_x_coco a.pth IMAGE', 'such as mask_rcnn_dsnet_'),
        ('CLASSIFIER a.pth none.png', 'none.png'),
        ('CLASSIFIER a.pth EMPTY', 'no image'),
        ('CLASSIFIER a.pth IMAGE', 'a.pth'),
        ('CLASSIFIER a.pth IMAGE --out TAKEN', 'exists'),
    ],
)
def test_errors_are_a_sentence(
    args: str, fact: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = dict(
        CLASSIFIER=folder / 'classifier.py',
        EMPTY=tmp_path / 'empty',
        IMAGE=tmp_path / 'a.png',
        TAKEN=tmp_path,
    )
    places['EMPTY'].mkdir()
    cv2.imwrite(str(places['IMAGE']), np.zeros((8, 8, 3), np.uint8))
    for name, path in places.items():
        args = args.replace(name, str(path))
    with pytest.raises(SystemExit, match='2'):
        tool('infer.py').main([f'--out={tmp_path / "new"}', *args.split()])
    assert fact in capsys.readouterr().err.splitlines()[-1]


# --- Views and masks --------------------------------------------------------------


@pytest.mark.parametrize('size', [(1, 1), (1, 20000), (20000, 7), (300, 9000)])
def test_extreme_images(size: tuple[int, int]) -> None:
    height, width = size
    view = make_view(np.full((*size, 3), 7, np.uint8), Tile(0, 0, width, height))
    rows, columns = view.image.shape[:2]
    assert max(rows, columns) <= MAX_SIDE
    assert max(rows, columns) <= 32 * min(rows, columns)
    mask = mask_in_image(np.ones((rows, columns), bool), view)
    assert mask.box == (0, 0, width, height)
    assert mask.pixels.all()


def test_rle_is_that_of_coco() -> None:
    rng = np.random.default_rng(0)
    for box in [(0, 0, 9, 7), (2, 0, 5, 7), (3, 2, 6, 5), (8, 6, 9, 7), (4, 3, 4, 3)]:
        for share in (0.2, 0.5, 1):
            left, top, right, bottom = box
            pixels = rng.random((bottom - top, right - left)) < share
            whole = np.zeros((7, 9), bool)
            whole[top:bottom, left:right] = pixels
            mask = Mask(pixels, left, top)
            expected = coco_mask.encode(np.asfortranarray(whole.astype(np.uint8)))
            rle = mask.to_rle(7, 9)
            assert rle == dict(size=[7, 9], counts=expected['counts'].decode())
            assert np.array_equal(mask.crop(0, 0, 9, 7), whole)
            assert np.array_equal(mask.crop(3, 1, 8, 4), whole[1:4, 3:8])


def test_rle_of_a_large_image_needs_no_large_array() -> None:
    mask = Mask(np.ones((3, 2), bool), 19_990, 19_000)
    rle = mask.to_rle(20_000, 20_000)
    assert coco_mask.area(rle) == 6
    assert coco_mask.toBbox(rle).tolist() == [19_990, 19_000, 2, 3]


# --- Tiles -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('height', 'width'), [(1, 1), (100, 64), (64, 300), (257, 129), (64, 65)]
)
def test_tiles_cover_an_image_and_overlap(height: int, width: int) -> None:
    tiles = make_tiles(height, width, 64, 16)
    seen = np.zeros((height, width), int)
    for tile in tiles:
        assert tile.right - tile.left == min(64, width)
        assert tile.bottom - tile.top == min(64, height)
        seen[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert seen.min() == 1
    assert len(set(tiles)) == len(tiles)
    lefts = sorted({tile.left for tile in tiles})
    assert all(b - a <= 48 for a, b in itertools.pairwise(lefts))


def seen_in_tiles(
    shapes: list[np.ndarray], tiles: list[Tile], masks: bool = True
) -> list[list[DetectedObject]]:
    """What a perfect detector finds in each tile, with other scores in each."""
    rng = np.random.default_rng(0)
    found = []
    for tile in tiles:
        objects = []
        for label, shape in enumerate(shapes):
            part = shape[tile.top : tile.bottom, tile.left : tile.right]
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            if len(rows):
                box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                box = box + (tile.left, tile.top) * 2
                mask = Mask(part, tile.left, tile.top) if masks else None
                score = float(rng.uniform(0.4, 0.9))
                objects.append(
                    DetectedObject(label % 2, score, box.astype(float), mask)
                )
        found.append(objects)
    return found


@pytest.mark.parametrize('masks', [True, False], ids=['masks', 'boxes'])
@pytest.mark.parametrize('overlap', [0, 16, 32])
def test_objects_across_seams_count_once(masks: bool, overlap: int) -> None:
    """Small and large ones, in one tile, across two and across four."""
    shapes = []
    for x, y, width, height in [
        (10, 10, 20, 20),  # in one tile
        (50, 20, 30, 8),  # across a vertical seam
        (100, 40, 20, 50),  # across a horizontal seam
        (45, 110, 170, 12),  # longer than two tiles
        (150, 150, 100, 100),  # larger than a tile
        (240, 20, 16, 60),  # at the edge of the image
        (47, 60, 3, 3),  # a narrow strip of it in the next tile
    ]:
        shape = np.zeros((256, 256), bool)
        shape[y : y + height, x : x + width] = True
        shapes.append(shape)
    tiles = make_tiles(256, 256, 64, overlap)
    merged = merge_tiles(seen_in_tiles(shapes, tiles, masks), tiles, 256, 256)
    if overlap == 0:  # nothing is seen twice, and nothing is joined
        assert len(merged) > len(shapes)
        return
    assert len(merged) == len(shapes)
    for shape in shapes:
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        (found,) = [o for o in merged if o.box.tolist() == box]
        if masks:
            assert np.array_equal(found.mask.crop(0, 0, 256, 256), shape)
    scores = [found.score for found in merged]
    assert scores == sorted(scores, reverse=True)


def test_neighbours_are_not_joined() -> None:
    """Two objects side by side in the overlap, and two classes at one place."""
    tiles = [Tile(0, 0, 64, 64), Tile(32, 0, 96, 64)]

    def square(left: int, label: int, score: float) -> DetectedObject:
        box = np.array([left, 20.0, left + 10, 30.0])
        return DetectedObject(
            label, score, box, Mask(np.ones((10, 10), bool), left, 20)
        )

    found = [
        [square(37, 0, 0.9), square(48, 0, 0.8), square(37, 1, 0.4)],
        [square(38, 0, 0.7), square(48, 0, 0.6)],
    ]
    merged = merge_tiles(found, tiles, 64, 96)
    # What is not cut keeps its own box.
    assert [(o.label, o.score, o.box[0]) for o in merged] == [
        (0, 0.9, 37),
        (0, 0.8, 48),
        (1, 0.4, 37),
    ]
    assert merge_tiles([[], []], tiles, 64, 96) == []


@pytest.mark.parametrize('masks', [True, False], ids=['masks', 'boxes'])
@pytest.mark.parametrize('classes', [(0, 1), (0, 0)], ids=['two classes', 'one class'])
@pytest.mark.parametrize('left', [28, 40])
def test_an_object_before_another_one(
    left: int, classes: tuple[int, int], masks: bool
) -> None:
    """A person before a bus: whole in one tile or two, and the bus is cut in two."""
    tiles = [Tile(0, 0, 64, 64), Tile(32, 0, 96, 64)]
    boxes = [left, 20, left + 10, 40], [5, 10, 95, 60]
    shapes = [np.zeros((64, 128), bool) for _ in boxes]
    for shape, (x0, y0, x1, y1) in zip(shapes, boxes, strict=True):
        shape[y0:y1, x0:x1] = True
    shapes[1] &= ~shapes[0] | (not masks)
    found = seen_in_tiles(shapes, tiles, masks)
    for objects in found:
        for o, label, score in zip(objects, classes, (0.9, 0.8), strict=True):
            o.label, o.score = label, score
    merged = merge_tiles(found, tiles, 64, 128)
    assert [(o.label, o.score) for o in merged] == [
        (classes[0], 0.9),
        (classes[1], 0.8),
    ]
    assert [o.box.tolist() for o in merged] == list(boxes)
    if masks:
        for o, shape in zip(merged, shapes, strict=True):
            assert np.array_equal(o.mask.crop(0, 0, 128, 64), shape)


# --- Configurations by name -------------------------------------------------------


def test_the_wheel_has_the_configurations(tmp_path: Path) -> None:
    """Built without the ops, installed elsewhere, used from an empty folder."""
    source, site, empty = (tmp_path / name for name in ('source', 'site', 'empty'))
    empty.mkdir()
    ignore = shutil.ignore_patterns('__pycache__', '*.so', 'csrc')
    for name in ('dsnet_mm', 'configs', 'tools'):
        shutil.copytree(REPO / name, source / name, ignore=ignore)
    for path in REPO.glob('*.*'):
        if path.is_file():
            shutil.copy(path, source)
    shutil.copy(REPO / 'LICENSE', source)
    subprocess.run(
        [
            *(sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check'),
            *('install', '--no-deps', '--no-build-isolation', '--target', site, source),
        ],
        check=True,
        env=dict(os.environ, DSNET_MM_WITH_OPS='0'),
    )
    (empty / 'mine.py').write_text(
        "_base_ = __import__('dsnet_mm').find_config('mask_rcnn_dsnet_s_coco')\n"
        'model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))\n'
    )
    code = """
import dsnet_mm
from dsnet_mm.engine.config import load_config
cfg = load_config('mine.py', {})
print(cfg.model.roi_head.bbox_head.num_classes, cfg.model.backbone.arch)
print(dsnet_mm.find_config('dsnet-tiny_8xb128_in1k.py'))
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=empty,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(site)),
    )
    assert done.returncode == 0, done.stderr
    inherited, found = done.stdout.splitlines()
    assert inherited == '3 small'
    assert found == str(site / 'dsnet_mm/.mim/configs/dsnet/dsnet-tiny_8xb128_in1k.py')

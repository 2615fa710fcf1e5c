"""Writes the pictures: a COCO detection set and a folder set for classification."""

import json
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

from .checks import check_int
from .drawing import draw_scene
from .sampling import sample_portrait, sample_scene
from .vocabulary import DETECTION_CLASSES

GENERATOR_VERSION = 1
"""Raised whenever the same seed starts to give other pictures."""


def _write_png(path: Path, image: np.ndarray) -> None:
    _, png = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f'{path} exists already; choose another folder')


def _annotation(mask: np.ndarray, category_id: int, image_id: int) -> dict:
    """Returns the COCO annotation, without its id, of a mask of shape (H, W)."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        'image_id': image_id,
        'category_id': category_id,
        'segmentation': {
            'size': [int(side) for side in rle['size']],
            'counts': rle['counts'].decode('ascii'),
        },
        'area': int(mask.sum()),
        'bbox': coco_mask.toBbox(rle).tolist(),
        'iscrowd': 0,
    }


def write_detection(
    out: str | Path,
    *,
    num_train: int,
    num_val: int,
    size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Writes pictures and COCO instance annotations.

    The files are ``train/*.png``, ``val/*.png``, ``annotations/instances_train.json``
    and ``annotations/instances_val.json``. Masks are compressed RLE and hold the
    visible part of an object. The file ``000001.png`` has image id 1.

    Args:
        out: Folder to write in, made if it is missing.
        num_train: Training pictures, at least 1.
        num_val: Validation pictures, at least 1.
        size: Height and width of a picture in pixels, at least 64.
        seed: Zero or more.
        progress: Whether to show a progress bar.

    Returns:
        Number of annotations.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small.
        FileExistsError: If ``train``, ``val`` or ``annotations`` exists.
    """
    counts = {'train': num_train, 'val': num_val}
    for split, count in counts.items():
        check_int(f'num_{split}', count, 1)
    check_int('size', size, 64)
    check_int('seed', seed, 0)
    out = Path(out)
    annotation_dir = out / 'annotations'
    _refuse_existing(out / 'train', out / 'val', annotation_dir)
    annotation_dir.mkdir(parents=True)
    total = 0
    for split_id, (split, count) in enumerate(counts.items()):
        (out / split).mkdir()
        images, annotations = [], []
        label = f'Detection, {split}'
        for index in track(range(count), label, disable=not progress):
            rng = np.random.default_rng([seed, split_id, index])
            objects = sample_scene(rng, size)
            image, masks = draw_scene(objects, size, rng)
            image_id = index + 1
            file_name = f'{image_id:06d}.png'
            _write_png(out / split / file_name, image)
            images.append(
                {'id': image_id, 'file_name': file_name, 'height': size, 'width': size}
            )
            for obj, mask in zip(objects, masks, strict=True):
                if obj.name in DETECTION_CLASSES:
                    category_id = DETECTION_CLASSES.index(obj.name) + 1
                    entry = _annotation(mask, category_id, image_id)
                    annotations.append({'id': len(annotations) + 1, **entry})
        total += len(annotations)
        content = {
            'info': {
                'description': 'Drawn scenes of DS-Net for OpenMMLab',
                'version': GENERATOR_VERSION,
                'seed': int(seed),
            },
            'categories': [
                {'id': i, 'name': name}
                for i, name in enumerate(DETECTION_CLASSES, start=1)
            ],
            'images': images,
            'annotations': annotations,
        }
        path = annotation_dir / f'instances_{split}.json'
        path.write_text(json.dumps(content), encoding='utf-8')
    return total


def write_classification(
    out: str | Path,
    *,
    num_train: int,
    num_val: int,
    size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Writes a folder of pictures for each class, with one object in each picture.

    The files are ``cls/train/striped_disc/*.png`` and so on.

    Args:
        out: Folder to write in, made if it is missing.
        num_train: Training pictures of each class, zero or more.
        num_val: Validation pictures of each class, zero or more.
        size: Height and width of a picture in pixels, at least 64.
        seed: Zero or more.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small.
        FileExistsError: If the folder ``cls`` exists.
    """
    counts = {'train': num_train, 'val': num_val}
    for split, count in counts.items():
        check_int(f'num_{split}', count, 0)
    check_int('size', size, 64)
    check_int('seed', seed, 0)
    out = Path(out)
    _refuse_existing(out / 'cls')
    for split_id, (split, count) in enumerate(counts.items()):
        folders = [out / 'cls' / split / n.replace(' ', '_') for n in DETECTION_CLASSES]
        for folder in folders:
            folder.mkdir(parents=True)
        label = f'Classification, {split}'
        pairs = list(product(range(count), range(len(DETECTION_CLASSES))))
        for index, class_id in track(pairs, label, disable=not progress):
            # The second number differs from those of the detection splits.
            rng = np.random.default_rng([seed, 2 + split_id, class_id, index])
            obj = sample_portrait(rng, size, DETECTION_CLASSES[class_id])
            image, _ = draw_scene([obj], size, rng)
            _write_png(folders[class_id] / f'{index + 1:06d}.png', image)

"""Writes the data set of the demo: drawn scenes, for detection and classification.

Everything follows from the seed. Image ``i`` of a split depends only on the seed, the
image size, the split and ``i``. A larger set begins with the images of a smaller one.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from rich.progress import track

from dsnet_mm.demo.scenes import (
    RGB,
    SceneObject,
    claim,
    distinct_colour,
    draw_scene,
)
from dsnet_mm.files import replacing

GENERATOR = {'generator': 'dsnet_mm.datasets.scenes', 'version': 1}
"""The generator in manifests. The name is an old one, so that older sets are
recognised. The version is raised when the same seed starts to give other images."""

DETECTION_CLASSES = ('striped disc', 'dotted disc', 'striped star', 'dotted star')
"""Class names, in the order of the COCO category ids 1 to 4."""

DISTRACTORS = (
    *('plain disc', 'plain star', 'striped square', 'dotted square'),
    *('striped triangle', 'dotted triangle'),
)
"""Objects of the scenes that are no class."""

PERIODS = {'striped': (3.2, 4.0), 'dotted': (5.0, 6.0), 'plain': (5.0, 6.0)}
"""Range of each texture's period in pixels. The smallest object has three periods.
Dots are coarser than stripes: with equal periods, a small network needed several times
as many images to tell them apart."""

MIN_VISIBLE = 0.45
"""Least visible part of an object of a scene, as a fraction of its full area."""


def _random_object(
    rng: Generator, name: str, colour: RGB, radius: float, low: float, size: int
) -> SceneObject:
    """Returns an object whose centre is at least ``low`` pixels from the border."""
    centre = tuple(rng.uniform(low, size - 1 - low, 2).tolist())
    angle = float(rng.uniform(0, 360))
    period = float(rng.uniform(*PERIODS[name.split()[0]]))
    return SceneObject(name, colour, centre, radius, angle, period)


def sample_scene(rng: Generator, size: int) -> list[SceneObject]:
    """Chooses the objects of a detection image.

    There are one to five objects of ``DETECTION_CLASSES`` and up to two distractors.
    At least ``MIN_VISIBLE`` of each object's area is visible. An object that would
    hide too much is moved, and left out after 20 tries.

    Args:
        rng: Random generator.
        size: Height and width of the image in pixels.

    Returns:
        The objects, from back to front.
    """
    classes = rng.choice(DETECTION_CLASSES, rng.integers(1, 6)).tolist()
    rest = classes[1:] + rng.choice(DISTRACTORS, rng.integers(0, 3)).tolist()
    rng.shuffle(rest)
    least, most = np.log(max(9, 0.07 * size)), np.log(0.31 * size)
    objects: list[SceneObject] = []
    areas: list[int] = []
    owner = np.full((size, size), -1, np.int16)
    # The first object always finds a place: every image has an object of a class.
    for name in [classes[0], *rest]:
        colour = distinct_colour(rng, objects)
        radius = float(np.exp(rng.uniform(least, most)))
        for _ in range(20):
            obj = _random_object(rng, name, colour, radius, radius / 2, size)
            claimed = owner.copy()
            tried = [*areas, claim(claimed, obj, len(objects))]
            visible = np.bincount(claimed.ravel() + 1, minlength=len(tried) + 1)[1:]
            if (visible >= MIN_VISIBLE * np.array(tried)).all():
                objects.append(obj)
                areas, owner = tried, claimed
                break
    return objects


@dataclass(frozen=True)
class SceneSettings:
    """Settings of a data set.

    Attributes:
        train: Detection images for training, at least 1.
        val: Detection images for validation, at least 1.
        cls_train: Classification images of each class for training.
        cls_val: Classification images of each class for validation.
        size: Height and width of a detection image in pixels, at least 64.
        cls_size: Height and width of a classification image, at least 64. With half of
            ``size``, objects are about as large as those of the scenes.
        seed: Zero or more.

    Raises:
        ValueError: If a number is too small.
    """

    train: int = 1000
    val: int = 100
    cls_train: int = 800
    cls_val: int = 50
    size: int = 128
    cls_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = {'train': 1, 'val': 1, 'size': 64, 'cls_size': 64}.get(name, 0)
            if value < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')


def _write_png(path: Path, image: np.ndarray) -> None:
    _, png = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


def _draw_tile(
    image: np.ndarray, shown: list[tuple[SceneObject, np.ndarray]]
) -> Image.Image:
    """Returns an image, 384 pixels high, with objects outlined by masks and named."""
    tile = Image.fromarray(image).resize((384, 384), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(tile)
    for obj, mask in shown:
        large = Image.fromarray(np.uint8(255 * mask)).resize(tile.size, 0)
        draw.bitmap((0, 0), large.filter(ImageFilter.FIND_EDGES), (255, 212, 0))
        at = np.clip(np.multiply(obj.centre, 384 / len(image)), 40, 344).tolist()
        draw.text(at, obj.name, 'white', anchor='mm', stroke_width=2, stroke_fill=0)
    return tile


def _write_detection(out: Path, settings: SceneSettings) -> int:
    """Writes images, COCO files and ``preview.png``. Returns the number of objects.

    Masks are compressed RLE and hold the visible part of an object. The file
    ``000001.png`` has image id 1.
    """
    size, total = settings.size, 0
    sheet = Image.new('RGB', (4 * 388, 3 * 388))
    (out / 'annotations').mkdir()
    for part, split in enumerate(('train', 'val')):
        (out / split).mkdir()
        images, annotations = [], []
        for index in track(range(getattr(settings, split)), f'Detection, {split}'):
            rng = np.random.default_rng([settings.seed, part, index])
            objects = sample_scene(rng, size)
            image, masks = draw_scene(objects, size, rng)
            name, number = f'{index + 1:06d}.png', index + 1
            _write_png(out / split / name, image)
            images.append(dict(id=number, file_name=name, height=size, width=size))
            pairs = zip(objects, masks, strict=True)
            shown = [pair for pair in pairs if pair[0].name in DETECTION_CLASSES]
            for obj, mask in shown:
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                item = dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=DETECTION_CLASSES.index(obj.name) + 1,
                    segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                    area=int(mask.sum()),
                    bbox=coco_mask.toBbox(rle).tolist(),
                    iscrowd=0,
                )
                annotations.append(item)
            if split == 'val' and index < 12:
                at = (index % 4 * 388 + 2, index // 4 * 388 + 2)
                sheet.paste(_draw_tile(image, shown), at)
        content = dict(
            info=dict(
                description='Drawn scenes of DS-Net for OpenMMLab',
                version=GENERATOR['version'],
                seed=settings.seed,
            ),
            categories=[dict(id=i, name=n) for i, n in enumerate(DETECTION_CLASSES, 1)],
            images=images,
            annotations=annotations,
        )
        path = out / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(content), encoding='utf-8')
        total += len(annotations)
    sheet.save(out / 'preview.png')
    return total


def _write_classification(out: Path, settings: SceneSettings) -> None:
    """Writes a folder of images for each class, with one object inside each image."""
    size = settings.cls_size
    for part, split in enumerate(('train', 'val')):
        folders = [out / 'cls' / split / n.replace(' ', '_') for n in DETECTION_CLASSES]
        for folder in folders:
            folder.mkdir(parents=True)
        count = getattr(settings, f'cls_{split}')
        pairs = list(product(range(count), enumerate(DETECTION_CLASSES)))
        for index, (label, name) in track(pairs, f'Classification, {split}'):
            # The second number differs from those of the detection splits.
            rng = np.random.default_rng([settings.seed, 2 + part, label, index])
            radius = float(size * rng.uniform(0.22, 0.42))
            colour = distinct_colour(rng, [])
            obj = _random_object(rng, name, colour, radius, radius, size)
            image, _ = draw_scene([obj], size, rng)
            _write_png(folders[label] / f'{index + 1:06d}.png', image)


def _read_manifest(out: Path) -> dict | None:
    """Returns the manifest of a set that ``make_scenes`` wrote, otherwise None."""
    try:
        manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
        is_ours = manifest['generator'] == GENERATOR['generator']
        return manifest if is_ours and isinstance(manifest['settings'], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def make_scenes(
    out: str | Path, settings: SceneSettings, *, overwrite: bool = False
) -> dict | None:
    """Writes detection, classification, preview and manifest as one folder.

    The files are ``{train,val}/*.png``, ``annotations/instances_{train,val}.json``,
    ``cls/{train,val}/striped_disc/*.png`` and so on, ``preview.png`` and
    ``manifest.json``, with the settings and the number of annotations. The folder
    appears only when it is complete.

    Args:
        out: Folder to make.
        settings: Size of the set, size of the images and seed.
        overwrite: Whether to replace a set made with other settings, together with
            everything else in its folder. Other folders are never replaced.

    Returns:
        The manifest, or None if the folder holds a set with these settings already.

    Raises:
        FileExistsError: If ``out`` holds something else.
    """
    out = Path(out).resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        found = _read_manifest(out)
        if found is None:
            raise FileExistsError(
                f'{out} exists and is no data set of this generator; choose another '
                f'folder'
            )
        made = found | found['settings']
        changes = [
            f'{key} {made.get(key)}, not {value}'
            for key, value in (GENERATOR | asdict(settings)).items()
            if made.get(key) != value
        ]
        if not changes:
            return None
        if not overwrite:
            raise FileExistsError(
                f'{out} holds a set made with other settings ({"; ".join(changes)}); '
                f'choose another folder or allow overwriting'
            )
    with replacing(out) as fresh:
        objects = _write_detection(fresh, settings)
        _write_classification(fresh, settings)
        manifest = {**GENERATOR, 'settings': asdict(settings), 'objects': objects}
        (fresh / 'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    return manifest


HELP = {
    'train': 'detection images',
    'val': 'detection images held out',
    'cls_train': 'classification images of each class',
    'cls_val': 'classification images of each class held out',
    'size': 'height and width of a detection image, in pixels',
    'cls_size': 'height and width of a classification image',
    'seed': 'random seed',
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('out', type=Path, help='folder to make')
    for field in fields(SceneSettings):
        option = f'--{field.name.replace("_", "-")}'
        parser.add_argument(
            option, type=int, default=field.default, help=HELP[field.name]
        )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a set made with other settings',
    )
    args = vars(parser.parse_args(argv))
    out, overwrite = args.pop('out'), args.pop('overwrite')
    start = time.perf_counter()
    try:
        settings = SceneSettings(**args)
        manifest = make_scenes(out, settings, overwrite=overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f'make_scenes: {error}')
    if manifest is None:
        print(f'{out} holds this set already; nothing to do.')
        return
    seconds = time.perf_counter() - start
    print(
        f'{settings.train} + {settings.val} detection images with '
        f'{manifest["objects"]} objects and {settings.cls_train} + {settings.cls_val} '
        f'classification images a class written to {out} in {seconds:.1f} s; '
        f'preview: {out / "preview.png"}'
    )


if __name__ == '__main__':
    main()

"""Drawn scenes: a small data set that needs no download.

An image shows a few objects on a textured background. The class of an object is its
texture together with its shape ('striped disc', 'dotted star'). The texture has a
period of a few pixels. The shape shows only over the whole object. A network has to
use both.

Everything follows from the seed. Image ``i`` of a split depends only on the seed, the
image size, the split and ``i``. A larger set begins with the images of a smaller one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask
from rich.progress import track

from dsnet_mm.files import replacing

GENERATOR = {'generator': 'dsnet_mm.datasets.scenes', 'version': 1}
"""The generator in manifests. The name is an old one, so that older sets are
recognised. The version is raised when the same seed starts to give other images."""

RGB = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

COLOURS: dict[str, RGB] = {
    'red': (214, 39, 40),
    'orange': (245, 133, 24),
    'yellow': (240, 210, 40),
    'green': (44, 150, 60),
    'cyan': (50, 200, 215),
    'blue': (40, 85, 205),
    'purple': (130, 60, 175),
    'pink': (245, 140, 190),
}

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


def _regular(corners: int, inner: float = 1) -> np.ndarray:
    """Returns the corners of a regular polygon, or of a star with an inner radius."""
    turn = 2 * np.pi * np.arange(corners) / corners
    radius = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1)


def _cross(a: float = 0.32) -> np.ndarray:
    """Returns the corners of a plus sign whose arms are ``2 * a`` wide."""
    end = np.sqrt(1 - a**2)
    x = [a, a, -a, -a, -end, -end, -a, -a, a, a, end, end]
    return np.stack([x, np.roll(x, -3)], axis=1)


def _heart() -> np.ndarray:
    """Returns the corners of a heart, point down."""
    turn = 2 * np.pi * np.arange(64) / 64
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn)
    y = y - np.cos(4 * turn)
    points = np.stack([x, 2.5 - y], axis=1)
    return points / np.linalg.norm(points, axis=1).max()


SHAPES: dict[str, list[np.ndarray]] = {
    'disc': [_regular(64)],
    'square': [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.sqrt(0.5)],
    'triangle': [_regular(3)],
    'star': [_regular(10, inner=0.45)],
    'ring': [_regular(64), 0.5 * _regular(64)],
    'cross': [_cross()],
    'heart': [_heart()],
    'diamond': [np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]])],
}
"""Outlines of each shape in the unit circle: (corners, 2), x right and y down."""


def _distance(u: np.ndarray, period: float) -> np.ndarray:
    """Returns the distance to the nearest multiple of ``period``."""
    return np.abs(u / period - np.round(u / period)) * period


def _band(u: np.ndarray, period: float, width: float) -> np.ndarray:
    """Returns the coverage, 0 to 1, of one soft-edged band in each period of ``u``."""
    return np.clip(0.5 + width / 2 - _distance(u, period), 0, 1)


def _dotted(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    # Every other row is shifted: each dot has six neighbours at the same distance.
    row = np.round(v / period)
    spacing = period * 2 / 3**0.5
    along = u / spacing + row % 2 / 2
    du = (along - np.round(along)) * spacing
    return np.clip(0.5 + 0.36 * period - np.hypot(du, v - row * period), 0, 1)


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'plain': lambda u, v, p: np.zeros_like(u),
    'striped': lambda u, v, p: _band(v, p, 0.45 * p),
    'dotted': _dotted,
    'checked': lambda u, v, p: (
        0.5 + 0.5 * (2 * _band(u, 2 * p, p) - 1) * (2 * _band(v, 2 * p, p) - 1)
    ),
    'gridded': lambda u, v, p: np.maximum(_band(u, p, 0.3 * p), _band(v, p, 0.3 * p)),
    'zigzag': lambda u, v, p: _band(v + _distance(u, 2 * p), p, 0.45 * p),
}
"""Pattern of each texture. It maps object coordinates and the period, in pixels, to
the share of the second tone, 0 to 1."""


class SceneObject(NamedTuple):
    """One object: its look and its place.

    Attributes:
        name: Key of ``TEXTURES`` and key of ``SHAPES``, such as 'striped disc'.
        colour: Red, green and blue. The second tone of the texture is a darker or
            lighter form of it.
        centre: x and y in pixels. Whole numbers are pixel centres.
        radius: Radius in pixels of the circle around the shape.
        angle: Clockwise rotation of shape and texture in degrees.
        period: Period of the texture in pixels.
    """

    name: str
    colour: RGB
    centre: tuple[float, float]
    radius: float
    angle: float = 0.0
    period: float = 5.0


def _second_tone(rgb: np.ndarray) -> np.ndarray:
    """Returns darker forms of light colours, lighter forms of dark ones, (..., 3)."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.where(luminance[..., None] > 118, 0.2 * rgb, rgb + 0.8 * (255 - rgb))


def _blend(rgb: RGB, share: np.ndarray) -> np.ndarray:
    """Mixes a colour with a share of its second tone, uint8 of shape (..., 3)."""
    first = np.array(rgb, np.float32)
    mixed = first + share[..., None] * (_second_tone(first) - first)
    return np.rint(mixed).astype(np.uint8)


def _distinct_colour(rng: Generator, objects: list[SceneObject]) -> RGB:
    """Returns the one of 16 random colours that is farthest from those of objects."""
    candidates = rng.integers(0, 256, (16, 3)).astype(np.float32)
    best = 0
    if objects:
        # Distance from each taken colour to the line between a candidate's two tones.
        taken = np.array([obj.colour for obj in objects], np.float32)
        line = _second_tone(candidates) - candidates
        offset = taken[None] - candidates[:, None]
        along = (offset * line[:, None]).sum(2) / (line**2).sum(1)[:, None]
        offset -= np.clip(along, 0, 1)[..., None] * line[:, None]
        best = np.linalg.norm(offset, axis=2).min(axis=1).argmax()
    return tuple(int(tone) for tone in candidates[best])


def _pattern(rng: Generator, size: int) -> np.ndarray:
    """Returns the pattern of a background, (size, size)."""

    def noise(cell: float) -> np.ndarray:  # varies over about ``cell`` pixels
        count = int(np.ceil(size / cell)) + 1
        grid = rng.standard_normal((count, count), np.float32)
        return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)

    def ramp() -> np.ndarray:  # position along a random direction, in pixels
        turn = rng.uniform(0, 2 * np.pi)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        steps = np.arange(size, dtype=np.float32)
        return steps[None] * cos + steps[:, None] * sin

    kind = rng.integers(4)
    if kind == 0:  # noise of four scales
        return sum(0.8**i * noise(max(size / 4 * 0.5**i, 2.5)) for i in range(4))
    if kind == 1:  # a bent grating
        period = float(np.exp(rng.uniform(np.log(5), np.log(24))))
        bend = noise(size / 3)
        return np.sin(2 * np.pi / period * ramp() + bend)
    if kind == 2:  # blotches
        return np.tanh(5 * noise(rng.uniform(5, 20)))
    return 4 / size * ramp() + 0.5 * noise(3)  # a gradient


def _claim(owner: np.ndarray, obj: SceneObject, index: int) -> int:
    """Writes ``index`` to an object's pixels of ``owner`` and returns its full area."""
    reach = int(np.ceil(obj.radius)) + 1
    x, y = obj.centre
    left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
    turn = np.deg2rad(obj.angle)
    cos, sin = np.cos(turn), np.sin(turn)
    rotate = np.array([[cos, sin], [-sin, cos]])
    # cv2 takes corners in 1/16 pixel when shift is 4.
    corners = [
        np.rint((obj.radius * outline @ rotate + [x - left, y - top]) * 16)
        for outline in SHAPES[obj.name.split()[1]]
    ]
    mask = np.zeros((2 * reach + 2, 2 * reach + 2), np.uint8)
    cv2.fillPoly(mask, [c.astype(np.int32) for c in corners], 1, shift=4)
    y0, y1 = np.clip([top, top + len(mask)], 0, len(owner))
    x0, x1 = np.clip([left, left + len(mask)], 0, len(owner))
    shown = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    owner[y0:y1, x0:x1][shown > 0] = index
    return int(mask.sum())


def draw_scene(
    objects: list[SceneObject], size: int, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws objects on a random textured background.

    Only the background is random. Its colour is far from those of the objects.

    Args:
        objects: From back to front. A later object covers the earlier ones.
        size: Height and width of the image in pixels.
        rng: Random generator of the background.

    Returns:
        The image, RGB uint8 of shape (size, size, 3), and the visible part of each
        object, bool of shape (len(objects), size, size). The masks are exact and do
        not overlap.
    """
    pattern = _pattern(rng, size)
    pattern = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    share = np.clip(0.5 + 0.3 * pattern, 0, 1).astype(np.float32)
    image = _blend(_distinct_colour(rng, objects), share)
    owner = np.full((size, size), -1, np.int16)
    for index, obj in enumerate(objects):
        _claim(owner, obj, index)
    masks = owner[None] == np.arange(len(objects))[:, None, None]
    for obj, mask in zip(objects, masks, strict=True):
        rows, columns = np.nonzero(mask)
        x = (columns - obj.centre[0]).astype(np.float32)
        y = (rows - obj.centre[1]).astype(np.float32)
        turn = np.deg2rad(obj.angle)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        texture = TEXTURES[obj.name.split()[0]]
        share = texture(cos * x + sin * y, cos * y - sin * x, obj.period)
        image[mask] = _blend(obj.colour, share)
    return image, masks


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
        colour = _distinct_colour(rng, objects)
        radius = float(np.exp(rng.uniform(least, most)))
        for _ in range(20):
            obj = _random_object(rng, name, colour, radius, radius / 2, size)
            claimed = owner.copy()
            tried = [*areas, _claim(claimed, obj, len(objects))]
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
            colour = _distinct_colour(rng, [])
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

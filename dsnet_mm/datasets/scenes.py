"""Drawn scenes: a small data set that needs no download.

A picture shows a few objects on a textured background. The class of an object is
its fine texture together with its whole shape ('striped disc', 'dotted star'): the
texture has a period of a few pixels, the shape shows only over the whole object, so
a network has to use both.

Everything follows from the seed. Picture ``i`` of a split depends only on the seed,
the picture size, the split and ``i``: asking for more pictures leaves the first ones
as they were.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    'BACKGROUNDS',
    'COLOURS',
    'DETECTION_CLASSES',
    'SHAPES',
    'TEXTURES',
    'SceneObject',
    'SceneSettings',
    'draw_scene',
    'make_scenes',
    'preview',
    'sample_portrait',
    'sample_scene',
    'write_classification',
    'write_detection',
]

GENERATOR_VERSION = 1
"""Raised whenever the same seed starts to give other pictures."""

MIN_VISIBLE = 0.45
"""Least visible part of a recorded object, as a fraction of its full area."""

RGB = tuple[int, int, int]


# --- Vocabulary -----------------------------------------------------------------


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """Corners of a regular polygon, or of a star with that inner radius, point up."""
    steps = corners if inner is None else 2 * corners
    radius = np.ones(steps)
    if inner is not None:
        radius[1::2] = inner
    turn = 2 * np.pi * np.arange(steps) / steps
    return np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1)


def _cross(arm: float) -> np.ndarray:
    """Corners of a plus sign whose arms are ``2 * arm`` wide."""
    end = np.sqrt(1 - arm**2)
    quarter = np.array([[arm, -arm], [arm, -end], [-arm, -end]])
    quarters = [quarter]
    for _ in range(3):
        x, y = quarters[-1].T
        quarters.append(np.stack([y, -x], axis=1))
    return np.concatenate(quarters)


def _heart() -> np.ndarray:
    """Corners of a heart, point down."""
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
    'star': [_regular(5, inner=0.45)],
    'ring': [_regular(64), 0.5 * _regular(64)],
    'cross': [_cross(0.32)],
    'heart': [_heart()],
    'diamond': [np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]])],
}
"""Shape name to its outlines in the unit circle, x right and y down, upright."""


def _band(u: np.ndarray, period: float, width: float) -> np.ndarray:
    """Coverage of bands of that width, one in each period along ``u``, soft edges."""
    distance = np.abs(u / period - np.round(u / period)) * period
    return np.clip(0.5 + width / 2 - distance, 0, 1)


def _plain(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.zeros_like(u)


def _striped(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return _band(v, period, 0.45 * period)


def _dotted(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    # Rows a period apart, every other one shifted: each dot has six equal neighbours.
    row = np.round(v / period)
    spacing = period * 2 / 3**0.5
    along = u / spacing + row % 2 / 2
    du = (along - np.round(along)) * spacing
    return np.clip(0.5 + 0.36 * period - np.hypot(du, v - row * period), 0, 1)


def _checked(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    across = 2 * _band(u, 2 * period, period) - 1
    along = 2 * _band(v, 2 * period, period) - 1
    return 0.5 + 0.5 * across * along


def _gridded(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.maximum(_band(u, period, 0.3 * period), _band(v, period, 0.3 * period))


def _zigzag(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    wave = 2 * period
    return _band(
        v + np.abs(u / wave - np.round(u / wave)) * wave, period, 0.45 * period
    )


TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    'plain': _plain,
    'striped': _striped,
    'dotted': _dotted,
    'checked': _checked,
    'gridded': _gridded,
    'zigzag': _zigzag,
}
"""Texture name to its pattern: object coordinates and the period, in pixels, to the
share of the second tone, 0 to 1."""

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
"""Colour name to its red, green and blue, 0 to 255."""

DETECTION_CLASSES = ('striped disc', 'dotted disc', 'striped star', 'dotted star')
"""Class names, in the order of the COCO category ids 1 to 4."""

# Pixels; fine, yet three periods across the smallest object. The two textures of the
# classes differ in scale too: with equal periods, a small network needed several times
# as many pictures to tell dots from stripes.
_PERIODS = {'striped': (3.2, 4.0), 'dotted': (5.0, 6.0), 'plain': (5.0, 6.0)}

_DISTRACTORS = (
    'plain disc',
    'plain star',
    'striped square',
    'dotted square',
    'striped triangle',
    'dotted triangle',
)


@dataclass(frozen=True)
class SceneObject:
    """One object: what it looks like and where it stands.

    Attributes:
        shape: A key of ``SHAPES``.
        texture: A key of ``TEXTURES``.
        colour: A key of ``COLOURS``, or red, green and blue from 0 to 255. The second
            tone of the texture is a darker or lighter form of it.
        centre: x and y in pixels; whole numbers are pixel centres.
        radius: Radius in pixels of the circle the shape just fits in.
        angle: Turn in degrees, clockwise as seen; the texture turns with the shape.
        period: Period of the texture in pixels.
    """

    shape: str
    texture: str
    colour: str | RGB
    centre: tuple[float, float]
    radius: float
    angle: float = 0.0
    period: float = 5.0

    def __post_init__(self) -> None:
        _check_choice('shape', self.shape, SHAPES)
        _check_choice('texture', self.texture, TEXTURES)
        if isinstance(self.colour, str):
            _check_choice('colour', self.colour, COLOURS)
        elif len(self.colour) != 3 or not all(0 <= c <= 255 for c in self.colour):
            raise ValueError(
                f'colour must be a name or three numbers from 0 to 255, '
                f'got {self.colour!r}'
            )
        if self.radius < 1:
            raise ValueError(f'radius must be at least 1 pixel, got {self.radius!r}')
        if self.period < 2:
            raise ValueError(f'period must be at least 2 pixels, got {self.period!r}')

    @property
    def name(self) -> str:
        """Texture and shape, such as 'striped disc'."""
        return f'{self.texture} {self.shape}'

    @property
    def rgb(self) -> RGB:
        """Red, green and blue of the colour, 0 to 255."""
        return COLOURS[self.colour] if isinstance(self.colour, str) else self.colour


def _check_choice(what: str, value: object, choices: dict[str, object]) -> None:
    if value not in choices:
        raise ValueError(f'{what} must be one of {", ".join(choices)}, got {value!r}')


def _check_int(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{what} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{what} must be at least {least}, got {value!r}')


# --- Drawing --------------------------------------------------------------------


def _second_tone(rgb: np.ndarray) -> np.ndarray:
    """The darker form of light colours, the lighter form of dark ones, (..., 3)."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.where(luminance[..., None] > 118, 0.2 * rgb, rgb + 0.8 * (255 - rgb))


def _distinct_colour(rng: np.random.Generator, taken: list[RGB]) -> RGB:
    """Of 16 random colours the one whose tones keep farthest from those taken."""
    candidates = rng.integers(0, 256, (16, 3)).astype(np.float32)
    best = 0
    if taken:
        # Distance of each colour taken to the line between a candidate's two tones.
        way = _second_tone(candidates) - candidates
        offset = np.array(taken, np.float32)[None] - candidates[:, None]
        along = (offset * way[:, None]).sum(2) / (way**2).sum(1)[:, None]
        offset -= np.clip(along, 0, 1)[..., None] * way[:, None]
        best = np.linalg.norm(offset, axis=2).min(axis=1).argmax()
    return tuple(int(tone) for tone in candidates[best])


def _smooth_noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Noise of shape (size, size) that varies over about ``cell`` pixels."""
    count = int(np.ceil(size / cell)) + 1
    grid = rng.standard_normal((count, count), np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Pixels along a random direction, shape (size, size)."""
    turn = rng.uniform(0, 2 * np.pi)
    steps = np.arange(size, dtype=np.float32)
    return steps[None] * np.float32(np.cos(turn)) + steps[:, None] * np.float32(
        np.sin(turn)
    )


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    cells = size / 4 * 0.5 ** np.arange(4)
    return sum(
        0.8**i * _smooth_noise(rng, size, max(cell, 2.5))
        for i, cell in enumerate(cells)
    )


def _grating(rng: np.random.Generator, size: int) -> np.ndarray:
    period = float(np.exp(rng.uniform(np.log(5), np.log(24))))
    bend = _smooth_noise(rng, size, size / 3)
    return np.sin(2 * np.pi / period * _ramp(rng, size) + bend)


def _blotches(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.tanh(5 * _smooth_noise(rng, size, rng.uniform(5, 20)))


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    return 4 / size * _ramp(rng, size) + 0.5 * _smooth_noise(rng, size, 3)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    'noise': _noise,
    'grating': _grating,
    'blotches': _blotches,
    'gradient': _gradient,
}
"""Background name to its pattern: generator and size to values (size, size)."""


def _draw_background(
    rng: np.random.Generator, size: int, taken: list[RGB]
) -> np.ndarray:
    """A background whose two tones differ as an object's do, (size, size, 3) uint8."""
    kind = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    pattern = BACKGROUNDS[kind](rng, size)
    pattern = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    share = np.clip(0.5 + 0.3 * pattern, 0, 1).astype(np.float32)
    return _blend(_distinct_colour(rng, taken), share)


def _blend(rgb: RGB, share: np.ndarray) -> np.ndarray:
    """Mix of a colour and that share of its second tone, uint8 (..., 3)."""
    first = np.array(rgb, np.float32)
    mixed = first + share[..., None] * (_second_tone(first) - first)
    return np.rint(mixed).astype(np.uint8)


def _silhouette(obj: SceneObject) -> tuple[int, int, np.ndarray]:
    """Left and top of a window around an object, and its full mask in there."""
    reach = int(np.ceil(obj.radius)) + 1
    x, y = obj.centre
    left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
    turn = np.deg2rad(obj.angle)
    cos, sin = np.cos(turn), np.sin(turn)
    rotate = np.array([[cos, sin], [-sin, cos]])
    # cv2 takes corners in 1/16 pixel when shift is 4.
    corners = [
        np.rint((obj.radius * outline @ rotate + [x - left, y - top]) * 16)
        for outline in SHAPES[obj.shape]
    ]
    mask = np.zeros((2 * reach + 2, 2 * reach + 2), np.uint8)
    cv2.fillPoly(mask, [c.astype(np.int32) for c in corners], 1, shift=4)
    return left, top, mask.astype(bool)


def _claim(owner: np.ndarray, obj: SceneObject, index: int) -> int:
    """Mark an object's pixels in ``owner`` as its own; return its full area."""
    left, top, mask = _silhouette(obj)
    y0, y1 = np.clip([top, top + len(mask)], 0, len(owner))
    x0, x1 = np.clip([left, left + len(mask)], 0, len(owner))
    shown = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    owner[y0:y1, x0:x1][shown] = index
    return int(mask.sum())


def draw_scene(
    objects: list[SceneObject], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects on a random textured background.

    The generator chooses only the background, whose colour it keeps away from the
    objects'. The objects look as they say.

    Args:
        objects: Back to front: a later object covers the earlier ones.
        size: Height and width of the picture in pixels, at least 64.
        rng: Source of the background.

    Returns:
        The picture, RGB uint8 of shape (size, size, 3), and the visible part of
        each object, bool of shape (len(objects), size, size). The masks are exact
        and do not overlap: outside them the picture is the background.

    Raises:
        ValueError: If ``size`` is below 64.
    """
    _check_int('size', size, 64)
    image = _draw_background(rng, size, [obj.rgb for obj in objects])
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
        share = TEXTURES[obj.texture](cos * x + sin * y, cos * y - sin * x, obj.period)
        image[mask] = _blend(obj.rgb, share)
    return image, masks


# --- Sampling -------------------------------------------------------------------


def _random_object(
    rng: np.random.Generator,
    name: str,
    rgb: RGB,
    radius: float,
    span: tuple[float, float],
) -> SceneObject:
    """An object of that look, its centre's x and y drawn from ``span`` pixels."""
    texture, shape = name.split()
    return SceneObject(
        shape=shape,
        texture=texture,
        colour=rgb,
        centre=tuple(rng.uniform(*span, 2).tolist()),
        radius=radius,
        angle=float(rng.uniform(0, 360)),
        period=float(rng.uniform(*_PERIODS[texture])),
    )


def sample_scene(rng: np.random.Generator, size: int) -> list[SceneObject]:
    """Choose the objects of a detection picture.

    One to five objects of ``DETECTION_CLASSES`` and up to two distractors, whose
    texture and shape together are no class. Of each at least ``MIN_VISIBLE`` of its
    area shows: an object that would break this for itself or for an earlier one is
    moved, and left out after 20 tries.

    Args:
        rng: Source of the choice.
        size: Height and width of the picture in pixels, at least 64.

    Returns:
        The objects, back to front.

    Raises:
        ValueError: If ``size`` is below 64.
    """
    _check_int('size', size, 64)
    classes = rng.choice(DETECTION_CLASSES, rng.integers(1, 6)).tolist()
    rest = classes[1:] + rng.choice(_DISTRACTORS, rng.integers(0, 3)).tolist()
    rng.shuffle(rest)
    least, most = np.log(max(9, 0.07 * size)), np.log(0.31 * size)
    objects: list[SceneObject] = []
    full_areas: list[int] = []
    owner = np.full((size, size), -1, np.int16)
    # The first one always finds a place, so no picture is without a class object.
    for name in [classes[0], *rest]:
        rgb = _distinct_colour(rng, [obj.rgb for obj in objects])
        radius = float(np.exp(rng.uniform(least, most)))
        span = (radius / 2, size - 1 - radius / 2)
        for _ in range(20):
            obj = _random_object(rng, name, rgb, radius, span)
            claimed = owner.copy()
            area = _claim(claimed, obj, len(objects))
            areas = [*full_areas, area]
            visible = np.bincount(claimed.ravel() + 1, minlength=len(areas) + 1)[1:]
            if (visible >= MIN_VISIBLE * np.array(areas)).all():
                objects.append(obj)
                full_areas = areas
                owner = claimed
                break
    return objects


def sample_portrait(rng: np.random.Generator, size: int, name: str) -> SceneObject:
    """Choose the one object of a classification picture.

    Args:
        rng: Source of the choice.
        size: Height and width of the picture in pixels, at least 64.
        name: One of ``DETECTION_CLASSES``.

    Returns:
        A fairly large object that lies inside the picture.

    Raises:
        ValueError: If ``size`` is below 64 or ``name`` is no class.
    """
    _check_int('size', size, 64)
    _check_choice('name', name, dict.fromkeys(DETECTION_CLASSES))
    radius = float(size * rng.uniform(0.22, 0.42))
    span = (radius, size - 1 - radius)
    return _random_object(rng, name, _distinct_colour(rng, []), radius, span)


# --- Writing --------------------------------------------------------------------

_SPLITS = ('train', 'val')


def _write_png(path: Path, image: np.ndarray) -> None:
    _, png = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding='utf-8')


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f'{path} exists already; choose another folder')


def _annotation(mask: np.ndarray, category_id: int, image_id: int) -> dict:
    """COCO entry of a visible mask of shape (height, width), without its id."""
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
    """Write pictures and COCO instance annotations.

    Writes ``train/*.png``, ``val/*.png``, ``annotations/instances_train.json`` and
    ``annotations/instances_val.json``. The masks are compressed RLE of the visible
    part; the file ``000001.png`` has image id 1.

    Args:
        out: Folder to write in, made if it is missing.
        num_train: Training pictures, at least 1.
        num_val: Validation pictures, at least 1.
        size: Height and width of a picture in pixels, at least 64.
        seed: Zero or more.
        progress: Whether to show a progress bar.

    Returns:
        Number of objects annotated.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is too small.
        FileExistsError: If one of the folders to write exists.
    """
    counts = {'train': num_train, 'val': num_val}
    for split, count in counts.items():
        _check_int(f'num_{split}', count, 1)
    _check_int('size', size, 64)
    _check_int('seed', seed, 0)
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
        _write_json(
            annotation_dir / f'instances_{split}.json',
            {
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
            },
        )
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
    """Write a folder set for image classification, one object a picture.

    Writes ``cls/train/striped_disc/*.png`` and so on for each class and split.

    Args:
        out: Folder to write in, made if it is missing.
        num_train: Training pictures of each class, zero or more.
        num_val: Validation pictures of each class, zero or more.
        size: Height and width of a picture in pixels, at least 64.
        seed: Zero or more.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is too small.
        FileExistsError: If the folder ``cls`` exists.
    """
    counts = {'train': num_train, 'val': num_val}
    for split, count in counts.items():
        _check_int(f'num_{split}', count, 0)
    _check_int('size', size, 64)
    _check_int('seed', seed, 0)
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


def preview(out: str | Path) -> Path:
    """Draw a contact sheet of validation pictures with their truth.

    Args:
        out: Folder that ``write_detection`` wrote.

    Returns:
        Path of the sheet, ``preview.png`` in that folder: the first pictures, up to
        3 x 4, enlarged, with visible masks outlined and named.

    Raises:
        FileNotFoundError: If the folder holds no detection set.
    """
    from matplotlib.figure import Figure

    out = Path(out)
    truth_path = out / 'annotations' / 'instances_val.json'
    if not truth_path.is_file():
        raise FileNotFoundError(f'no detection set in {out}: {truth_path} is missing')
    truth = json.loads(truth_path.read_text(encoding='utf-8'))
    images = truth['images'][:12]
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    # Lengths in picture heights; a picture is drawn about 400 pixels high.
    gap, dpi = 0.02, 100
    width, height = columns * (1 + gap) + gap, rows * (1 + gap) + gap
    size = images[0]['height']
    inch = size * max(1, round(384 / size)) / dpi
    figure = Figure((width * inch, height * inch), dpi=dpi, facecolor='#16181d')
    for position, entry in enumerate(images):
        row, column = divmod(position, columns)
        left, bottom = gap + column * (1 + gap), height - (row + 1) * (1 + gap)
        axes = figure.add_axes((left / width, bottom / height, 1 / width, 1 / height))
        axes.set_axis_off()
        image = cv2.imread(str(out / 'val' / entry['file_name']))
        axes.imshow(image[..., ::-1], interpolation='nearest')
        items = [t for t in truth['annotations'] if t['image_id'] == entry['id']]
        _outline(axes, items, size)
    path = out / 'preview.png'
    figure.savefig(path)
    return path


def _outline(axes: 'Axes', items: list[dict], size: int) -> None:
    """Draw the outlines and names of COCO entries over a picture."""
    inks = ('#ffd400', '#00e5ff', '#ff5ad1', '#7dff5a')
    label_width, label_height = 0.25 * size, 0.05 * size
    labels: list[tuple[float, float]] = []
    for item in items:
        ink = inks[item['category_id'] - 1]
        # Eight times as large, so that the outlines follow the pixels' edges.
        mask = np.kron(
            coco_mask.decode(item['segmentation']), np.ones((8, 8), np.uint8)
        )
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        for contour in contours:
            closed = np.concatenate([contour, contour[:1]])[:, 0] / 8 - 0.44
            axes.plot(*closed.T, color='black', linewidth=3)
            axes.plot(*closed.T, color=ink, linewidth=1.5)
        x, y, w, h = item['bbox']
        x = float(np.clip(x + w / 2, 0.55 * label_width, size - 0.55 * label_width))
        # Above, below or inside the object, where no other label is.
        places = [
            (x, float(np.clip(place, label_height, size - label_height)))
            for place in (y, y + h, y + h / 2, y + h / 4, y + 3 * h / 4)
        ]
        free = [
            place
            for place in places
            if all(
                abs(place[0] - other[0]) > label_width
                or abs(place[1] - other[1]) > label_height
                for other in labels
            )
        ]
        labels.append((free or places)[0])
        axes.text(
            *labels[-1],
            DETECTION_CLASSES[item['category_id'] - 1],
            color=ink,
            fontsize=9,
            fontweight='bold',
            ha='center',
            va='center',
            bbox={'facecolor': 'black', 'alpha': 0.75, 'pad': 1.5, 'lw': 0},
        )
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


# --- The whole set --------------------------------------------------------------


@dataclass(frozen=True)
class SceneSettings:
    """What a whole set holds.

    Attributes:
        train: Detection pictures for training, at least 1.
        val: Detection pictures for validation, at least 1.
        cls_train: Classification pictures of each class for training.
        cls_val: Classification pictures of each class for validation.
        size: Height and width of a detection picture in pixels, at least 64.
        cls_size: The same of a classification picture. At half of ``size`` its one
            object is about as large as those of the scenes.
        seed: Zero or more.
    """

    train: int = 1000
    val: int = 100
    cls_train: int = 800
    cls_val: int = 50
    size: int = 128
    cls_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {'train': 1, 'val': 1, 'size': 64, 'cls_size': 64}
        for what, value in asdict(self).items():
            _check_int(what, value, least.get(what, 0))


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place if nothing fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid4().hex[:8]
    fresh = out.with_name(f'.{out.name}.{tag}.new')
    stale = out.with_name(f'.{out.name}.{tag}.old')
    fresh.mkdir()
    try:
        yield fresh
        if out.exists():
            os.replace(out, stale)
        os.replace(fresh, out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        if stale.exists() and not out.exists():
            os.replace(stale, out)
        raise
    shutil.rmtree(stale, ignore_errors=True)


def _read_manifest(out: Path) -> dict | None:
    """The manifest of a folder this module made, or ``None`` if it made none."""
    try:
        manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get('generator') == __name__
    return manifest if is_ours else None


def make_scenes(
    out: str | Path,
    settings: SceneSettings,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> dict | None:
    """Write detection, classification, preview and manifest as one folder.

    The folder appears only when it is complete. Its ``manifest.json`` holds the
    settings and the number of objects annotated.

    Args:
        out: Folder to make.
        settings: What it shall hold.
        overwrite: Whether to replace a set made with other settings, the folder and
            all in it. A folder that this function did not make is never replaced.
        progress: Whether to show progress bars.

    Returns:
        The manifest, or ``None`` if the folder holds this very set already.

    Raises:
        FileExistsError: If ``out`` holds something else.
    """
    out = Path(out).resolve()
    wanted = {
        'generator': __name__,
        'version': GENERATOR_VERSION,
        'settings': asdict(settings),
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = _read_manifest(out)
        if found is None:
            raise FileExistsError(
                f'{out} exists and is no data set of this generator; choose another '
                f'folder'
            )
        if all(found.get(key) == value for key, value in wanted.items()):
            return None
        if not overwrite:
            made = {'version': found['version'], **found['settings']}
            asked = {'version': GENERATOR_VERSION, **wanted['settings']}
            changes = [
                f'{key} {made.get(key)}, not {value}'
                for key, value in asked.items()
                if made.get(key) != value
            ]
            raise FileExistsError(
                f'{out} holds a set made with other settings ({"; ".join(changes)}); '
                f'choose another folder or allow overwriting'
            )
    shared = {'seed': settings.seed, 'progress': progress}
    with _replacing(out) as fresh:
        objects = write_detection(
            fresh,
            num_train=settings.train,
            num_val=settings.val,
            size=settings.size,
            **shared,
        )
        write_classification(
            fresh,
            num_train=settings.cls_train,
            num_val=settings.cls_val,
            size=settings.cls_size,
            **shared,
        )
        preview(fresh)
        manifest = {**wanted, 'objects': objects}
        _write_json(fresh / 'manifest.json', manifest)
    return manifest

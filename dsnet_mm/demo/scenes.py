"""Draws scenes: a few objects on a textured background.

The class of an object is its texture together with its shape ('striped disc', 'dotted
star'). The texture has a period of a few pixels. The shape shows only over the whole
object. A network has to use both. ``tools/make_scenes.py`` writes a data set of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

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


def distinct_colour(rng: Generator, objects: list[SceneObject]) -> RGB:
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


def claim(owner: np.ndarray, obj: SceneObject, index: int) -> int:
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
    image = _blend(distinct_colour(rng, objects), share)
    owner = np.full((size, size), -1, np.int16)
    for index, obj in enumerate(objects):
        claim(owner, obj, index)
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


def draw_class(name: str, rng: Generator, size: int = 64) -> np.ndarray:
    """Draws one object of a class, of random colour, at a random place.

    Args:
        name: Texture and shape, such as 'striped disc'.
        rng: Random generator.
        size: Height and width of the image in pixels.

    Returns:
        The image, RGB uint8 of shape (size, size, 3).
    """
    colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
    radius = float(size * rng.uniform(0.22, 0.42))
    x, y = rng.uniform(radius, size - 1 - radius, 2).tolist()
    angle, period = float(rng.uniform(-30, 30)), float(rng.uniform(4, 6))
    obj = SceneObject(name, colour, (x, y), radius, angle, period)
    return draw_scene([obj], size, rng)[0]

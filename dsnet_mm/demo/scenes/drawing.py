"""Draws a scene: objects on a random textured background."""

from collections.abc import Callable

import cv2
import numpy as np

from .checks import check_int
from .vocabulary import RGB, SHAPES, TEXTURES, SceneObject


def _second_tone(rgb: np.ndarray) -> np.ndarray:
    """Returns darker forms of light colours, lighter forms of dark ones, (..., 3)."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.where(luminance[..., None] > 118, 0.2 * rgb, rgb + 0.8 * (255 - rgb))


def distinct_colour(rng: np.random.Generator, taken: list[RGB]) -> RGB:
    """Returns the one of 16 random colours whose tones are farthest from ``taken``."""
    candidates = rng.integers(0, 256, (16, 3)).astype(np.float32)
    best = 0
    if taken:
        # Distance from each taken colour to the line between a candidate's two tones.
        line = _second_tone(candidates) - candidates
        offset = np.array(taken, np.float32)[None] - candidates[:, None]
        along = (offset * line[:, None]).sum(2) / (line**2).sum(1)[:, None]
        offset -= np.clip(along, 0, 1)[..., None] * line[:, None]
        best = np.linalg.norm(offset, axis=2).min(axis=1).argmax()
    return tuple(int(tone) for tone in candidates[best])


def _smooth_noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Returns noise of shape (size, size) that varies over about ``cell`` pixels."""
    count = int(np.ceil(size / cell)) + 1
    grid = rng.standard_normal((count, count), np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns the position along a random direction, in pixels, (size, size)."""
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
"""Pattern of each background. It maps a generator and the size to (size, size)."""


def _draw_background(
    rng: np.random.Generator, size: int, taken: list[RGB]
) -> np.ndarray:
    """Returns a two-tone background, uint8 of shape (size, size, 3)."""
    kind = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    pattern = BACKGROUNDS[kind](rng, size)
    pattern = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    share = np.clip(0.5 + 0.3 * pattern, 0, 1).astype(np.float32)
    return _blend(distinct_colour(rng, taken), share)


def _blend(rgb: RGB, share: np.ndarray) -> np.ndarray:
    """Mixes a colour with a share of its second tone, uint8 of shape (..., 3)."""
    first = np.array(rgb, np.float32)
    mixed = first + share[..., None] * (_second_tone(first) - first)
    return np.rint(mixed).astype(np.uint8)


def _silhouette(obj: SceneObject) -> tuple[int, int, np.ndarray]:
    """Returns left and top of a window around an object, and its mask in the window."""
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


def claim(owner: np.ndarray, obj: SceneObject, index: int) -> int:
    """Writes ``index`` to an object's pixels of ``owner`` and returns its full area."""
    left, top, mask = _silhouette(obj)
    y0, y1 = np.clip([top, top + len(mask)], 0, len(owner))
    x0, x1 = np.clip([left, left + len(mask)], 0, len(owner))
    shown = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    owner[y0:y1, x0:x1][shown] = index
    return int(mask.sum())


def draw_scene(
    objects: list[SceneObject], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws objects on a random textured background.

    Only the background is random. Its colour is far from those of the objects.

    Args:
        objects: From back to front. A later object covers the earlier ones.
        size: Height and width of the picture in pixels, at least 64.
        rng: Random generator of the background.

    Returns:
        The picture, RGB uint8 of shape (size, size, 3), and the visible part of
        each object, bool of shape (len(objects), size, size). The masks are exact
        and do not overlap.

    Raises:
        TypeError: If ``size`` is not an integer.
        ValueError: If ``size`` is below 64.
    """
    check_int('size', size, 64)
    image = _draw_background(rng, size, [obj.rgb for obj in objects])
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
        share = TEXTURES[obj.texture](cos * x + sin * y, cos * y - sin * x, obj.period)
        image[mask] = _blend(obj.rgb, share)
    return image, masks

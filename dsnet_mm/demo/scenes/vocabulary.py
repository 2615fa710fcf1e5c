"""What scenes are made of: shapes, textures, colours, classes and objects."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .checks import check_choice

RGB = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def _regular(corners: int, inner: float | None = None) -> np.ndarray:
    """Returns the corners of a regular polygon, or of a star with that inner radius."""
    steps = corners if inner is None else 2 * corners
    radius = np.ones(steps)
    if inner is not None:
        radius[1::2] = inner
    turn = 2 * np.pi * np.arange(steps) / steps
    return np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1)


def _cross(arm: float) -> np.ndarray:
    """Returns the corners of a plus sign whose arms are ``2 * arm`` wide."""
    end = np.sqrt(1 - arm**2)
    quarter = np.array([[arm, -arm], [arm, -end], [-arm, -end]])
    quarters = [quarter]
    for _ in range(3):
        x, y = quarters[-1].T
        quarters.append(np.stack([y, -x], axis=1))
    return np.concatenate(quarters)


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
    'star': [_regular(5, inner=0.45)],
    'ring': [_regular(64), 0.5 * _regular(64)],
    'cross': [_cross(0.32)],
    'heart': [_heart()],
    'diamond': [np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]])],
}
"""Outlines of each shape in the unit circle: (corners, 2), x right and y down."""


def _band(u: np.ndarray, period: float, width: float) -> np.ndarray:
    """Returns the coverage, 0 to 1, of one soft-edged band in each period of ``u``."""
    distance = np.abs(u / period - np.round(u / period)) * period
    return np.clip(0.5 + width / 2 - distance, 0, 1)


def _plain(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return np.zeros_like(u)


def _striped(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    return _band(v, period, 0.45 * period)


def _dotted(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    # Every other row is shifted: each dot has six neighbours at the same distance.
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
"""Pattern of each texture. It maps object coordinates and the period, in pixels, to
the share of the second tone, 0 to 1."""

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
"""Red, green and blue of each colour, 0 to 255."""

DETECTION_CLASSES = ('striped disc', 'dotted disc', 'striped star', 'dotted star')
"""Class names, in the order of the COCO category ids 1 to 4."""


# Pixels; fine, yet three periods across the smallest object. The two textures of the
# classes differ in scale too: with equal periods, a small network needed several times
@dataclass(frozen=True)
class SceneObject:
    """One object: its look and its place.

    Attributes:
        shape: A key of ``SHAPES``.
        texture: A key of ``TEXTURES``.
        colour: A key of ``COLOURS``, or red, green and blue from 0 to 255. The second
            tone of the texture is a darker or lighter form of it.
        centre: x and y in pixels. Whole numbers are pixel centres.
        radius: Radius in pixels of the circle around the shape, at least 1.
        angle: Clockwise rotation of shape and texture in degrees.
        period: Period of the texture in pixels, at least 2.

    Raises:
        ValueError: If a value is not one of these.
    """

    shape: str
    texture: str
    colour: str | RGB
    centre: tuple[float, float]
    radius: float
    angle: float = 0.0
    period: float = 5.0

    def __post_init__(self) -> None:
        check_choice('shape', self.shape, SHAPES)
        check_choice('texture', self.texture, TEXTURES)
        if isinstance(self.colour, str):
            check_choice('colour', self.colour, COLOURS)
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

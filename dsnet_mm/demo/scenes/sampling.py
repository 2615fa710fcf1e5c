"""Chooses the objects of a scene at random."""

import numpy as np

from .checks import check_choice, check_int
from .drawing import claim, distinct_colour
from .vocabulary import DETECTION_CLASSES, RGB, SceneObject

MIN_VISIBLE = 0.45
"""Least visible part of an object, as a fraction of its full area."""

# Range of each texture's period in pixels. The smallest object has three periods.
# Dots are coarser than stripes: with equal periods, a small network needed several
# times as many pictures to tell them apart.
_PERIODS = {'striped': (3.2, 4.0), 'dotted': (5.0, 6.0), 'plain': (5.0, 6.0)}

_DISTRACTORS = (
    'plain disc',
    'plain star',
    'striped square',
    'dotted square',
    'striped triangle',
    'dotted triangle',
)


def _random_object(
    rng: np.random.Generator,
    name: str,
    rgb: RGB,
    radius: float,
    span: tuple[float, float],
) -> SceneObject:
    """Returns an object of random angle and period, with its centre in ``span``."""
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
    """Chooses the objects of a detection picture.

    There are one to five objects of ``DETECTION_CLASSES`` and up to two distractors.
    A distractor's texture and shape together are no class. At least ``MIN_VISIBLE``
    of each object's area is visible. An object that would hide too much is moved,
    and left out after 20 tries.

    Args:
        rng: Random generator.
        size: Height and width of the picture in pixels, at least 64.

    Returns:
        The objects, from back to front.

    Raises:
        TypeError: If ``size`` is not an integer.
        ValueError: If ``size`` is below 64.
    """
    check_int('size', size, 64)
    classes = rng.choice(DETECTION_CLASSES, rng.integers(1, 6)).tolist()
    rest = classes[1:] + rng.choice(_DISTRACTORS, rng.integers(0, 3)).tolist()
    rng.shuffle(rest)
    least, most = np.log(max(9, 0.07 * size)), np.log(0.31 * size)
    objects: list[SceneObject] = []
    full_areas: list[int] = []
    owner = np.full((size, size), -1, np.int16)
    # The first object always finds a place: every picture has an object of a class.
    for name in [classes[0], *rest]:
        rgb = distinct_colour(rng, [obj.rgb for obj in objects])
        radius = float(np.exp(rng.uniform(least, most)))
        span = (radius / 2, size - 1 - radius / 2)
        for _ in range(20):
            obj = _random_object(rng, name, rgb, radius, span)
            claimed = owner.copy()
            area = claim(claimed, obj, len(objects))
            areas = [*full_areas, area]
            visible = np.bincount(claimed.ravel() + 1, minlength=len(areas) + 1)[1:]
            if (visible >= MIN_VISIBLE * np.array(areas)).all():
                objects.append(obj)
                full_areas = areas
                owner = claimed
                break
    return objects


def sample_portrait(rng: np.random.Generator, size: int, name: str) -> SceneObject:
    """Chooses the one object of a classification picture.

    Args:
        rng: Random generator.
        size: Height and width of the picture in pixels, at least 64.
        name: One of ``DETECTION_CLASSES``.

    Returns:
        An object inside the picture. Its diameter is 44 to 84 % of ``size``.

    Raises:
        TypeError: If ``size`` is not an integer.
        ValueError: If ``size`` is below 64 or ``name`` is not a class.
    """
    check_int('size', size, 64)
    check_choice('name', name, DETECTION_CLASSES)
    radius = float(size * rng.uniform(0.22, 0.42))
    span = (radius, size - 1 - radius)
    return _random_object(rng, name, distinct_colour(rng, []), radius, span)

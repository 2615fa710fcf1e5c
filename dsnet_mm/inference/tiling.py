"""Tiles of a large image, and one object from its parts in several tiles.

Neighbouring tiles overlap. Two tiles have found the same object if they agree on its
class, and on its place in their common part of the image. This also holds for an object
that is longer than the overlap: each tile sees a part of it, and the parts agree where
both tiles look.

Whole objects agree by their intersection over union (IoU). An edge of a tile can cut an
object, and what is left of it may be a narrow strip. A whole and a cut object agree by
the intersection over the area of the cut one. A small whole object inside a large cut
one therefore stays. Two cut objects agree by the intersection over the smaller area
(IoS), as in SAHI (arXiv 2202.06934).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .prediction import DetectedObject, Mask

AGREE = 0.5  # least agreement of one object in two tiles
EDGE = 4  # pixels between the box of a cut object and the edge that cuts it


class Tile(NamedTuple):
    """A part of an image, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def make_tiles(height: int, width: int, size: int, overlap: int) -> list[Tile]:
    """Covers an image with tiles.

    Args:
        height: Height of the image in pixels.
        width: Its width.
        size: Side of a tile. A smaller image has one tile.
        overlap: Overlap of neighbours. The last tile of a row or column ends at the
            edge of the image and overlaps more.

    Returns:
        The tiles, row by row.
    """

    def starts(length: int) -> list[int]:
        last = max(length - size, 0)
        return [*range(0, last, size - overlap), last]

    return [
        Tile(left, top, min(left + size, width), min(top + size, height))
        for top in starts(height)
        for left in starts(width)
    ]


def merge_tiles(
    found: Sequence[Sequence[DetectedObject]],
    tiles: Sequence[Tile],
    height: int,
    width: int,
) -> list[DetectedObject]:
    """Makes one object of those that tiles have found several times.

    The objects are visited from the highest score to the lowest, first those that no
    edge cuts. An object takes in all objects of its class in other tiles that agree
    with it. An object that is not cut keeps its box and mask. A cut one is united with
    the best object of each tile, step by step from tile to tile.

    Args:
        found: The objects of each tile, in coordinates of the image.
        tiles: The tiles.
        height: Height of the image in pixels.
        width: Its width.

    Returns:
        The objects, the highest scores first.
    """
    objects = [obj for objects in found for obj in objects]
    if not objects:
        return []
    at = np.repeat(np.arange(len(tiles)), [len(objects) for objects in found])
    edges = np.array(tiles)
    tile = edges[at]
    box = np.stack([obj.box for obj in objects])
    label = np.array([obj.label for obj in objects])
    score = np.array([obj.score for obj in objects])
    # An edge of a tile cuts, an edge of the image does not.
    inner = (tile > 0) & (tile < np.array([width, height, width, height]))
    cut = (inner & (abs(box - tile) < EDGE)).any(1)

    order = np.lexsort((-score, cut))
    # The objects of the tiles that overlap each tile, the best ones first.
    near = []
    for t, this in enumerate(edges):
        common = _common(this, edges)
        neighbours = (common[:, 2:] > common[:, :2]).all(1)
        neighbours[t] = False
        near.append(order[neighbours[at[order]]])

    def partners(i: int) -> list[int]:
        """Objects of other tiles that agree with object i, the best first."""
        others = near[at[i]]
        others = others[free[others] & (label[others] == label[i])]
        common = _common(tile[i], tile[others])
        both = _common(common, _common(box[i], box[others]))
        touching = (both[:, 2:] > both[:, :2]).all(1)
        return [
            j
            for j, window in zip(others[touching], common[touching], strict=True)
            if _agreement(objects[i], objects[j], window, cut[i], cut[j]) >= AGREE
        ]

    free = np.ones(len(objects), bool)
    merged = []
    for first in order:
        if not free[first]:
            continue
        free[first] = False
        parts, seen, waiting = [first], {at[first]}, [first]
        while waiting:
            for j in partners(waiting.pop(0)):
                free[j] = False
                if cut[first] and at[j] not in seen:
                    seen.add(at[j])
                    parts.append(j)
                    waiting.append(j)
        merged.append(_unite([objects[i] for i in parts]))
    return sorted(merged, key=lambda obj: -obj.score)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the common parts of boxes, shapes (..., 4)."""
    return np.concatenate(
        [np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], -1
    )


def _area(box: np.ndarray) -> float:
    """Returns the area of a box, 0 if it is empty."""
    return np.maximum(box[2:] - box[:2], 0).prod()


def _agreement(
    a: DetectedObject, b: DetectedObject, common: np.ndarray, cut_a: bool, cut_b: bool
) -> float:
    """Returns the agreement of two objects in the common part of their tiles.

    Args:
        a: One object.
        b: The other.
        common: Left, top, right, bottom of the common part, shape (4,).
        cut_a: Whether an edge cuts the one.
        cut_b: Whether an edge cuts the other.

    Returns:
        Of the masks, or of the boxes if there are none: the intersection over the area
        of the cut one, over the smaller area if both are cut, else over the union.
    """
    if a.mask and b.mask:
        window = _common(common, _hull(np.array([a.mask.box, b.mask.box])))
        pixels = [x.mask.crop(*window.astype(int).tolist()) for x in (a, b)]
        areas = [p.sum() for p in pixels]
        both = (pixels[0] & pixels[1]).sum()
    else:
        boxes = [_common(common, x.box) for x in (a, b)]
        areas = [_area(x) for x in boxes]
        both = _area(_common(*boxes))
    cuts = [area for area, cut in zip(areas, (cut_a, cut_b), strict=True) if cut]
    over = min(cuts, default=sum(areas) - both)
    return both / over if over else 0.0


def _unite(parts: list[DetectedObject]) -> DetectedObject:
    """Returns the union of parts, with class and score of the best one."""
    if len(parts) == 1:
        return parts[0]
    best = max(parts, key=lambda part: part.score)
    box = _hull(np.stack([part.box for part in parts]))
    mask = None
    if all(part.mask for part in parts):
        window = _hull(np.array([part.mask.box for part in parts])).tolist()
        pixels = np.logical_or.reduce([part.mask.crop(*window) for part in parts])
        mask = Mask(pixels, window[0], window[1])
    return DetectedObject(best.label, best.score, box, mask)


def _hull(boxes: np.ndarray) -> np.ndarray:
    """Returns the smallest box around boxes of shape (n, 4)."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])

"""What was found in an image, and how it is written in COCO's result format."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

# Classes of a classifier in its written result.
TOP = 5


class Mask:
    """A mask, stored as the part of the image that holds it, a bit for each pixel.

    An image of 20,000 x 20,000 pixels has 400 MB for each whole mask.

    Args:
        pixels: Boolean array of shape (h, w).
        left: Column of the image where the part begins.
        top: Row of the image where it begins.
    """

    def __init__(self, pixels: np.ndarray, left: int, top: int) -> None:
        self.left, self.top, self.shape = left, top, pixels.shape
        self._bits = np.packbits(pixels)

    @property
    def pixels(self) -> np.ndarray:
        """The part of the image, a new boolean array of shape (h, w)."""
        count = self.shape[0] * self.shape[1]
        bits = np.unpackbits(self._bits, count=count)
        return bits.reshape(self.shape).view(bool)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part, right and bottom exclusive."""
        height, width = self.shape
        return self.left, self.top, self.left + width, self.top + height

    def crop(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Returns the mask inside a box, of shape (bottom - top, right - left)."""
        out = np.zeros((max(bottom - top, 0), max(right - left, 0)), bool)
        x0, y0, x1, y1 = self.box
        x0, y0, x1, y1 = max(x0, left), max(y0, top), min(x1, right), min(y1, bottom)
        if x0 < x1 and y0 < y1:
            out[y0 - top : y1 - top, x0 - left : x1 - left] = self.pixels[
                y0 - self.top : y1 - self.top, x0 - self.left : x1 - self.left
            ]
        return out

    def to_rle(self, height: int, width: int) -> dict[str, Any]:
        """Returns COCO's compressed run-length encoding in the whole image.

        It is computed from the part alone.

        Args:
            height: Height of the image.
            width: Its width.
        """
        # The runs of each column of the part. COCO counts pixels column by column.
        rows, columns = self.shape
        padded = np.zeros((columns, rows + 2), np.int8)
        padded[:, 1:-1] = self.pixels.T
        steps = np.diff(padded, axis=1)
        starts, ends = (
            (column + self.left) * height + row + self.top
            for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1))
        )
        # A run to the end of a column goes on at the beginning of the next one.
        apart = starts[1:] != ends[:-1]
        starts = np.concatenate([starts[:1], starts[1:][apart]])
        ends = np.concatenate([ends[:-1][apart], ends[-1:]])
        edges = np.stack([starts, ends], axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=height * width).tolist()
        if counts[-1] == 0 and len(counts) > 1:
            counts.pop()
        rle = coco_mask.frPyObjects(
            dict(size=[height, width], counts=counts), height, width
        )
        return dict(size=[height, width], counts=rle['counts'].decode())


@dataclass
class DetectedObject:
    """An object of a detector.

    Args:
        label: Number of its class.
        score: From 0 to 1.
        box: Left, top, right, bottom in pixels of the image, shape (4,).
        mask: None if the detector has no masks.
    """

    label: int
    score: float
    box: np.ndarray
    mask: Mask | None = None


@dataclass
class Prediction:
    """What was found in an image.

    Args:
        image: Path of the image, or its position if it was given as an array.
        height: Height of the image in pixels.
        width: Its width.
        class_names: Names of all classes, empty if the checkpoint does not have them.
        objects: Objects of a detector, the highest scores first.
        scores: Scores of all classes of a classifier, shape (num_classes,). None for a
            detector.
    """

    image: str
    height: int
    width: int
    class_names: list[str]
    objects: list[DetectedObject] = field(default_factory=list)
    scores: np.ndarray | None = None

    @property
    def picture(self) -> str:
        """The old name of ``image``."""
        warnings.warn(
            'Prediction.picture is called image now.', FutureWarning, stacklevel=2
        )
        return self.image

    @property
    def label(self) -> str:
        """Name of the class with the highest score; of a classifier only."""
        return self.name(self.scores.argmax())

    def name(self, label: int) -> str:
        """Returns the name of a class, its number if it has none."""
        return self.class_names[label] if self.class_names else str(label)

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Returns the entries of COCO's result format.

        ``category_id`` is the number of the class plus 1. A classifier has entries
        without ``bbox``, for its five best classes.

        Args:
            image_id: Number of the image.
        """
        if self.scores is not None:
            return [
                dict(
                    image_id=image_id,
                    category_id=int(label) + 1,
                    score=round(float(self.scores[label]), 5),
                )
                for label in np.argsort(-self.scores, kind='stable')[:TOP]
            ]
        entries = []
        for found in self.objects:
            left, top, right, bottom = found.box.tolist()
            bbox = [round(x, 2) for x in (left, top, right - left, bottom - top)]
            entry = dict(
                image_id=image_id,
                category_id=found.label + 1,
                bbox=bbox,
                score=round(found.score, 5),
            )
            if found.mask:
                entry['segmentation'] = found.mask.to_rle(self.height, self.width)
            entries.append(entry)
        return entries

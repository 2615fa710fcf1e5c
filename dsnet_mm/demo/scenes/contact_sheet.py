"""Draws a contact sheet of a detection set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from .vocabulary import DETECTION_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def preview(out: str | Path) -> Path:
    """Draws a contact sheet of the first validation pictures and their annotations.

    It shows up to twelve pictures, enlarged. Masks are outlined and named.

    Args:
        out: Folder that ``write_detection`` wrote.

    Returns:
        Path of the sheet, ``preview.png`` in that folder.

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
    # Lengths are in picture heights. A picture is drawn about 400 pixels high.
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
    """Draws the outlines and names of COCO annotations over a picture."""
    inks = ('#ffd400', '#00e5ff', '#ff5ad1', '#7dff5a')
    label_width, label_height = 0.25 * size, 0.05 * size
    labels: list[tuple[float, float]] = []
    for item in items:
        ink = inks[item['category_id'] - 1]
        # Outlines of an eight times larger mask follow the edges of the pixels.
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
        # The label stands above, below or inside the object, clear of other labels.
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

"""Draws predictions into images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib import colormaps
from mmengine.visualization import Visualizer

from .prediction import DetectedObject, Prediction

FONT = 10  # points; a pixel is 0.72 of them
CROWD = 30  # objects; with more, labels wider than their boxes are left out
# Longest side of a drawn image in pixels.
LEAST, MOST = 400, 2048


def draw(
    image: np.ndarray, prediction: Prediction, palette: Sequence | str | None = None
) -> np.ndarray:
    """Draws a prediction.

    Args:
        image: The image, BGR, shape (H, W, 3).
        prediction: What was found in it.
        palette: Colours of the classes, see :func:`class_colors`.

    Returns:
        BGR image whose longest side has 400 to 2048 pixels.
    """
    side = int(np.clip(max(image.shape[:2]), LEAST, MOST))
    factor = side / max(image.shape[:2])
    # A large image is reduced before anything makes a copy of it, and then freed.
    image = np.clip(scale(image, side), 0, 255).astype(np.uint8)
    rgb = np.ascontiguousarray(image[..., ::-1])
    with warnings.catch_warnings():
        # Of MMEngine, for boxes and labels at the edge of an image.
        warnings.filterwarnings('ignore', message='.*out of bounds')
        if prediction.scores is None:
            drawn = draw_objects(
                rgb, prediction.objects, prediction.class_names, palette, factor
            )
        else:
            drawn = _draw_class(rgb, prediction)
    return np.ascontiguousarray(drawn[..., ::-1])


def class_colors(palette: Sequence | str | None, num_classes: int) -> np.ndarray:
    """Returns a colour for each class, shape (num_classes, 3), RGB from 0 to 255.

    Args:
        palette: Those of a data set. Matplotlib's ``tab10`` is taken, again and again,
            if there are none or those of other classes.
        num_classes: Number of classes.
    """
    if isinstance(palette, str) or palette is None or len(palette) != num_classes:
        palette = np.multiply(colormaps['tab10'].colors, 255)
    palette = np.uint8(palette)
    return palette[np.arange(num_classes) % len(palette)]


def scale(image: np.ndarray, side: int) -> np.ndarray:
    """Scales an image until its longest side has ``side`` pixels."""
    factor = side / max(image.shape[:2])
    height, width = (max(round(length * factor), 1) for length in image.shape[:2])
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def draw_objects(
    image: np.ndarray,
    objects: Sequence[DetectedObject],
    class_names: Sequence[str],
    palette: Sequence | str | None,
    factor: float = 1,
    scores: bool = True,
) -> np.ndarray:
    """Draws masks, boxes, class names and scores.

    The name of the class is left out if there is only one. In a crowd, names and scores
    that are wider than their boxes are left out.

    Args:
        image: RGB image of shape (H, W, 3), which is drawn on.
        objects: Objects in pixels of the original image.
        class_names: Names of all classes. Without them the numbers are written.
        palette: Colours of the classes, see :func:`class_colors`.
        factor: Pixels of the image in a pixel of the original image.
        scores: Whether to write the scores.

    Returns:
        The drawn RGB image.
    """
    height, width = image.shape[:2]
    num_classes = len(class_names) or 1 + max((x.label for x in objects), default=0)
    colors = class_colors(palette, num_classes)
    for found in objects:
        if found.mask and found.mask.pixels.size:
            _blend(image, found, factor, colors[found.label])
    visualizer = Visualizer()
    visualizer.set_image(image)
    if not objects:
        return visualizer.get_image()
    boxes = np.stack([found.box for found in objects]) * factor
    boxes = np.clip(boxes, 1, np.maximum(np.array([width, height] * 2) - 1, 1))
    box_colors = [tuple(map(int, colors[found.label])) for found in objects]
    line = 1 if len(objects) > CROWD else 3
    visualizer.draw_bboxes(boxes, edge_colors=box_colors, alpha=1, line_widths=line)
    for found, box, color in zip(objects, boxes.tolist(), box_colors, strict=True):
        left, top, right, _ = box
        name = class_names[found.label] if class_names else f'{found.label}'
        words = [name] * (num_classes > 1)
        words += [f'{found.score:.2f}'] * scores
        text = ' '.join(words)
        if not text or (len(objects) > CROWD and right - left < 0.6 * FONT * len(text)):
            continue
        # The label stands on the box, and inside the image.
        on_left = left + right < width
        visualizer.draw_texts(
            text,
            np.array([left + 1 if on_left else right - 2, top]),
            font_sizes=FONT,
            colors='w' if np.dot(color, (0.299, 0.587, 0.114)) < 140 else 'k',
            vertical_alignments='bottom' if top > 2.5 * FONT else 'top',
            horizontal_alignments='left' if on_left else 'right',
            bboxes=dict(facecolor=np.divide(color, 255), edgecolor='none', pad=1),
        )
    return visualizer.get_image()


def _blend(
    drawn: np.ndarray, found: DetectedObject, factor: float, color: np.ndarray
) -> None:
    """Colours a mask in a scaled image, in place."""
    box = np.multiply(found.mask.box, factor).round().astype(int)
    left, top, right, bottom = box.tolist()
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    mask = cv2.resize(
        found.mask.pixels.astype(np.float32),
        (right - left, bottom - top),
        interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR,
    )
    region = drawn[top:bottom, left:right]
    inside = mask[: region.shape[0], : region.shape[1]] >= 0.5
    region[inside] = (0.6 * region[inside] + 0.4 * color).astype(np.uint8)


def _draw_class(image: np.ndarray, prediction: Prediction) -> np.ndarray:
    """Writes the three best classes into the upper left corner."""
    visualizer = Visualizer()
    visualizer.set_image(image)
    best = np.argsort(-prediction.scores, kind='stable')[:3]
    visualizer.draw_texts(
        '\n'.join(f'{prediction.name(i)} {prediction.scores[i]:.2f}' for i in best),
        np.array([4, 4]),
        font_sizes=1.4 * FONT,
        colors='w',
        vertical_alignments='top',
        horizontal_alignments='left',
        bboxes=dict(facecolor='k', alpha=0.7, edgecolor='none', pad=3),
    )
    return visualizer.get_image()

"""What the page does: finds objects, learns classes. It does not need Gradio."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.clip.prompts import check_class_names, resolve_prompts
from dsnet_mm.datasets.features import FeatureCache
from dsnet_mm.few_shot import METHODS, FewShotConfig, load_classifier, save_classifier
from dsnet_mm.few_shot.calibration import calibrate
from dsnet_mm.few_shot.deployment import DeployedClassifier
from dsnet_mm.few_shot.methods import FewShotData
from dsnet_mm.few_shot.selection import select
from dsnet_mm.inference import DetectedObject, Prediction, Predictor
from dsnet_mm.inference.drawing import draw
from dsnet_mm.inference.streams import draw_streams, find_blocks

from .scenes import draw_class

MAX_BYTES = 20 * 2**20
"""Bytes of an uploaded file."""
MAX_TOTAL = 2**30
"""Bytes of all uploaded and written files, which are removed after an hour."""
MAX_PIXELS = 50_000_000
"""Pixels of an image that is opened."""
MAX_SIDE = 768
"""Longest side in pixels that the detector gets. Attention weights of a square image
of this size take about a gigabyte, if its configuration doubles it."""
MAX_CLASSES = 10
MAX_IMAGES = 64
"""Images of a class."""
MINIMUM_SCORE = 0.05
"""Objects of lower scores are not kept."""

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF')
"""Formats of Pillow that are opened. Others, such as EPS, start programs."""

DRAWN_CLASSES = ('striped heart', 'dotted diamond', 'gridded disc')
"""Drawn examples."""

DEMO_ENCODER = ('timm:tf_efficientnet_lite0', 'efficientnet-lite0')
"""Model and weights of the encoder that is installed with the extra ``demo``."""


def check_image(path: str | Path) -> None:
    """Checks the size of an image in its header, before its pixels are decoded.

    Raises:
        ValueError: If the file is no image, or has more than ``MAX_PIXELS`` pixels.
    """
    name, pixels = Path(path).name, math.inf
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's, of large images
            with Image.open(path, formats=FORMATS) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:
        pass
    except Exception:  # Pillow's decoders raise errors of any type
        raise ValueError(
            f'{name} cannot be read as an image; save it as JPEG or PNG.'
        ) from None
    if pixels > MAX_PIXELS:
        raise ValueError(
            f'{name} has more than {MAX_PIXELS:,} pixels, the most that this page '
            f'opens; make it smaller.'
        )


# ------------------------------------------------------------------- detection


@dataclass
class Found:
    """An image and what was found in it.

    Attributes:
        image: The image as the detector got it, BGR, (H, W, 3).
        reduced: Whether it was larger.
        prediction: Its objects with scores of at least ``MINIMUM_SCORE``, the highest
            first.
        seconds: Time of the detection.
        point: Place whose attention is drawn, as fractions of width and height. None is
            the middle of the object.
        rank: Object that is explained, from 0.
    """

    image: np.ndarray
    reduced: bool
    prediction: Prediction
    seconds: float
    point: tuple[float, float] | None = None
    rank: int = 0

    def above(self, score: float) -> list[DetectedObject]:
        """Returns the objects with at least this score."""
        return [found for found in self.prediction.objects if found.score >= score]


class Detector:
    """A detector of the page.

    Args:
        config: Configuration file, or name of one of this package.
        weights: Checkpoint file.
        device: See :class:`Predictor`.

    Attributes:
        blocks: Names of the blocks whose streams can be drawn.

    Raises:
        FileNotFoundError: If there is no such configuration or checkpoint.
        ValueError: If it is no detector, or the checkpoint does not fit.
    """

    def __init__(self, config: str, weights: str, device: str | None = None) -> None:
        self.predictor = Predictor(
            config, weights, device=device, score_thr=MINIMUM_SCORE
        )
        if not self.predictor.detects:
            raise ValueError(f'{config} is a classifier; this page takes a detector')
        self.name = f'{Path(config).stem}, weights {Path(weights).name}'
        self.blocks = list(find_blocks(self.predictor.model))

    def find(self, path: str | Path) -> Found:
        """Finds objects in an image.

        Raises:
            ValueError: If it cannot be read or is too large.
        """
        check_image(path)
        image = self.predictor.read(str(path))
        factor = MAX_SIDE / max(image.shape[:2])
        if factor < 1:
            size = [max(round(side * factor), 1) for side in image.shape[1::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        started = time.perf_counter()
        (prediction,) = self.predictor(image)
        return Found(image, factor < 1, prediction, time.perf_counter() - started)

    def draw(self, found: Found, score: float) -> np.ndarray:
        """Draws the objects with at least this score, RGB."""
        shown = Prediction(**{**vars(found.prediction), 'objects': found.above(score)})
        return draw(found.image, shown, self.predictor.palette)[..., ::-1]

    def rows(self, found: Found, score: float) -> list[list]:
        """Returns number, class, score, box and area of the mask of each object."""
        rows = []
        for number, x in enumerate(found.above(score), 1):
            left, top, right, bottom = x.box.tolist()
            box = [round(v) for v in (left, top, right - left, bottom - top)]
            area = int(x.mask.pixels.sum()) if x.mask else None
            name = found.prediction.name(x.label)
            rows.append([number, name, round(x.score, 3), *box, area])
        return rows

    def streams(self, found: Found, block: str) -> np.ndarray:
        """Draws the streams of a block for the chosen point and object, RGB."""
        rank = found.rank if found.prediction.objects else None
        figure = draw_streams(self.predictor, found.image, block, found.point, rank)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(150)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


# ------------------------------------------------------------------- few shots


def load_encoder(
    model: str, pretrained: str | None, download: bool = False, device: str = 'cpu'
) -> OpenCLIPEncoder:
    """Loads an encoder that has weights.

    Args:
        model: Model of open_clip, a JSON file, or ``timm:NAME``.
        pretrained: Tag or file of its weights.
        download: Whether files that are not here may be fetched.
        device: Its device.

    Raises:
        FileNotFoundError: If the weights are not here.
        ValueError: If no weights are named, or they do not fit.
    """
    if pretrained is None and not model.startswith(('hf-hub:', 'local-dir:')):
        raise ValueError(
            f'{model} has random weights unless --pretrained names a tag or a file; '
            f'a classifier on random features is of no use.'
        )
    return OpenCLIPEncoder.shared(model, pretrained, device=device, download=download)


def learn(
    encoder: OpenCLIPEncoder,
    classes: Sequence[tuple[str, Sequence[str | Path]]],
    out: Path,
) -> DeployedClassifier:
    """Fits CLIP-Adapter to a few images of each class.

    Views, prompt, method and its options are the defaults of
    ``tools/few_shot.py run``, without validation images.

    Args:
        encoder: The encoder.
        classes: Name and images of each class.
        out: Classifier file to write.

    Returns:
        The classifier in the file.

    Raises:
        ValueError: If there are too few or too many classes or images, names are
            empty or the same, an image cannot be read or is in two classes.
    """
    names = tuple(name for name, _ in classes)
    if not 2 <= len(names) <= MAX_CLASSES:
        raise ValueError(
            f'a classifier needs 2 to {MAX_CLASSES} classes, got {len(names)}.'
        )
    check_class_names(names)
    for name, images in classes:
        if not 1 <= len(images) <= MAX_IMAGES:
            raise ValueError(
                f'{name} has {len(images)} images; give 1 to {MAX_IMAGES}.'
            )
        for image in images:
            check_image(image)
    items = [
        (str(image), label, name)
        for label, (name, images) in enumerate(classes)
        for image in images
    ]
    defaults, seed = FewShotConfig, FewShotConfig.seeds[0]
    with TemporaryDirectory() as folder:
        cache = FeatureCache(
            folder,
            encoder,
            preprocessing=defaults.preprocessing,
            crop_scale=METHODS['clip_adapter'].crop_scale,
        )
        train = cache.images(items, defaults.views)
        _refuse_shared(items, cache.pixels(items, defaults.views))
        data = FewShotData(
            train,
            max(1, len(items) // len(names)),
            encoder.tokenizer and cache.texts(names, resolve_prompts('photo')),
            encoder.logit_scale,
            names,
            encoder,
            seed=seed,
            plain=cache.images(items),
        )
    method = METHODS['clip_adapter']
    fit = select(method, data, None, 'fixed')
    again = partial(method.fit, **fit.options)
    calibration = calibrate(again, data, None, fit.classifier)
    record = dict(
        method='clip_adapter',
        shots=data.shots,
        seed=seed,
        selection=fit.selection,
        options=fit.options,
        images=len(items),
    )
    save_classifier(
        *(out, fit.classifier, encoder, names, defaults.preprocessing, record),
        calibration,
    )
    return load_classifier(out, encoder)


def _refuse_shared(
    items: Sequence[tuple[str, int, str]], pixels: Mapping[str, str]
) -> None:
    """Refuses an image that is in two classes."""
    first: dict[str, str] = {}
    for path, _, name in items:
        other = first.setdefault(pixels[path], name)
        if other != name:
            raise ValueError(
                f'{Path(path).name} is an image of {other} and of {name}; remove it '
                f'from one of them.'
            )


def classify(classifier: DeployedClassifier, path: str | Path) -> dict[str, float]:
    """Returns the probability of each class for an image.

    Raises:
        ValueError: If it cannot be read or is too large.
    """
    check_image(path)
    (found,) = classifier(path).tolist()
    return dict(zip(classifier.class_names, found, strict=True))


def draw_examples(
    folder: Path, shots: int = 8, seed: int = 0
) -> tuple[list[tuple[str, list[str]]], str]:
    """Draws images of ``DRAWN_CLASSES``, and a further image of one of them.

    Args:
        folder: Folder to write into.
        shots: Images of each class.
        seed: Seed of the images.

    Returns:
        Name and files of each class, and the file of the further image.
    """
    rng = np.random.default_rng([seed, 5])

    def write(name: str, number: int) -> str:
        path = folder / f'{name.replace(" ", "_")}_{number}.png'
        Image.fromarray(draw_class(name, rng)).save(path)
        return str(path)

    classes = [(name, [write(name, i) for i in range(shots)]) for name in DRAWN_CLASSES]
    return classes, write(str(rng.choice(DRAWN_CLASSES)), shots)

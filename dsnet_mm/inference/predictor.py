"""Runs a detector of mmdet or a classifier of mmpretrain on images."""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image as PIL

from dsnet_mm.checkpoint import load_checkpoint
from dsnet_mm.datasets.images import find_images
from dsnet_mm.engine.config import load_config
from dsnet_mm.environment import existing_device, require
from dsnet_mm.models import AdaptedDetector, fuse_for_inference

from .prediction import DetectedObject, Mask, Prediction
from .tiling import Tile, make_tiles, merge_tiles

# An image or tile with a longer side is reduced to this before the test pipeline,
# whose masks would be as large as the image.
MAX_SIDE = 4096
# A longer image is padded. Resized to the scale of a test pipeline it would have no
# rows left.
MAX_RATIO = 32

# Pixels of an image that is read without a copy.
LARGE = 2**25
# Bytes at the end of a JPEG that hold its end mark, and metadata after it.
END_OF_JPEG = 2**16

Image = str | Path | np.ndarray


def infer(
    config: str | Path,
    weights: str | Path,
    images: Image | Sequence[Image],
    **options: Any,
) -> list[Prediction]:
    """Finds objects in images, or classifies them.

    Example:
        >>> import dsnet_mm
        >>> for prediction in dsnet_mm.infer('mine.py', 'last.pth', 'photos'):
        ...     for found in prediction.objects:
        ...         print(prediction.class_names[found.label], found.score, found.box)

    Args:
        config: Configuration file, or name of one of this package.
        weights: Checkpoint file.
        images: Image file, folder of images, BGR array of shape (H, W, 3), or a
            sequence of these. A warning names a file that cannot be read.
        **options: Those of :class:`Predictor`.

    Returns:
        A prediction for each image that can be read, in order.

    Raises:
        FileNotFoundError: If there is no such configuration, checkpoint or image.
        ValueError: If an option is out of range, or the checkpoint does not fit.
    """
    predictor = Predictor(config, weights, **options)
    return list(predictor(images))


class View(NamedTuple):
    """A part of an image as the network gets it."""

    image: np.ndarray
    tile: Tile
    # Pixels of the image in a pixel of the image, in width and height.
    scale: tuple[float, float]


class Predictor:
    """A detector or a classifier with its weights.

    Images are prepared by the test pipeline of the configuration.

    - A side of more than 4096 pixels is reduced to that before the test pipeline,
      unless the image is cut into tiles.
    - An image whose sides have a ratio of more than 32 is padded with black.

    Args:
        config: Configuration file, or name of one of this package.
        weights: Checkpoint file. It is loaded by a restricted unpickler.
        device: Device of the network. ``'auto'`` or None takes a GPU if there is one.
        batch_size: Number of images, or of tiles of an image, in a forward.
        score_thr: Minimum score of an object.
        fuse: Whether to replace blocks by their inference form (fuse_for_inference).
        tile: Side in pixels of the tiles of which an image is made, None for the whole
            image at once. The test pipeline resizes a tile as it resizes an image.
            It is best about as large as the images of the training.
        overlap: Overlap of tiles in pixels, larger than a common object. See
            :func:`.tiling.merge_tiles`.
        cfg_options: Values of the configuration to set, by dotted name.
        adapters: Files of adapters of the detector, see
            :meth:`dsnet_mm.models.AdaptedDetector.from_files`. ``'auto'`` before them
            chooses one, or the detector alone, by the colours of each image.

    Attributes:
        model: The network, in evaluation mode.
        detects: Whether it is a detector.
        class_names: Names of the classes.
        palette: Colours of the classes, None if the checkpoint has none.
        unreadable: Images that could not be read, in order.

    Raises:
        FileNotFoundError: If there is no such configuration or checkpoint.
        ValueError: If an option is out of range, there is no such device, or the
            checkpoint does not fit.
    """

    def __init__(
        self,
        config: str | Path,
        weights: str | Path,
        *,
        device: str | None = None,
        batch_size: int = 1,
        score_thr: float = 0.3,
        fuse: bool = False,
        tile: int | None = None,
        overlap: int = 128,
        cfg_options: dict[str, Any] | None = None,
        adapters: Sequence[str | Path] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'the batch size is at least 1, got {batch_size}')
        if not 0 <= score_thr <= 1:
            raise ValueError(f'the minimum score is from 0 to 1, got {score_thr}')
        if tile is not None and not 0 <= overlap < tile:
            raise ValueError(
                f'the overlap of tiles is at least 0 and less than their side, got '
                f'{overlap} and {tile}'
            )
        device = existing_device(device or 'auto')
        cfg = load_config(str(config), cfg_options or {})
        self.detects = cfg.default_scope == 'mmdet'
        if tile and not self.detects:
            raise ValueError(f'{config} is a classifier; tiles are for detectors')
        require(cfg.default_scope, user='dsnet_mm.inference')
        self.batch_size, self.score_thr = batch_size, score_thr
        self.tile, self.overlap = tile, overlap
        self.unreadable: list[str] = []

        init_default_scope(cfg.default_scope)
        if cfg.get('data_preprocessor'):
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        self._load, self._transform = _split_pipeline(cfg)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        checkpoint = load_checkpoint(model, str(weights))
        meta = checkpoint['meta'].get('dataset_meta') or self._metainfo(cfg)
        self.class_names = [str(name) for name in meta.get('classes') or []]
        counts = (getattr(part, 'num_classes', None) for part in model.modules())
        count = max((n for n in counts if isinstance(n, int)), default=0)
        if self.class_names and len(self.class_names) < count:
            raise ValueError(
                f'{weights} has names of {len(self.class_names)} classes, and the '
                f'model of {config} has {count} classes; use the configuration it was '
                f'trained with'
            )
        self.palette = meta.get('palette')
        if adapters:
            auto = str(adapters[0]) == 'auto'
            files = adapters[auto:]
            model = AdaptedDetector.from_files(model, files, auto, self.class_names)
        if isinstance(model, AdaptedDetector) and not model.auto:
            model = model.merge()
        model = model.to(device).eval()
        self.model = fuse_for_inference(model) if fuse else model

    def __call__(
        self,
        images: Image | Sequence[Image],
        track: Callable[[Iterable], Iterable] = iter,
    ) -> Iterator[Prediction]:
        """Yields a prediction for each image that can be read, in order.

        A warning names a file that cannot be read. It is added to ``unreadable``.

        Args:
            images: Image file, folder, BGR array, or a sequence of these.
            track: Wraps the forwards of a batch of images, or of a tiled image, to
                show a bar.

        Raises:
            FileNotFoundError: If there is no such file, or no image in a folder.
        """
        readable = self._read(list_images(images))
        group = 1 if self.tile else self.batch_size
        while batch := list(islice(readable, group)):
            tiles = [self._tiles(*image.shape[:2]) for _, image in batch]
            parts = [
                (image, tile)
                for (_, image), own in zip(batch, tiles, strict=True)
                for tile in own
            ]
            found = iter(self._forward(parts, track))
            for (name, image), own in zip(batch, tiles, strict=True):
                yield self._prediction(
                    name, image.shape[:2], own, list(islice(found, len(own)))
                )

    def read(self, path: str) -> np.ndarray:
        """Reads an image as the test pipeline does.

        Raises:
            ValueError: If it cannot be read. The message says why.
        """
        try:
            image = read_large(path, self._load)
            return self._load(dict(img_path=path))['img'] if image is None else image
        except (AssertionError, TypeError):  # of mmcv, without pixels
            why = 'it is damaged, or no image'
        except OSError as error:
            why = str(error)
        except Exception as error:  # decoders raise errors of any type
            why = str(error) if os.path.getsize(path) else 'it has no bytes'
        raise ValueError(f'{Path(path).name} cannot be read as an image: {why}')

    def prepare(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Makes a batch of images as the test pipeline does.

        Args:
            images: BGR arrays of shape (H, W, 3).

        Returns:
            What the data preprocessor of the model takes.
        """
        sizes = [dict(img_shape=x.shape[:2], ori_shape=x.shape[:2]) for x in images]
        return pseudo_collate(
            [
                self._transform(dict(img=image, img_path=None, img_id=0, **size))
                for image, size in zip(images, sizes, strict=True)
            ]
        )

    def _read(self, images: list[Image]) -> Iterator[tuple[str, np.ndarray]]:
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray):
                yield str(i), image
                continue
            try:
                pixels = self.read(str(image))
            except ValueError as error:
                self.unreadable.append(str(image))
                warnings.warn(f'{image} is skipped: {error}', stacklevel=3)
                continue
            yield str(image), pixels

    def _tiles(self, height: int, width: int) -> list[Tile]:
        if self.tile:
            return make_tiles(height, width, self.tile, self.overlap)
        return [Tile(0, 0, width, height)]

    @torch.inference_mode()
    def _forward(
        self, parts: list[tuple[np.ndarray, Tile]], track: Callable
    ) -> list[Any]:
        """Returns what is found in each part of images: objects, or scores of classes.

        Views and masks of their size are dropped after each forward.
        """
        # A test pipeline of mmpretrain may leave the sizes as they are.
        same = self.detects or len({image.shape for image, _ in parts}) == 1
        size = self.batch_size if same else 1
        chunks = [parts[i : i + size] for i in range(0, len(parts), size)]
        found = []
        for i, chunk in enumerate(track(chunks)):
            views = [make_view(*part) for part in chunk]
            samples = self.model.test_step(self.prepare([v.image for v in views]))
            if self.detects:
                found += map(self._objects, views, samples)
            else:
                found += [sample.pred_score.float().cpu().numpy() for sample in samples]
            if self.tile and i % 4 == 3:
                trim_memory()
        return found

    def _prediction(
        self, name: str, shape: tuple[int, int], tiles: list[Tile], found: list[Any]
    ) -> Prediction:
        """Returns the prediction of an image from what was found in its tiles."""
        prediction = Prediction(name, *shape, self.class_names)
        if self.detects:
            prediction.objects = merge_tiles(found, tiles, *shape)
        else:
            (prediction.scores,) = found
        return prediction

    def _objects(self, view: View, sample: Any) -> list[DetectedObject]:
        """Returns the objects of a view, in coordinates of the image."""
        instances = sample.pred_instances
        kept = torch.nonzero(instances.scores >= self.score_thr).flatten()
        labels, scores = instances.labels.tolist(), instances.scores.tolist()
        left, top, right, bottom = view.tile
        boxes = instances.bboxes[kept].cpu().numpy()
        boxes = boxes * (view.scale * 2) + (left, top, left, top)
        boxes[:, 0::2] = boxes[:, 0::2].clip(left, right)
        boxes[:, 1::2] = boxes[:, 1::2].clip(top, bottom)
        objects = []
        for i, box in zip(kept.tolist(), boxes, strict=True):
            # What lies in the padding alone has no area left.
            if (box[2:] > box[:2]).all():
                found = DetectedObject(labels[i], scores[i], box)
                if 'masks' in instances:
                    # One by one: each has the size of the view.
                    mask = instances.masks[i].cpu().numpy()
                    found.mask = mask_in_image(mask, view)
                objects.append(found)
        return objects

    @staticmethod
    def _metainfo(cfg: Any) -> dict:
        """Returns what the test data set says of its classes, without its files."""
        dataset = deepcopy(cfg.test_dataloader.dataset)
        dataset.lazy_init = True
        return DATASETS.build(dataset).metainfo


def _split_pipeline(cfg: Any) -> tuple[LoadImageFromFile, Compose]:
    """Returns the loading of the test pipeline, and the steps after it."""
    load, steps = LoadImageFromFile(), []
    for step in cfg.test_dataloader.dataset.pipeline:
        if str(step['type']).endswith('LoadImageFromFile'):
            load = LoadImageFromFile(**{k: v for k, v in step.items() if k != 'type'})
        else:
            steps.append(step)
    return load, Compose(steps)


def trim_memory() -> None:
    """Gives freed memory back to the system.

    The allocator of Linux keeps it where small masks lie between large arrays.
    """
    with suppress(AttributeError, OSError, TypeError):  # of other systems
        ctypes.CDLL(None).malloc_trim(0)


def read_large(path: str, load: LoadImageFromFile) -> np.ndarray | None:
    """Reads a large image as BGR without a second copy of its pixels.

    OpenCV copies what it has decoded, unless it is given an array to write into.

    Args:
        path: File of the image.
        load: The loading of the test pipeline.

    Returns:
        The image, or None if ``load`` must read it, which also tells what is wrong.
    """
    usual = load.color_type, load.imdecode_backend, load.to_float32
    remote = load.file_client_args or load.backend_args
    if usual != ('color', 'cv2', False) or remote:
        return None
    try:
        with suppress(PIL.DecompressionBombError), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of images that are big
            with PIL.open(path) as image:  # reads the header only
                if image.width * image.height < LARGE:
                    return None
        with open(path, 'rb') as file:
            is_jpeg = file.read(2) == b'\xff\xd8'
            file.seek(-min(os.path.getsize(path), END_OF_JPEG), os.SEEK_END)
            # From a file, OpenCV fills a JPEG that is cut off with grey.
            if is_jpeg and b'\xff\xd9' not in file.read():
                return None
        return cv2.imread(path, dst=None, flags=cv2.IMREAD_COLOR)
    except Exception:  # of any type, also of an OpenCV without dst
        return None


def list_images(images: Image | Sequence[Image]) -> list[Image]:
    """Replaces folders by the images in them, also in folders below, sorted.

    Hidden files are left out.

    Raises:
        FileNotFoundError: If there is no such file, or no image in a folder.
        ValueError: If an array has another shape.
    """
    if isinstance(images, str | Path | np.ndarray):
        images = [images]
    listed: list[Image] = []
    for image in images:
        if not isinstance(image, np.ndarray):
            listed += find_images([image])[0]
            continue
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f'an array must be a BGR image of shape (H, W, 3), got {image.shape}'
            )
        listed.append(image)
    return listed


def make_view(image: np.ndarray, tile: Tile) -> View:
    """Cuts a tile out of an image, and reduces or pads it where necessary.

    Args:
        image: Image of shape (H, W, 3).
        tile: The tile.
    """
    left, top, right, bottom = tile
    part = image[top:bottom, left:right]
    size = right - left, bottom - top
    if max(size) > MAX_SIDE:
        new = [max(round(side * MAX_SIDE / max(size)), 1) for side in size]
        part = cv2.resize(part, new, interpolation=cv2.INTER_AREA)
    height, width = part.shape[:2]
    least = math.ceil(max(height, width) / MAX_RATIO)
    if min(height, width) < least:
        part = cv2.copyMakeBorder(
            part,
            0,
            max(least - height, 0),
            0,
            max(least - width, 0),
            cv2.BORDER_CONSTANT,
        )
    return View(part, tile, (size[0] / width, size[1] / height))


def mask_in_image(mask: np.ndarray, view: View) -> Mask:
    """Returns the part of a mask that holds it, in coordinates of the image.

    Args:
        mask: Boolean mask of a view, shape (h, w).
        view: The view.
    """
    left, top, right, bottom = view.tile
    # Without the padding.
    mask = mask[
        : round((bottom - top) / view.scale[1]), : round((right - left) / view.scale[0])
    ]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return Mask(np.zeros((0, 0), bool), left, top)
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    pixels = mask[y0:y1, x0:x1]
    if view.scale != (1, 1):
        x0, x1 = (round(x * view.scale[0]) for x in (x0, x1))
        y0, y1 = (round(y * view.scale[1]) for y in (y0, y1))
        pixels = cv2.resize(
            pixels.astype(np.uint8), (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST
        ).astype(bool)
    return Mask(pixels, left + int(x0), top + int(y0))

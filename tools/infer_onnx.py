"""Find objects in images, or classify them, without PyTorch.

python tools/infer_onnx.py MODEL.onnx IMAGE_OR_FOLDER --out OUT

MODEL.onnx is written by tools/export.py or by tools/few_shot.py export. This file needs
numpy, onnxruntime and Pillow alone, so it can be copied to another machine. It writes
what tools/infer.py writes into the new folder OUT: predictions.json in COCO's result
format, images.json with the images, classes and failures, and the drawn images. The
exit status is 1 if an image could not be read.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont, ImageOps

KEY = 'dsnet_mm'  # of the metadata
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.pgm', '.ppm', '.tif', '.tiff')
# As tools/infer.py: a larger image is reduced, and a longer one padded with black.
MAX_SIDE, MAX_RATIO = 4096, 32
TOP = 5  # classes of an image in predictions.json
LEAST, MOST = 400, 2048  # longest side of a drawn image
CROWD = 30  # objects; with more, labels wider than their boxes are left out
COLORS = ('#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2')
Image.MAX_IMAGE_PIXELS = 2**30  # as OpenCV


class Model:
    """An ONNX file with the description of its classes and images.

    Args:
        path: The file.
        threads: Threads of onnxruntime, 0 for one for each core.

    Raises:
        ValueError: If it is no such file.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=['CPUExecutionProvider']
            )
            metadata = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # of onnxruntime, of many types
            raise ValueError(f'{path} is no ONNX file that runs: {error}') from None
        if KEY not in metadata:
            raise ValueError(
                f'{path} does not say how its images are prepared; export it with this '
                f'version of tools/export.py, or of tools/few_shot.py export'
            )
        self.about = json.loads(metadata[KEY])
        kinds = {step['kind'] for step in self.about['steps']}
        if unknown := kinds - {'factor', 'fit', 'stretch', 'edge', 'crop'}:
            raise ValueError(
                f'{path} takes images after the step {", ".join(unknown)} of a test '
                f'pipeline, which this tool does not have; it resizes and crops'
            )
        self.detects = self.about['kind'] == 'detector'

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model.

        Args:
            image: RGB image of shape (H, W, 3).

        Returns:
            The probabilities of all classes as ``scores`` (K,). Of a detector
            ``boxes`` (N, 4) in pixels of the image, ``scores`` (N,), ``labels`` (N,),
            and ``masks`` (N, h, w) if it has them.
        """
        view, scale = make_view(image)
        pixels = view
        for step in self.about['steps']:
            pixels = prepare(pixels, **step)
        scale *= np.divide(pixels.shape[1::-1], view.shape[1::-1])
        if self.about['channels'] == 'BGR':
            pixels = pixels[..., ::-1]
        mean, std = (np.float32(self.about[key]) for key in ('mean', 'std'))
        array = np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])
        names = [x.name for x in self.session.get_outputs()]
        outs = self.session.run(None, {self.session.get_inputs()[0].name: array})
        found = dict(zip(names, outs, strict=True))
        if self.detects:
            return found | dict(boxes=found['boxes'] / np.tile(scale, 2))
        scores = outs[0][0]
        if 'scores' in names:  # before the softmax
            scores = np.exp(scores - scores.max())
        return dict(scores=scores / scores.sum())

    def name(self, label: int) -> str:
        """Returns the name of a class, its number if it has none."""
        return self.about['classes'][label] if self.about['classes'] else str(label)


# ------------------------------------------------------------------------ images


def list_images(path: Path) -> list[Path]:
    """Returns an image, or those in and below a folder, sorted, without hidden ones."""
    if not path.exists():
        raise ValueError(f'there is no image or folder {path}')
    if not path.is_dir():
        return [path]
    found = [
        x
        for x in path.rglob('*')
        if x.suffix.lower() in SUFFIXES and x.name[0] != '.' and x.is_file()
    ]
    if not found:
        raise ValueError(f'{path} has no image; names end with {" ".join(SUFFIXES)}')
    return sorted(found)


def read(path: Path) -> np.ndarray:
    """Reads an image as RGB, shape (H, W, 3), the way up that EXIF says, in 8 bits."""
    with Image.open(path) as image:
        is_16_bit = image.mode == 'I' and image.format in ('PNG', 'PPM')
        with suppress(Exception):  # a damaged EXIF entry is not a damaged image
            image = ImageOps.exif_transpose(image)
        if is_16_bit or image.mode.startswith('I;16'):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ('I', 'F'):
            raise ValueError('its pixels have 32 bits; convert it to 8 bits')
        return np.asarray(image.convert('RGB'))


def make_view(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduces or pads an image. Returns it, and the factors of width and height."""
    sides = np.array(image.shape[1::-1])
    new = np.maximum(np.round(sides * min(MAX_SIDE / sides.max(), 1)), 1).astype(int)
    if (new != sides).any():
        image = np.asarray(Image.fromarray(image).resize(new.tolist(), Image.BOX))
    width, height = np.maximum(math.ceil(new.max() / MAX_RATIO) - new, 0)
    return np.pad(image, ((0, height), (0, width), (0, 0))), new / sides


def prepare(
    image: np.ndarray, kind: str, size: list[float], filter: str = ''
) -> np.ndarray:
    """Resizes or crops an image as a step of the metadata says."""
    height, width = image.shape[:2]
    a, b = size
    if kind == 'crop':
        left, top = max(round((width - a) / 2), 0), max(round((height - b) / 2), 0)
        return image[top : top + b, left : left + a]
    if kind == 'edge':  # the short one
        new = (a, a * height / width) if width < height else (a * width / height, a)
    elif kind == 'stretch':
        new = a, b
    elif kind == 'fit':
        long, short = max(width, height), min(width, height)
        factor = min(max(size) / long, min(size) / short)
        new = width * factor + 0.5, height * factor + 0.5
    else:  # factors
        new = width * a + 0.5, height * b + 0.5
    width, height = (max(int(side), 1) for side in new)
    if filter == 'opencv':
        return _linear(image, width, height)
    how = Image.Resampling[filter.upper()]
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _linear(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes as OpenCV: linear between centres, with weights of 1 / 2048."""
    columns, rows = _neighbours(image.shape[1], width), _neighbours(len(image), height)
    lines = sum(image[:, at] * weight[:, None] for at, weight in columns) >> 4
    sums = sum(lines[at] * weight[:, None, None] >> 16 for at, weight in rows)
    return ((sums + 2) >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns indices and weights of the two pixels on either side of a new one."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    low = at.astype(int)
    part = np.rint((at - low) * 2048).astype(np.int32)
    return [(low, 2048 - part), (np.minimum(low + 1, old - 1), part)]


# ----------------------------------------------------------------------- results


def find(model: Model, image: np.ndarray, score_thr: float) -> list[dict[str, Any]]:
    """Returns the entries of an image in COCO's result format, without its number.

    Those of a detector have the part of the image with the mask as ``part``.
    """
    found, entries = model(image), []
    if not model.detects:
        scores = found['scores']
        return [
            dict(category_id=int(i) + 1, score=round(float(scores[i]), 5))
            for i in np.argsort(-scores, kind='stable')[:TOP]
        ]
    height, width = image.shape[:2]
    for i in np.flatnonzero(found['scores'] >= score_thr):
        box = found['boxes'][i]
        left, top, right, bottom = box.clip(0, [width, height] * 2).tolist()
        if left >= right or top >= bottom:  # in the padding
            continue
        entry = dict(
            category_id=int(found['labels'][i]) + 1,
            bbox=[round(x, 2) for x in (left, top, right - left, bottom - top)],
            score=round(float(found['scores'][i]), 5),
        )
        if 'masks' in found:
            threshold = model.about['mask_thr']
            part = paste(found['masks'][i], box, height, width, threshold)
            entry |= dict(segmentation=to_rle(*part, height, width), part=part)
        entries.append(entry)
    return entries


def paste(
    mask: np.ndarray, box: np.ndarray, height: int, width: int, threshold: float
) -> tuple[np.ndarray, int, int]:
    """Returns the pixels of a mask, and the column and row where they begin.

    Args:
        mask: Probabilities (h, w) on a grid over the box, bilinear between the centres
            of its cells, and with 0 around it.
        box: Left, top, right and bottom in pixels.
        height: Height of the image.
        width: Its width.
        threshold: Least probability.
    """
    weights, begins = [], []
    for axis, limit in ((1, height), (0, width)):
        begin = max(math.floor(box[axis]) - 1, 0)
        end = min(math.ceil(box[axis + 2]) + 1, limit)
        cells = mask.shape[1 - axis]
        at = np.arange(begin, end, dtype=np.float32)[:, None] + 0.5 - box[axis]
        at = at / (box[axis + 2] - box[axis]) * cells - 0.5
        weights.append(np.maximum(1 - abs(at - np.arange(cells)), 0))
        begins.append(begin)
    return weights[0] @ mask @ weights[1].T >= threshold, begins[1], begins[0]


def to_rle(
    pixels: np.ndarray, left: int, top: int, height: int, width: int
) -> dict[str, Any]:
    """Returns COCO's compressed run-length encoding of a part of an image.

    Runs go down the columns, that of zeros first. From the fourth on it is the
    difference from the last but one run that is written, in groups of five bits, the
    lowest first, with a sixth bit if more follow.
    """
    columns = np.zeros((pixels.shape[1], height), bool)
    columns[:, top : top + len(pixels)] = pixels.T
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False))
    runs = np.diff(edges + left * height, prepend=0, append=height * width).tolist()
    if len(runs) > 1 and not runs[-1]:
        runs.pop()
    text = ''
    for i, value in enumerate(runs):
        value, more = value - (runs[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return dict(size=[height, width], counts=text)


def draw(model: Model, image: np.ndarray, entries: list[dict[str, Any]]) -> Image.Image:
    """Draws masks, boxes, names and scores, or the three best classes."""
    longest = max(image.shape[:2])
    factor = min(max(longest, LEAST), MOST) / longest
    size = [max(round(side * factor), 1) for side in image.shape[1::-1]]
    drawn = Image.fromarray(image).resize(size, Image.BOX if factor < 1 else None)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(14)
    labels = []
    for entry in entries:
        label, score = entry['category_id'] - 1, f'{entry["score"]:.2f}'
        named = len(model.about['classes']) != 1
        labels.append(f'{model.name(label)} {score}' if named else score)
        if 'bbox' not in entry:
            continue
        color = COLORS[label % len(COLORS)]
        if 'part' in entry and entry['part'][0].size:
            pixels, *corner = entry['part']
            mask = Image.fromarray(np.uint8(pixels) * 100)
            mask = mask.resize([max(round(x * factor), 1) for x in mask.size])
            drawn.paste(color, [round(x * factor) for x in corner], mask)
        left, top, width, height = (x * factor for x in entry['bbox'])
        box = left, top, left + width, top + height
        pen.rectangle(box, outline=color, width=1 if len(entries) > CROWD else 3)
        if len(entries) <= CROWD or width > pen.textlength(labels[-1], font):
            at = left, max(top - 16, 0)
            pen.rectangle(pen.textbbox(at, labels[-1], font), fill=color)
            pen.text(at, labels[-1], 'white', font)
    if not model.detects:
        best = '\n'.join(labels[:3])
        pen.rectangle(pen.textbbox((4, 4), best, font), 'black')
        pen.text((4, 4), best, 'white', font)
    return drawn


def write(path: Path, content: str) -> None:
    """Writes a file as a whole or not at all."""
    part = path.with_name(f'.{path.name}.part')
    part.write_text(content)
    os.replace(part, path)


def run(args: argparse.Namespace) -> bool:
    """Runs a model on images, and writes the results. Returns whether all were read."""
    out, root = args.out, args.image if args.image.is_dir() else args.image.parent
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f'{out} exists and is left alone; choose another folder')
    if not 0 <= args.score_thr <= 1:
        raise ValueError(f'--score-thr is from 0 to 1, got {args.score_thr}')
    if args.threads < 0:
        raise ValueError(f'--threads is 0 or more, got {args.threads}')
    paths = {str(x.relative_to(root)): x for x in list_images(args.image)}
    model = Model(args.model, args.threads)
    out.mkdir(parents=True, exist_ok=True)
    images, results, failed, counts = [], [], [], Counter()
    for name, path in paths.items():
        try:
            image = read(path)
            entries = find(model, image, args.score_thr)
        except Exception as error:  # of any type: of decoders, or memory that is short
            failed.append(dict(file_name=name, error=str(error)))
            print(f'{path} was skipped: {error}')
            continue
        if not args.no_images:
            drawn = name
            if path.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
                drawn = f'{name}.drawn.jpg' if f'{name}.jpg' in paths else f'{name}.jpg'
            (out / 'images' / drawn).parent.mkdir(parents=True, exist_ok=True)
            draw(model, image, entries).save(out / 'images' / drawn)
        height, width = image.shape[:2]
        number = len(images) + 1
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for rank, entry in enumerate(entries):
            counts[entry['category_id'] - 1] += rank == 0 or model.detects
            entry.pop('part', None)
            results.append(entry | dict(image_id=number))
    last = max((x['category_id'] for x in results), default=0)
    classes = model.about['classes'] or map(str, range(last))
    categories = [dict(id=i, name=x) for i, x in enumerate(classes, 1)]
    content = dict(images=images, annotations=[], categories=categories, failed=failed)
    write(out / 'predictions.json', json.dumps(results))
    write(out / 'images.json', json.dumps(content))
    print(f'{"objects" if model.detects else "images":>8}  class')
    for label, count in counts.most_common():
        if count:
            print(f'{count:8}  {model.name(label)}')
    print(f'{len(images)} of {len(paths)} images were read. Results are in {out}.')
    return not failed


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', type=Path, help='ONNX file')
    parser.add_argument('image', type=Path, help='image, or folder of images')
    parser.add_argument('--out', type=Path, required=True, help='new folder of results')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='minimum score of an object'
    )
    parser.add_argument(
        '--threads', type=int, default=0, help='threads (default: one for each core)'
    )
    parser.add_argument(
        '--no-images', action='store_true', help='do not draw the images'
    )
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors='backslashreplace')  # names that are not UTF-8
    try:
        done = run(args)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        parser.error(str(error) or 'stopped')
    if not done:
        sys.exit(1)


if __name__ == '__main__':
    main()

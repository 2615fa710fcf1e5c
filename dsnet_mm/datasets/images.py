"""Images: finding them, reading them, and preparing them for the image tower."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dsnet_mm.clip import OpenCLIPEncoder

IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.webp'),
    *('.pgm', '.ppm', '.tif', '.tiff'),
)
"""Ends of the names of files that are read as images."""

PREPROCESSINGS = ('clip', 'warp')
"""Ways to resize an image. ``'clip'``: that of the model in open_clip's configuration.
For the models of CLIP's paper it is the shorter side, then the centre crop, as in CoOp
since October 2021. ``'warp'``: to a square (CoOp before that, and the main table of
CLIP-Adapter)."""


def is_image(path: Path) -> bool:
    """Tells whether a file is read as an image, by its suffix. Hidden files are not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


def find_images(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Lists images, and those in and below folders, sorted.

    Args:
        paths: Files, of any suffix, and folders.

    Returns:
        The images, and a sentence for each folder with files that are no images.

    Raises:
        FileNotFoundError: If a file or folder is missing, or there is no image.
    """
    paths, found, notes = [*map(Path, paths)], [], []
    for path in paths:
        if os.path.isdir(path):
            found += sorted(p for p in path.rglob('*') if is_image(p) and p.is_file())
            if others := count_other_files(path):
                notes.append(f'not read in {path}: {others}.')
        elif os.path.exists(path):
            found.append(path)
        else:
            raise FileNotFoundError(f'there is no image or folder {path}.')
    if not found:
        sentence = (
            f'no image in {", ".join(map(str, paths))}; their names end with '
            f'one of {" ".join(IMAGE_SUFFIXES)}.'
        )
        raise FileNotFoundError(' '.join([sentence, *notes]))
    return found, notes


def count_other_files(folder: Path) -> str:
    """Counts the files in and below a folder that are not read, by suffix.

    Args:
        folder: Folder of images.

    Returns:
        A text such as ``'12 .heic, 1 .txt'``, empty if all files are images. Hidden
        files do not count.
    """
    suffixes = Counter(
        path.suffix.lower() or 'without suffix'
        for path in folder.rglob('*')
        if not (is_image(path) or path.name.startswith('.')) and path.is_file()
    )
    ordered = sorted(suffixes.items(), key=lambda pair: (-pair[1], pair[0]))
    return ', '.join(f'{count} {suffix}' for suffix, count in ordered)


def damage_of(path: str | Path, decode: bool = True) -> tuple[str, str] | None:
    """Tells what is wrong with the file of an image.

    Args:
        path: File of the image.
        decode: Whether to read its pixels. Otherwise the file is not opened.

    Returns:
        What is wrong and the reader's error, or None if the file is sound. Wrong is
        ``'missing'``, ``'empty'``, ``'unreadable'`` (forbidden, or of no known format),
        ``'too large'`` (more pixels than Pillow reads) or ``'cut off'`` (the format is
        known, and the pixels cannot be read).
    """
    try:
        if not os.path.isfile(path):
            return 'missing', 'there is no such file'
        if not os.path.getsize(path):
            return 'empty', 'the file has no bytes'
        if decode:
            with Image.open(path) as image:
                image.load()
    except (UnidentifiedImageError, PermissionError) as error:
        return 'unreadable', str(error)
    except Image.DecompressionBombError as error:
        return 'too large', str(error)
    except Exception as error:  # Pillow's decoders raise errors of any type
        return 'cut off', str(error)
    return None


def open_image(path: str | Path) -> Image.Image:
    """Opens an image as RGB, the way up that its EXIF entry says.

    Grey values of 16 bits are scaled to 8 bits.

    Args:
        path: File of the image.

    Returns:
        The image.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f'the image {path} is missing.')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of metadata, and of images that are big
            with Image.open(path) as image:
                return upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise errors of any type
        raise ValueError(f'the image {path} cannot be read ({error})') from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turns an image the way up that its EXIF entry says, and converts it to RGB.

    Raises:
        ValueError: If its grey values have an unknown range.
    """
    kind = image.format
    with suppress(Exception):  # a damaged EXIF entry is not a damaged image
        image = ImageOps.exif_transpose(image)
    if image.mode in ('I', 'F') and not (image.mode == 'I' and kind in ('PNG', 'PPM')):
        raise ValueError(
            f'its pixels are 32-bit numbers (mode {image.mode}) of unknown range; '
            f'convert it to 8 bits'
        )
    if image.mode.startswith('I'):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert('RGB')


def hash_pixels(image: Image.Image) -> bytes:
    """Returns a hash of size and pixels of an RGB image, 16 bytes."""
    sha = hashlib.sha256(f'{image.size}'.encode())
    sha.update(image.tobytes())
    return sha.digest()[:16]


def build_transform(
    encoder: OpenCLIPEncoder,
    preprocessing: str,
    crop_scale: tuple[float, float] | None = None,
) -> Callable[[Image.Image], Tensor]:
    """Builds the transform from an image to an input of the encoder, (3, H, W).

    Args:
        encoder: Encoder whose size, interpolation, mean and standard deviation are
            used.
        preprocessing: One of ``PREPROCESSINGS``.
        crop_scale: Least and most area of a random crop, as a fraction of the
            image. If given, ``preprocessing`` is replaced by a random crop and flip.

    Returns:
        The transform.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision import transforms as T

    config = PreprocessCfg(**encoder.preprocess)
    if crop_scale is None:
        if preprocessing == 'warp':
            config = replace(config, resize_mode='squash')
        return image_transform_v2(config, is_train=False)
    crop = T.RandomResizedCrop(
        config.size, crop_scale, interpolation=T.InterpolationMode(config.interpolation)
    )
    normalise = T.Normalize(config.mean, config.std)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])

"""Reading images and preparing them for the image tower."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from dsnet_mm.clip import OpenCLIPEncoder

PREPROCESSINGS = ('clip', 'warp')
"""Ways to resize an image. ``'clip'``: that of the model in open_clip's configuration.
For the models of CLIP's paper it is the shorter side, then the centre crop, as in CoOp
since October 2021. ``'warp'``: to a square (CoOp before that, and the main table of
CLIP-Adapter)."""


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
    if not Path(path).exists():
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

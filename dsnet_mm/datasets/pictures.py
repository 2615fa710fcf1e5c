"""Reading pictures and preparing them for the image tower."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from dsnet_mm.models.backbones import OpenCLIPEncoder

PREPROCESSINGS = ('clip', 'warp')
"""Ways to resize a picture, both bicubic. ``'clip'``: shorter side, then centre crop
(CLIP, and CoOp since October 2021). ``'warp'``: to a square (CoOp before that, and the
main table of CLIP-Adapter)."""


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture as RGB.

    Args:
        path: File of the picture.

    Returns:
        The picture.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'the picture {path} is missing.') from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'the picture {path} cannot be read ({error})') from error


def build_transform(
    encoder: OpenCLIPEncoder,
    preprocessing: str,
    crop_scale: tuple[float, float] | None = None,
) -> Callable[[Image.Image], Tensor]:
    """Build the transform from a picture to an input of the encoder, (3, H, W).

    Args:
        encoder: Encoder whose size, mean and standard deviation are used.
        preprocessing: One of ``PREPROCESSINGS``.
        crop_scale: Least and most area of a random crop, as a fraction of the
            picture. If given, ``preprocessing`` is replaced by a random crop and flip.

    Returns:
        The transform.
    """
    from torchvision import transforms as T

    size, bicubic = encoder.image_size, T.InterpolationMode.BICUBIC
    if crop_scale is not None:
        steps = [
            T.RandomResizedCrop(size, crop_scale, interpolation=bicubic),
            T.RandomHorizontalFlip(),
        ]
    elif preprocessing == 'warp':
        steps = [T.Resize((size, size), bicubic)]
    else:
        steps = [T.Resize(size, bicubic), T.CenterCrop(size)]
    normalise = T.Normalize(encoder.mean, encoder.std)
    return T.Compose([*steps, T.ToTensor(), normalise])

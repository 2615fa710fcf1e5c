"""Convert the nuclei of the 2018 Data Science Bowl to the layout of COCO.

python tools/dataset_converters/nuclei_to_coco.py stage1_train data/nuclei

The source is BBBC038 of the Broad Bioimage Benchmark Collection (CC0). It has one
folder for each image, with ID/images/ID.png and one file for each nucleus in
ID/masks. Large images are left out. The split depends on the image's name only.
"""

import argparse
import json
import shutil
from contextlib import suppress
from hashlib import sha1
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from rich.progress import track

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import replacing

SPLITS = {'train': range(62), 'val': range(62, 81), 'test': range(81, 100)}
"""Remainders of the SHA-1 of an image's name, divided by 100."""


def split_of(name: str) -> str:
    """Returns the split of an image.

    Args:
        name: The image's name, without its suffix.

    Returns:
        ``'train'``, ``'val'`` or ``'test'``.
    """
    remainder = int(sha1(name.encode()).hexdigest(), 16) % 100
    return next(split for split, part in SPLITS.items() if remainder in part)


def read(path: Path, mode: int) -> np.ndarray:
    """Reads an image.

    Raises:
        ValueError: If it cannot be decoded.
    """
    image = None
    with suppress(cv2.error):  # of too many pixels
        image = cv2.imread(str(path), mode)
    if image is None:
        raise ValueError(f'{path} cannot be read as an image; unpack the set again')
    return image


def find_images(source: Path) -> list[tuple[Path, list[Path]]]:
    """Finds the images of the set and the masks of each.

    Args:
        source: Folder with one folder for each image.

    Returns:
        Images and the files of their masks, sorted by name.

    Raises:
        FileNotFoundError: If the folder, or an image or its masks, are missing.
    """
    if not source.is_dir():
        raise FileNotFoundError(
            f'there is no folder {source}; unpack stage1_train.zip of BBBC038 into it '
            f'(Broad Bioimage Benchmark Collection, accession number BBBC038)'
        )
    found = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        images = sorted((folder / 'images').glob('*.png'))
        masks = sorted((folder / 'masks').glob('*.png'))
        if len(images) != 1 or not masks:
            raise FileNotFoundError(
                f'{folder} holds {len(images)} images in images/ and {len(masks)} '
                f'masks in masks/; one image and at least one mask are expected'
            )
        found.append((images[0], masks))
    if not found:
        raise FileNotFoundError(
            f'{source} holds no folders ID/images and ID/masks; give the folder into '
            f'which stage1_train.zip was unpacked'
        )
    return found


def read_mask(path: Path, shape: tuple[int, int]) -> dict | None:
    """Reads the mask of a nucleus.

    Args:
        path: Image in which the nucleus is not black.
        shape: Height and width of the image.

    Returns:
        Box, area and run-length code, or None if the mask is empty.

    Raises:
        ValueError: If the mask has another size than its image.
    """
    mask = read(path, cv2.IMREAD_GRAYSCALE)
    if mask.shape != shape:
        raise ValueError(f'{path} has the shape {mask.shape}, its image has {shape}')
    if not mask.any():
        return None
    code = coco_mask.encode(np.asfortranarray(mask > 0, np.uint8))
    area, box = coco_mask.area(code), coco_mask.toBbox(code)
    code['counts'] = code['counts'].decode()
    return dict(segmentation=code, area=float(area), bbox=box.tolist())


def convert(source: Path, out: Path, max_pixels: int) -> dict[str, tuple[int, int]]:
    """Writes images and annotations of all splits.

    The folder appears only when it is complete.

    Args:
        source: Folder with one folder for each original.
        out: Folder to make.
        max_pixels: Images with more pixels are left out.

    Returns:
        The number of images and of nuclei in each split.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If files are missing.
        ValueError: If a file cannot be read or masks do not fit.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists and is left alone; choose another folder')
    originals = find_images(source)
    sets = {split: dict(images=[], annotations=[]) for split in SPLITS}
    with replacing(out.resolve()) as fresh:
        for split in SPLITS:
            (fresh / split).mkdir()
        (fresh / 'annotations').mkdir()
        for original, masks in track(originals, 'images'):
            shape = read(original, cv2.IMREAD_COLOR).shape[:2]
            if shape[0] * shape[1] > max_pixels:
                continue
            split = split_of(original.stem)
            images, annotations = sets[split].values()
            number = len(images) + 1
            name = f'{number:04}.png'
            images.append(
                dict(
                    id=number,
                    file_name=name,
                    width=shape[1],
                    height=shape[0],
                    source=original.stem,
                )
            )
            nuclei = [read_mask(mask, shape) for mask in masks]
            for nucleus in filter(None, nuclei):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=1,
                        iscrowd=0,
                        **nucleus,
                    )
                )
            shutil.copyfile(original, fresh / split / name)
        for split, content in sets.items():
            category = dict(id=1, name='nucleus', supercategory='cell')
            content['categories'] = [category]
            path = fresh / 'annotations' / f'instances_{split}.json'
            path.write_text(json.dumps(content))
    return {k: (len(v['images']), len(v['annotations'])) for k, v in sets.items()}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='folder of the unpacked set')
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=400_000,
        help='leave out images with more pixels (default: 400000)',
    )
    args = parser.parse_args(argv)
    with user_errors(parser):
        counts = convert(args.source, args.out, args.max_pixels)
    for split, (images, nuclei) in counts.items():
        print(f'{split}: {images} images, {nuclei} nuclei')


if __name__ == '__main__':
    main()

"""Check of the files of a data set."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from dsnet_mm.datasets import PUBLIC_DATASETS, Split, load_task
from dsnet_mm.progress import progress_bar

from .features import hash_pixels
from .images import open_image


def diagnose(
    dataset: str | Path, data_root: str | Path = 'data', decode: bool = False
) -> list[str]:
    """Checks the files of a data set.

    Args:
        dataset: Name, folder or file, see :func:`dsnet_mm.datasets.load_task`.
        data_root: Folder of the public data sets.
        decode: Whether to read all images, to find damaged ones and test images
            with the pixels of a training or validation image.

    Returns:
        One sentence for each problem. Problems are missing files, numbers of classes or
        images that differ from the papers, missing, empty or damaged images, and
        test images that are also training or validation images.
    """
    try:
        task = load_task(dataset, data_root)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    info = PUBLIC_DATASETS.get(str(dataset))
    if info is not None:
        if len(task.class_names) != info.classes:
            problems.append(
                f'{info.title} has {len(task.class_names)} classes here and '
                f'{info.classes} in the papers.'
            )
        for part, count in zip(('train', 'val', 'test'), info.counts, strict=True):
            if len(task.split[part]) != count:
                problems.append(
                    f'{info.title} has {len(task.split[part])} {part} images here '
                    f'and {count} in the papers.'
                )
    bad: dict[str, list[str]] = {'missing': [], 'empty': [], 'damaged': []}
    pixels: dict[str, str] = {}
    paths = {item[0] for items in task.split.values() for item in items}
    with progress_bar(len(paths), 'reading', 'images', not decode) as bar:
        for path in sorted(paths):
            bar.update()
            file = Path(path)
            if not file.is_file():
                bad['missing'].append(path)
            elif file.stat().st_size == 0:
                bad['empty'].append(path)
            elif decode:
                try:
                    pixels[path] = hash_pixels(open_image(file)).hex()
                except ValueError:
                    bad['damaged'].append(path)
    for what, paths in bad.items():
        if paths:
            rest = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
            problems.append(
                f'{len(paths)} images are {what}: {", ".join(sorted(paths)[:3])}'
                f'{rest}.' + (f' They come from {info.source}.' if info else '')
            )
    if copies := find_copies(task.split, pixels):
        problems.append(describe_copies(copies))
    return problems


def find_copies(split: Split, pixels: Mapping[str, str] = {}) -> dict[str, str]:
    """Finds test images that are also training or validation images.

    Args:
        split: The images. Missing ones are passed over.
        pixels: A hash of the pixels of images, by path, if they are to be compared.
            Without it only the files are compared.

    Returns:
        For each test image that is the same file, has the same content or the same
        pixels: the other image.
    """
    seen = {item[0]: None for part in ('train', 'val') for item in split[part]}
    tested = {item[0]: None for item in split['test']}
    sizes = [
        {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}
        for paths in (seen, tested)
    ]
    common = (set(sizes[0].values()) & set(sizes[1].values())) - {0}
    contents: list[dict[str, str]] = [
        {path: _hash_file(path) for path, size in group.items() if size in common}
        for group in sizes
    ]
    copies = {}
    for hashes in ((contents[0], contents[1]), (pixels, pixels)):
        known = {hashes[0][path]: path for path in seen if path in hashes[0]}
        for path in tested:
            if other := known.get(hashes[1].get(path)):
                copies.setdefault(path, other)
    return copies


def describe_copies(copies: Mapping[str, str]) -> str:
    """Formats what :func:`find_copies` found as a sentence."""
    path, other = next(iter(copies.items()))
    return (
        f'{len(copies)} test images are also training or validation images, with '
        f'the same file or the same pixels, such as {path} and {other}; remove one of '
        f'each.'
    )


def _hash_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

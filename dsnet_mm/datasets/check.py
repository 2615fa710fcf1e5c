"""Check of the files of a data set."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsnet_mm.progress import progress_bar

from .catalogue import PUBLIC_DATASETS
from .images import damage_of, hash_pixels, open_image
from .splits import Split
from .task import load_task


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
        images that differ from the papers, damaged images (see :func:`.damage_of`), and
        test images that are also training or validation images.
    """
    try:
        task = load_task(dataset, data_root)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    info = PUBLIC_DATASETS.get(str(dataset))
    if info is not None:
        for what, here, published in (
            ('classes', len(task.class_names), info.classes),
            *(
                (f'{part} images', len(task.split[part]), count)
                for part, count in zip(task.split, info.counts, strict=True)
            ),
        ):
            if here != published:
                of_papers = f'{published} in the papers'
                problems.append(f'{info.title} has {here} {what} here and {of_papers}.')
    bad: dict[str, list[str]] = {}
    pixels: dict[str, str] = {}
    paths = sorted({item[0] for items in task.split.values() for item in items})
    with progress_bar(len(paths), 'reading', 'images', not decode) as bar:
        for path in paths:
            bar.update()
            damage = damage_of(path, decode=False)
            if decode and not damage:
                try:
                    pixels[path] = hash_pixels(open_image(path)).hex()
                except ValueError as error:
                    damage = damage_of(path) or ('unreadable', str(error))
            if damage:
                bad.setdefault(damage[0], []).append(path)
    for what, paths in bad.items():
        rest = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
        problems.append(
            f'{len(paths)} images are {what}: {", ".join(paths[:3])}{rest}.'
            + (f' They come from {info.source}.' if info else '')
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
    readable = (p for p in seen | tested if os.path.isfile(p) and os.access(p, os.R_OK))
    sizes = {path: os.path.getsize(path) for path in readable}

    def sizes_of(paths: Iterable[str]) -> set[int]:
        return {sizes[path] for path in paths if path in sizes}

    common = (sizes_of(seen) & sizes_of(tested)) - {0}
    contents = {
        path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path, size in sizes.items()
        if size in common
    }
    copies: dict[str, str] = {}
    for hashes in (contents, pixels):
        known = {hashes[path]: path for path in seen if path in hashes}
        for path in tested:
            if other := known.get(hashes.get(path)):
                copies.setdefault(path, other)
    return copies


def describe_copies(copies: Mapping[str, str]) -> str:
    """Formats what :func:`find_copies` found as a sentence."""
    path, other = next(iter(copies.items()))
    return (
        f'{len(copies)} test images are also training or validation images, by the '
        f'same file or the same pixels, such as {path} and {other}; remove one of each.'
    )

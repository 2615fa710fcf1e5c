"""Check of the files of a data set."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsnet_mm.files import sha256
from dsnet_mm.progress import progress_bar

from .catalogue import PUBLIC_DATASETS
from .images import damage_of, hash_pixels, open_image
from .splits import Item, Split
from .task import load_task


def diagnose(
    dataset: str | Path, data_root: str | Path = 'data', decode: bool = False
) -> list[str]:
    """Checks the files of a data set.

    Args:
        dataset: Name, folder or file, see :func:`dsnet_mm.datasets.load_task`.
        data_root: Folder of the public data sets.
        decode: Whether to read all images, to find damaged ones and those with the
            pixels of another one.

    Returns:
        One sentence for each problem. Problems are missing files, numbers of classes or
        images that differ from the papers, damaged images (see :func:`.damage_of`),
        images of two classes, and test images that are also training or validation
        images.
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
    if problem := find_contradictions(task.split, pixels):
        problems.append(problem)
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
    copies: dict[str, str] = {}
    for hashes in (_hash_files(seen | tested), pixels):
        known = {hashes[path]: path for path in seen if path in hashes}
        for path in tested:
            if other := known.get(hashes.get(path)):
                copies.setdefault(path, other)
    return copies


def find_contradictions(split: Split, pixels: Mapping[str, str] = {}) -> str:
    """Finds images that are the same and have two classes.

    Args:
        split: The images, of all parts. Missing ones are passed over.
        pixels: See :func:`find_copies`.

    Returns:
        A sentence that names two of them, empty if there are none.
    """
    items = [item for part in split.values() for item in part]
    pairs: dict[Item, Item] = {}
    for hashes in (_hash_files({item[0]: None for item in items}), pixels):
        first: dict[str, Item] = {}
        for item in items:
            other = first.setdefault(hashes.get(item[0], item[0]), item)
            if other[1] != item[1]:
                pairs.setdefault(item, other)
    for (path, _, name), (other, _, other_name) in pairs.items():
        return (
            f'{len(pairs)} images are also in another class, by the same file or the '
            f'same pixels, such as {path} ({name}) and {other} ({other_name}); keep '
            f'each in its right class.'
        )
    return ''


def _hash_files(paths: Iterable[str]) -> dict[str, str]:
    """Hashes the files whose size in bytes is also that of another one."""
    readable = (p for p in paths if os.path.isfile(p) and os.access(p, os.R_OK))
    sizes = {path: os.path.getsize(path) for path in readable}
    counts = Counter(sizes.values())
    return {
        path: sha256(path) for path, size in sizes.items() if size and counts[size] > 1
    }


def describe_copies(copies: Mapping[str, str]) -> str:
    """Formats what :func:`find_copies` found as a sentence."""
    path, other = next(iter(copies.items()))
    return (
        f'{len(copies)} test images are also training or validation images, by the '
        f'same file or the same pixels, such as {path} and {other}; remove one of each.'
    )

"""Readers of the public data sets, of folders and of CSV files."""

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dsnet_mm.files import read_text

from .catalogue import PUBLIC_DATASETS, SPLITS_SOURCE
from .images import count_other_files, is_image
from .splits import Split, read_split

logger = logging.getLogger(__name__)

PART_NAMES = {
    **{'train': 'train', 'test': 'test'},
    **dict.fromkeys(('val', 'valid', 'validation'), 'val'),
}
"""Parts of a split by the names that folders and files have for them."""


def read_public(name: str, data_root: Path) -> Split:
    """Reads a public data set in CoOp's layout.

    Args:
        name: One of ``PUBLIC_DATASETS``.
        data_root: Folder of the public data sets.

    Returns:
        The split, with full paths.

    Raises:
        FileNotFoundError: If the data set, or one of its files, is missing.
        ValueError: If the content of a file is wrong.
    """
    info = PUBLIC_DATASETS[name]
    folder = data_root / info.folder
    if not folder.is_dir():
        lists = f', and {info.split_file} of {SPLITS_SOURCE} into {folder}'
        raise FileNotFoundError(
            f'{info.title} is not in {folder}; put the images of {info.source} into '
            f'{folder / info.images}{lists if info.split_file else ""}.'
        )
    if info.split_file:
        split = read_split(folder / info.split_file)
        return {
            part: [(str(folder / info.images / p), label, c) for p, label, c in items]
            for part, items in split.items()
        }
    if name == 'fgvc_aircraft':
        return _read_aircraft(folder)
    return _read_imagenet(name, folder)


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; it is a part of the data set.')
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _read_aircraft(folder: Path) -> Split:
    """Reads the lists of variants that come with FGVC Aircraft."""
    labels = {name: i for i, name in enumerate(_read_lines(folder / 'variants.txt'))}
    split: Split = {'train': [], 'val': [], 'test': []}
    for part, items in split.items():
        file = folder / f'images_variant_{part}.txt'
        for image, _, variant in (line.partition(' ') for line in _read_lines(file)):
            if variant not in labels:
                raise ValueError(
                    f'{file} has the variant {variant!r}, which is not in variants.txt.'
                )
            path = folder / 'images' / f'{image}.jpg'
            items.append((str(path), labels[variant], variant))
    return split


def _read_imagenet(name: str, folder: Path) -> Split:
    """Reads ImageNet or one of its shifted test sets.

    Class names come from ``classnames.txt``. ImageNet's validation images are the
    test set; there is no val set. The folders of ImageNetV2 are named by label, those
    of the other sets by WordNet id. Labels are positions of the folders in sorted
    order, also in the sets with 200 classes.
    """
    lines = (line.partition(' ') for line in _read_lines(folder / 'classnames.txt'))
    words = {wnid: cls for wnid, _, cls in lines}
    if name == 'imagenetv2':
        words = {str(label): cls for label, cls in enumerate(words.values())}
    images = folder / PUBLIC_DATASETS[name].images
    parts = {'train': images / 'train', 'test': images / 'val'}
    split: Split = {'train': [], 'val': [], 'test': []}
    for part, place in (parts if name == 'imagenet' else {'test': images}).items():
        if not place.is_dir():
            raise FileNotFoundError(f'{place} is missing; it must contain the images.')
        folders = sorted(p for p in place.iterdir() if p.is_dir())
        if name == 'imagenetv2':
            folders.sort(key=lambda p: p.name.zfill(4))
        for label, sub in enumerate(folders):
            if sub.name not in words:
                raise ValueError(f'{sub} is not in {folder / "classnames.txt"}.')
            split[part] += [(str(p), label, words[sub.name]) for p in _images(sub)]
    return split


def _images(folder: Path) -> list[Path]:
    """Returns the images in and below a folder, without hidden folders."""
    found = []
    for place, below, names in os.walk(folder):
        below[:] = (name for name in below if not name.startswith('.'))
        found += (Path(place, name) for name in names)
    return sorted(path for path in found if is_image(path))


def read_folder(folder: Path) -> Split:
    """Reads a folder of images.

    Args:
        folder: Folder with one folder a class, directly or below ``train``, ``test``
            and, if there is one, ``val``. ``validation`` is another name of ``val``.
            Images in folders below that of a class are of the class. A folder that
            contains nothing but one folder of folders stands for that.

    Returns:
        The split, or ``'all'`` if the folder has no split of its own.

    Raises:
        ValueError: If a class has no image, or there is a ``train`` and no ``test``.
    """
    inside = _folders(folder)
    while len(inside) == 1 and _is_wrapper(inside[0]):
        folder, inside = inside[0], _folders(inside[0])
    places = [
        sub
        for sub in inside
        if sub.name.lower() in PART_NAMES and any(p.is_dir() for p in sub.iterdir())
    ]  # without folders it is a class of this name
    parts = {PART_NAMES[place.name.lower()]: place for place in places}
    if parts and ('test' not in parts or len(parts) < len(places)):
        raise ValueError(
            f'{folder} has the folders of classes in '
            f'{" and ".join(place.name for place in places)}; one folder test is '
            f'needed, and no second one of a part; or move the classes directly into '
            f'{folder} to have them split.'
        )
    rows, deep = [], []
    for part, place in (parts or {'all': folder}).items():
        for sub in _folders(place):
            images = _images(sub)
            if not images and part != 'val':
                others = count_other_files(sub)
                raise ValueError(
                    f'the class folder {sub} contains no image'
                    + (f', but {others}; convert them to JPEG.' if others else '.')
                )
            rows += [(part, str(path), sub.name) for path in images]
            deep += [(path, sub.name) for path in images if path.parent != sub]
    if deep:
        logger.warning(
            '%d images are in folders below that of a class and count as of the class, '
            'such as %s as %r; a CSV file can name other classes.',
            *(len(deep), *deep[0]),
        )
    if not rows:
        raise ValueError(
            f'{folder} must contain a folder of images for each class, directly or '
            f'below train and test; found none.'
        )
    return number_classes(rows)


def _is_wrapper(place: Path) -> bool:
    is_part = place.name.lower() in PART_NAMES
    own = (path for path in place.iterdir() if is_image(path) and path.is_file())
    return not is_part and bool(_folders(place)) and not any(own)


def _folders(place: Path) -> list[Path]:
    return sorted(
        p for p in place.iterdir() if p.is_dir() and not p.name.startswith('.')
    )


def read_csv(path: Path) -> Split:
    """Reads a CSV file in UTF-8, with or without a byte-order mark.

    Args:
        path: File with the columns ``path`` and ``class`` and, if there is one,
            ``split``. Paths are relative to the file. ``file_name`` and ``label``, the
            names of Hugging Face's ``imagefolder``, are accepted too.

    Returns:
        The split, or ``'all'`` if there is no column ``split``.

    Raises:
        ValueError: If the file is no such table.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=''), strict=True)
    try:
        table = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(
            f'{path}: line {reader.line_num} is no CSV: {error}.'
        ) from error
    other_names = {'file_name': 'path', 'label': 'class'}
    found = [name.strip() for name in table[0][1]] if table else []
    columns = [other_names.get(name, name) for name in found]
    counts = [columns.count(name) for name in ('path', 'class', 'split')]
    if counts not in ([1, 1, 0], [1, 1, 1]):
        raise ValueError(
            f'{path} must have the columns path and class (and may have split) once, '
            f'found {", ".join(map(repr, found)) or "none"}.'
        )
    rows = []
    for line, values in table[1:]:
        row = dict(zip(columns, values, strict=False))
        if len(values) != len(columns) or not (row['path'] and row['class']):
            raise ValueError(
                f'{path}: line {line} does not have one value for each of the '
                f'{len(columns)} columns.'
            )
        part = row.get('split', 'all')
        if 'split' in row and part not in ('train', 'val', 'test'):
            raise ValueError(f'{path}: split must be train, val or test, got {part!r}.')
        rows.append((part, str(path.parent / row['path']), row['class']))
    return number_classes(rows)


def number_classes(
    rows: Sequence[tuple[str, str, str]], names: Sequence[str] = ()
) -> Split:
    """Makes a split of (part, path, class name).

    Labels are in the order of ``names``. Other names come after them, sorted.
    """
    names = dict.fromkeys([*names, *sorted({cls for *_, cls in rows})])
    labels = {cls: label for label, cls in enumerate(names)}
    split: Split = {'train': [], 'val': [], 'test': []}
    for part, path, cls in rows:
        split.setdefault(part, []).append((path, labels[cls], cls))
    return split

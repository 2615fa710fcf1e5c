"""Readers of the public data sets, of folders and of CSV files."""

import csv
import io
from collections import Counter
from pathlib import Path

from .catalogue import PUBLIC_DATASETS, SPLITS_SOURCE
from .splits import Split, read_split

IMAGE_SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.bmp', '.webp'),
    *('.pgm', '.ppm', '.tif', '.tiff'),
)
"""Ends of the names of files that are read as images."""

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
        raise FileNotFoundError(
            f'{info.title} is not in {folder}; put the images of {info.source} into '
            f'{folder / info.images}'
            + (
                f', and {info.split_file} of {SPLITS_SOURCE} into {folder}.'
                if info.split_file
                else '.'
            )
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
    return [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]


def _read_aircraft(folder: Path) -> Split:
    """Reads the lists of variants that come with FGVC Aircraft."""
    labels = {name: i for i, name in enumerate(_read_lines(folder / 'variants.txt'))}
    split: Split = {}
    for part in ('train', 'val', 'test'):
        split[part] = []
        for line in _read_lines(folder / f'images_variant_{part}.txt'):
            image, _, variant = line.partition(' ')
            path = folder / 'images' / f'{image}.jpg'
            if variant not in labels:
                raise ValueError(
                    f'{folder / f"images_variant_{part}.txt"} has the variant '
                    f'{variant!r}, which is not in variants.txt.'
                )
            split[part].append((str(path), labels[variant], variant))
    return split


def _read_imagenet(name: str, folder: Path) -> Split:
    """Reads ImageNet or one of its shifted test sets.

    Class names come from ``classnames.txt``. ImageNet's validation images are the
    test set; there is no val set. The folders of ImageNetV2 are named by label, those
    of the other sets by WordNet id. Labels are positions of the folders in sorted
    order, also in the sets with 200 classes.
    """
    lines = _read_lines(folder / 'classnames.txt')
    words = {wnid: cls for wnid, _, cls in (line.partition(' ') for line in lines)}
    images = folder / PUBLIC_DATASETS[name].images
    split: Split = {'train': [], 'val': [], 'test': []}
    parts = {'train': images / 'train', 'test': images / 'val'}
    for part, place in (parts if name == 'imagenet' else {'test': images}).items():
        if not place.is_dir():
            raise FileNotFoundError(f'{place} is missing; it must contain the images.')
        folders = sorted(p for p in place.iterdir() if p.is_dir())
        if name == 'imagenetv2':
            folders.sort(key=lambda p: int(p.name))
        for label, sub in enumerate(folders):
            cls = (
                list(words.values())[int(sub.name)]
                if name == 'imagenetv2'
                else words.get(sub.name)
            )
            if cls is None:
                raise ValueError(f'{sub.name} is not in {folder / "classnames.txt"}.')
            split[part] += [(str(p), label, cls) for p in _images(sub)]
    return split


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_image(p))


def is_image(path: Path) -> bool:
    """Tells whether a file is read as an image, by its suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


def count_other_files(folder: Path) -> str:
    """Counts the files below a folder that are not read, by suffix.

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
    return ', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common())


def read_folder(folder: Path) -> Split:
    """Reads a folder of images.

    Args:
        folder: Folder with one folder of images a class, directly or below
            ``train``, ``test`` and, if there is one, ``val``. ``validation`` is
            another name of ``val``.

    Returns:
        The split, or ``'all'`` if the folder has no split of its own.

    Raises:
        ValueError: If a class has no image, or there is a ``train`` and no ``test``.
    """
    parts = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        part = PART_NAMES.get(sub.name.lower())
        if part and any(p.is_dir() for p in sub.iterdir()):  # else it is a class
            parts[part] = sub
    if parts and 'test' not in parts:
        names = ' and '.join(sorted(place.name for place in parts.values()))
        raise ValueError(
            f'{folder} has the folders of classes in {names}, but no folder test; add '
            f'it, or move the classes directly into {folder} to have them split.'
        )
    found: dict[str, dict[str, list[str]]] = {}
    for part, place in (parts or {'all': folder}).items():
        found[part] = {}
        for sub in sorted(place.iterdir()):
            if sub.is_dir() and not sub.name.startswith('.'):
                images = _images(sub)
                if not images and part != 'val':
                    others = count_other_files(sub)
                    raise ValueError(
                        f'the class folder {sub} contains no image'
                        + (f', but {others}; convert them to JPEG.' if others else '.')
                    )
                found[part][sub.name] = [str(p) for p in images]
    classes = sorted({cls for group in found.values() for cls in group})
    if not classes:
        raise ValueError(
            f'{folder} must contain a folder of images for each class, directly or '
            f'below train and test; found none.'
        )
    items = {
        part: [
            (path, classes.index(cls), cls)
            for cls, paths in group.items()
            for path in paths
        ]
        for part, group in found.items()
    }
    return {'train': [], 'val': [], 'test': [], **items} if parts else items


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
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise ValueError(
            f'{path} is not in UTF-8 (line {line}); save it as UTF-8.'
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
    try:
        found = reader.fieldnames or []
    except csv.Error as error:
        raise ValueError(f'{path}: line 1 is no CSV: {error}.') from error
    new_names = {'file_name': 'path', 'label': 'class'}
    reader.fieldnames = [new_names.get(name.strip(), name.strip()) for name in found]
    if not {'path', 'class'} <= set(reader.fieldnames):
        raise ValueError(
            f'{path} must have the columns path and class (and may have split), found '
            f'{", ".join(found) or "none"}.'
        )
    split: Split = {'train': [], 'val': [], 'test': []}
    rows, items = [], []
    try:
        for row in reader:
            if (
                None in row
                or None in row.values()
                or not (row['path'] and row['class'])
            ):
                raise ValueError(
                    f'{path}: line {reader.line_num} does not have one value for each '
                    f'of the {len(found)} columns.'
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f'{path}: line {reader.line_num} is no CSV: {error}.'
        ) from error
    classes = {name: i for i, name in enumerate(sorted({r['class'] for r in rows}))}
    for row in rows:
        item = str(path.parent / row['path']), classes[row['class']], row['class']
        items.append(item)
        part = row.get('split', 'train')
        if part not in split:
            raise ValueError(f'{path}: split must be train, val or test, got {part!r}.')
        split[part].append(item)
    return split if 'split' in reader.fieldnames else {'all': items}

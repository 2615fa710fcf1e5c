"""Readers of the public data sets, of folders and of CSV files."""

import csv
from pathlib import Path

from .catalogue import PUBLIC_DATASETS, SPLITS_SOURCE
from .splits import Split, read_split, split_within_classes

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff')


def read_public(name: str, data_root: Path) -> Split:
    """Read a public data set in CoOp's layout.

    Args:
        name: One of ``PUBLIC_DATASETS``.
        data_root: Folder of the public data sets.

    Returns:
        The split, with full paths.

    Raises:
        FileNotFoundError: If the data set, or one of its files, is missing.
        ValueError: If a file does not hold what it should.
    """
    info = PUBLIC_DATASETS[name]
    folder = data_root / info.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{info.title} is expected in {folder}: get the pictures from '
            f'{info.source} so that they lie in {folder / info.images}'
            + (
                f', and {info.split_file} from {SPLITS_SOURCE}.'
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
        raise FileNotFoundError(f'{path} is missing; it belongs to the data set.')
    return [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]


def _read_aircraft(folder: Path) -> Split:
    """Read the lists of variants that come with FGVC Aircraft."""
    labels = {name: i for i, name in enumerate(_read_lines(folder / 'variants.txt'))}
    split: Split = {}
    for part in ('train', 'val', 'test'):
        split[part] = []
        for line in _read_lines(folder / f'images_variant_{part}.txt'):
            image, _, variant = line.partition(' ')
            path = folder / 'images' / f'{image}.jpg'
            split[part].append((str(path), labels[variant], variant))
    return split


def _read_imagenet(name: str, folder: Path) -> Split:
    """Read ImageNet or one of its shifted test sets.

    Class names come from ``classnames.txt``. ImageNet's validation pictures are the
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
            raise FileNotFoundError(f'{place} is missing; it holds the pictures.')
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
            split[part] += [(str(p), label, cls) for p in _pictures(sub)]
    return split


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def read_folder(folder: Path) -> Split:
    """Read a folder of pictures.

    Args:
        folder: Folder with one folder of pictures a class, directly or below
            ``train``, ``test`` and, if there is one, ``val``.

    Returns:
        The split. Without ``train`` and ``test`` the classes are split by
        :func:`split_within_classes`.

    Raises:
        ValueError: If there are fewer than two classes, or a class has no picture.
    """
    parts = {part: folder / part for part in ('train', 'val', 'test')}
    has_split = parts['train'].is_dir() and parts['test'].is_dir()
    places = parts if has_split else {'all': folder}
    found: dict[str, dict[str, list[str]]] = {}
    for part, place in places.items():
        found[part] = {}
        for sub in sorted(place.iterdir()) if place.is_dir() else []:
            if sub.is_dir() and not sub.name.startswith('.'):
                pictures = _pictures(sub)
                if not pictures and part != 'val':
                    raise ValueError(f'the class folder {sub} holds no picture.')
                found[part][sub.name] = [str(p) for p in pictures]
    classes = sorted({cls for group in found.values() for cls in group})
    if len(classes) < 2:
        raise ValueError(
            f'{folder} must hold a folder of pictures for each of at least two '
            f'classes, directly or below train and test; found {classes}.'
        )
    items = {
        part: [
            (path, classes.index(cls), cls)
            for cls, paths in group.items()
            for path in paths
        ]
        for part, group in found.items()
    }
    return items if has_split else split_within_classes(items['all'])


def read_csv(path: Path) -> Split:
    """Read a CSV file.

    Args:
        path: File with the columns ``path`` and ``class`` and, if there is one,
            ``split``. Paths are relative to the file.

    Returns:
        The split. Without the column ``split`` the classes are split by
        :func:`split_within_classes`.

    Raises:
        ValueError: If a column is missing, or ``split`` has another value than
            train, val and test.
    """
    with path.open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if not {'path', 'class'} <= columns:
        raise ValueError(
            f'{path} must have the columns path and class (and may have split), found '
            f'{sorted(map(str, columns))}.'
        )
    classes = sorted({row['class'] for row in rows})
    items = [
        (str(path.parent / row['path']), classes.index(row['class']), row['class'])
        for row in rows
    ]
    if 'split' not in columns:
        return split_within_classes(items)
    split: Split = {'train': [], 'val': [], 'test': []}
    for row, item in zip(rows, items, strict=True):
        if row['split'] not in split:
            raise ValueError(
                f'{path}: split must be train, val or test, got {row["split"]!r}.'
            )
        split[row['split']].append(item)
    return split

"""Few-shot data: the splits of CoOp, a folder or a CSV file, and draws from them.

A split maps ``'train'``, ``'val'`` and ``'test'`` to items ``(path, label,
class_name)``. The names and folders of the public data sets follow the layout that
CoOp (arXiv 2109.01134) introduced and that its successors share.
"""

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Item = tuple[str, int, str]
"""Path, label and class name of a picture."""

Split = dict[str, list[Item]]
"""Items by ``'train'``, ``'val'`` and ``'test'``."""

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff')

PROMPTS: dict[str, tuple[str, ...]] = {
    'photo': ('a photo of a {}.',),
    'imagenet_7': (
        'itap of a {}.',
        'a bad photo of the {}.',
        'a origami {}.',
        'a photo of the large {}.',
        'a {} in a video game.',
        'art of the {}.',
        'a photo of the small {}.',
    ),
}
"""Prompt sets by name: CoOp's for most data sets, Tip-Adapter's for ImageNet. That of
a public data set has the name of the data set."""


@dataclass(frozen=True)
class DatasetInfo:
    """A public data set in CoOp's layout.

    Attributes:
        title: Name in the papers.
        folder: Folder below the data root.
        images: Folder of the pictures in there.
        split_file: Split in there; empty where the lists of the data set itself or
            its folders are the split.
        classes: Number of classes.
        counts: Pictures of train, val and test, 0 where there are none.
        source: Where the pictures come from.
        prompt: Hand-written prompt of the papers.
    """

    title: str
    folder: str
    images: str
    split_file: str
    classes: int
    counts: tuple[int, int, int]
    source: str
    prompt: str = 'a photo of a {}.'


_VGG = 'https://www.robots.ox.ac.uk/~vgg/data'

DATASETS: dict[str, DatasetInfo] = {
    'imagenet': DatasetInfo(
        'ImageNet',
        'imagenet',
        'images',
        '',
        1000,
        (1_281_167, 0, 50_000),
        'https://image-net.org',
    ),
    'caltech101': DatasetInfo(
        'Caltech101',
        'caltech-101',
        '101_ObjectCategories',
        'split_zhou_Caltech101.json',
        100,
        (4128, 1649, 2465),
        'https://data.caltech.edu/records/mzrjq-6wc02',
    ),
    'oxford_pets': DatasetInfo(
        'OxfordPets',
        'oxford_pets',
        'images',
        'split_zhou_OxfordPets.json',
        37,
        (2944, 736, 3669),
        f'{_VGG}/pets/',
        'a photo of a {}, a type of pet.',
    ),
    'stanford_cars': DatasetInfo(
        'StanfordCars',
        'stanford_cars',
        '.',
        'split_zhou_StanfordCars.json',
        196,
        (6509, 1635, 8041),
        'https://ai.stanford.edu/~jkrause/cars/car_dataset.html',
    ),
    'oxford_flowers': DatasetInfo(
        'Flowers102',
        'oxford_flowers',
        'jpg',
        'split_zhou_OxfordFlowers.json',
        102,
        (4093, 1633, 2463),
        f'{_VGG}/flowers/102/',
        'a photo of a {}, a type of flower.',
    ),
    'food101': DatasetInfo(
        'Food101',
        'food-101',
        'images',
        'split_zhou_Food101.json',
        101,
        (50_500, 20_200, 30_300),
        'https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/',
        'a photo of {}, a type of food.',
    ),
    'fgvc_aircraft': DatasetInfo(
        'FGVCAircraft',
        'fgvc_aircraft',
        'images',
        '',
        100,
        (3334, 3333, 3333),
        f'{_VGG}/fgvc-aircraft/',
        'a photo of a {}, a type of aircraft.',
    ),
    'sun397': DatasetInfo(
        'SUN397',
        'sun397',
        'SUN397',
        'split_zhou_SUN397.json',
        397,
        (15_880, 3970, 19_850),
        'https://vision.princeton.edu/projects/2010/SUN/',
    ),
    'dtd': DatasetInfo(
        'DTD',
        'dtd',
        'images',
        'split_zhou_DescribableTextures.json',
        47,
        (2820, 1128, 1692),
        f'{_VGG}/dtd/',
        '{} texture.',
    ),
    'eurosat': DatasetInfo(
        'EuroSAT',
        'eurosat',
        '2750',
        'split_zhou_EuroSAT.json',
        10,
        (13_500, 5400, 8100),
        'https://github.com/phelber/EuroSAT',
        'a centered satellite photo of {}.',
    ),
    'ucf101': DatasetInfo(
        'UCF101',
        'ucf101',
        'UCF-101-midframes',
        'split_zhou_UCF101.json',
        101,
        (7639, 1898, 3783),
        "CoOp's archive of middle frames, UCF-101-midframes.zip",
        'a photo of a person doing {}.',
    ),
    'imagenetv2': DatasetInfo(
        'ImageNetV2',
        'imagenetv2',
        'imagenetv2-matched-frequency-format-val',
        '',
        1000,
        (0, 0, 10_000),
        'https://github.com/modestyachts/ImageNetV2',
    ),
    'imagenet_sketch': DatasetInfo(
        'ImageNet-Sketch',
        'imagenet-sketch',
        'images',
        '',
        1000,
        (0, 0, 50_889),
        'https://github.com/HaohanWang/ImageNet-Sketch',
    ),
    'imagenet_a': DatasetInfo(
        'ImageNet-A',
        'imagenet-adversarial',
        'imagenet-a',
        '',
        200,
        (0, 0, 7500),
        'https://github.com/hendrycks/natural-adv-examples',
    ),
    'imagenet_r': DatasetInfo(
        'ImageNet-R',
        'imagenet-rendition',
        'imagenet-r',
        '',
        200,
        (0, 0, 30_000),
        'https://github.com/hendrycks/imagenet-r',
    ),
}
"""The 11 data sets of CoOp, and the four shifted test sets of ImageNet."""

SPLITS_SOURCE = (
    'https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md, or the copies that '
    'https://github.com/linzhiqiu/cross_modal_adaptation keeps in its repository'
)
"""Where the ``split_zhou_*.json`` files are."""


# --- Splits -----------------------------------------------------------------------


def read_split(split_file: str | Path) -> Split:
    """Read a ``split_zhou_*.json`` file.

    Args:
        split_file: Path of the file.

    Returns:
        Its train, val and test items, paths as they stand in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds something else.
    """
    split_file = Path(split_file)
    if not split_file.is_file():
        raise FileNotFoundError(
            f'there is no split file {split_file}; the files split_zhou_*.json come '
            f'from {SPLITS_SOURCE}.'
        )
    try:
        content = json.loads(split_file.read_text(encoding='utf-8'))
        return {
            name: [(str(path), int(label), str(cls)) for path, label, cls in items]
            for name, items in (
                (name, content[name]) for name in ('train', 'val', 'test')
            )
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{split_file} is no split file: it must hold lists of [path, label, '
            f'class name] under train, val and test ({error!r}).'
        ) from error


def sample_few_shot(
    split_file: str | Path | Mapping[str, Sequence[Item]], shots: int, seed: int
) -> dict[str, list[Item]]:
    """Draw the few-shot training and validation sets of CoOp.

    Reproduces the published draws: one random stream, classes in the order in which
    they first appear, all of train before all of val (CoOp,
    ``generate_fewshot_dataset``).

    Args:
        split_file: Path of a ``split_zhou_*.json`` file, or a split.
        shots: Training pictures of each class.
        seed: Seed of the draw; the papers use 1, 2 and 3.

    Returns:
        ``'train'``: ``shots`` items of each class; ``'val'``: ``min(shots, 4)``
        items of each class, all of them where a class has fewer.

    Raises:
        TypeError: If ``shots`` or ``seed`` is no integer.
        ValueError: If ``shots`` is below 1, or a class has fewer training pictures.
        FileNotFoundError: If there is no such file.
    """
    for what, value in (('shots', shots), ('seed', seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f'{what} must be an integer, got {value!r}.')
    if shots < 1:
        raise ValueError(f'shots must be at least 1, got {shots}.')
    split = split_file if isinstance(split_file, Mapping) else read_split(split_file)
    for items in _by_class(split['train']).values():
        if len(items) < shots:
            raise ValueError(
                f'class {items[0][2]!r} has {len(items)} training pictures, fewer '
                f'than the {shots} shots asked for; use fewer shots or add pictures.'
            )
    rng = random.Random(seed)
    return {
        'train': [
            item
            for items in _by_class(split['train']).values()
            for item in rng.sample(items, shots)
        ],
        'val': [
            item
            for items in _by_class(split['val']).values()
            for item in rng.sample(items, min(shots, 4, len(items)))
        ],
    }


def _by_class(items: Iterable[Item]) -> dict[int, list[Item]]:
    """Items by label, labels in the order in which they first appear."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1], []).append(tuple(item))
    return groups


# --- Tasks ------------------------------------------------------------------------


@dataclass(frozen=True)
class FewShotTask:
    """A data set ready for few-shot classification.

    Attributes:
        name: Name of the data set, or of its folder or file.
        split: Items with full paths.
        class_names: Names as the prompts use them, by label.
        prompts: Prompts, each with one ``{}`` for the class name.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]


def load_task(
    dataset: str | Path,
    data_root: str | Path = 'data',
    prompts: str | Path | Sequence[str] | None = None,
) -> FewShotTask:
    """Read a data set by name, folder or file.

    Args:
        dataset: One of ``DATASETS``, read from CoOp's layout below ``data_root``; or
            a folder with one folder of pictures a class, directly or below
            ``train``, (``val``) and ``test``; or a CSV file with the columns
            ``path`` and ``class`` (and ``split``), paths relative to the file. A
            folder or file without its own split is split 50/20/30 within each class,
            always the same way.
        data_root: Folder of the public data sets.
        prompts: See :func:`resolve_prompts`. None takes those of the papers, or
            ``'photo'``.

    Returns:
        The task.

    Raises:
        FileNotFoundError: If the data set, or a file of it, is missing.
        ValueError: If it is not what is described above.
    """
    path = Path(dataset)
    if str(dataset) in DATASETS:
        name = str(dataset)
        split = _read_public(name, Path(data_root))
        prompts = name if prompts is None else prompts
    elif path.is_dir():
        name, split = path.resolve().name, _read_folder(path)
    elif path.suffix == '.csv' and path.is_file():
        name, split = path.stem, _read_csv(path)
    else:
        raise FileNotFoundError(
            f'{str(dataset)!r} is neither a data set ({", ".join(DATASETS)}) nor an '
            f'existing folder or CSV file.'
        )
    names: dict[int, str] = {}
    for items in split.values():
        for item in items:
            names.setdefault(item[1], item[2].replace('_', ' '))
    if not split['test']:
        raise ValueError(f'{name} has no test pictures.')
    missing = sorted(set(range(max(names) + 1)) - set(names))
    if missing:
        raise ValueError(f'{name} has no picture of the classes {missing}.')
    class_names = tuple(names[label] for label in range(len(names)))
    if name not in DATASETS:  # ImageNet has two names twice
        check_class_names(class_names)
    if split['train']:
        trained = {item[1] for item in split['train']}
        empty = [cls for label, cls in enumerate(class_names) if label not in trained]
        if empty:
            raise ValueError(
                f'{name} has no training picture of {", ".join(map(repr, empty))}.'
            )
    return FewShotTask(
        name,
        split,
        class_names,
        resolve_prompts('photo' if prompts is None else prompts),
    )


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse class names that no prompt can tell apart.

    Args:
        class_names: Names by label.

    Raises:
        ValueError: If there is no name, an empty one, or one twice.
    """
    if not class_names:
        raise ValueError('there are no class names.')
    if any(not name.strip() for name in class_names):
        raise ValueError('a class name is empty.')
    twice = sorted({n for n in class_names if list(class_names).count(n) > 1})
    if twice:
        raise ValueError(
            f'duplicate class names {", ".join(map(repr, twice))}: their prompts are '
            f'the same, so no text feature can tell them apart; rename or merge them.'
        )


def resolve_prompts(prompts: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Prompts by name, file or list.

    Args:
        prompts: One of ``PROMPTS``; a name of ``DATASETS`` for the prompt of its
            paper; ``'imagenet_80'`` for the ensemble of CLIP, as open_clip has it; a
            text file with a prompt a line; one prompt; or a list of prompts.

    Returns:
        The prompts, each with one ``{}``.

    Raises:
        ValueError: If a prompt has not exactly one ``{}``, or the name is unknown.
    """
    if isinstance(prompts, str | Path):
        text = str(prompts)
        if text in PROMPTS:
            return PROMPTS[text]
        if text in DATASETS:
            return (DATASETS[text].prompt,)
        if text == 'imagenet_80':
            from open_clip import OPENAI_IMAGENET_TEMPLATES

            return tuple(template('{}') for template in OPENAI_IMAGENET_TEMPLATES)
        if '{' in text:
            prompts = (text,)
        elif Path(text).is_file():
            lines = Path(text).read_text(encoding='utf-8').splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        else:
            raise ValueError(
                f'prompts {text!r} is neither a prompt (it has no {{}}), nor a file, '
                f'nor one of {", ".join((*PROMPTS, "imagenet_80", *DATASETS))}.'
            )
    if not prompts:
        raise ValueError('there are no prompts.')
    for prompt in prompts:
        if prompt.count('{}') != 1:
            raise ValueError(
                f'the prompt {prompt!r} must hold {{}} once, where the class name goes.'
            )
    return tuple(prompts)


# --- Readers ----------------------------------------------------------------------


def _read_public(name: str, data_root: Path) -> Split:
    info = DATASETS[name]
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
    """The lists of variants that come with FGVC Aircraft."""
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
    """ImageNet and its shifted test sets, class names from ``classnames.txt``.

    ImageNet's validation pictures are its test set, and it has no val set. ImageNetV2
    names its folders by label, all others by WordNet id. Labels of the sets with 200
    classes count their own folders.
    """
    lines = _read_lines(folder / 'classnames.txt')
    words = {wnid: cls for wnid, _, cls in (line.partition(' ') for line in lines)}
    images = folder / DATASETS[name].images
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


def _read_folder(folder: Path) -> Split:
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
    return items if has_split else _split_within_classes(items['all'])


def _read_csv(path: Path) -> Split:
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
        return _split_within_classes(items)
    split: Split = {'train': [], 'val': [], 'test': []}
    for row, item in zip(rows, items, strict=True):
        if row['split'] not in split:
            raise ValueError(
                f'{path}: split must be train, val or test, got {row["split"]!r}.'
            )
        split[row['split']].append(item)
    return split


def _split_within_classes(items: list[Item]) -> Split:
    """50 % train, 20 % val and the rest test of each class, as CoOp splits."""
    split: Split = {'train': [], 'val': [], 'test': []}
    for group in _by_class(items).values():
        if len(group) < 2:
            raise ValueError(
                f'class {group[0][2]!r} has {len(group)} picture; at least two are '
                f'needed, one to train and one to test.'
            )
        group = random.Random(0).sample(group, len(group))
        train = max(1, len(group) // 2)
        val = train + len(group) // 5
        split['train'] += group[:train]
        split['val'] += group[train:val]
        split['test'] += group[val:]
    return split


# --- Doctor -----------------------------------------------------------------------


def diagnose(
    dataset: str | Path, data_root: str | Path = 'data', decode: bool = False
) -> list[str]:
    """Look for what is wrong with a data set.

    Args:
        dataset: Name, folder or file, see :func:`load_task`.
        data_root: Folder of the public data sets.
        decode: Whether to open every picture, which finds damaged ones.

    Returns:
        A sentence for each problem, none if all is well: what is missing, where it
        comes from and where it goes; counts that differ from the published ones;
        missing, empty or damaged pictures.
    """
    try:
        task = load_task(dataset, data_root)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    info = DATASETS.get(str(dataset))
    if info is not None:
        if len(task.class_names) != info.classes:
            problems.append(
                f'{info.title} has {len(task.class_names)} classes here and '
                f'{info.classes} in the papers.'
            )
        for part, count in zip(('train', 'val', 'test'), info.counts, strict=True):
            if len(task.split[part]) != count:
                problems.append(
                    f'{info.title} has {len(task.split[part])} {part} pictures here '
                    f'and {count} in the papers.'
                )
    bad: dict[str, list[str]] = {'missing': [], 'empty': [], 'damaged': []}
    for path in {item[0] for items in task.split.values() for item in items}:
        file = Path(path)
        if not file.is_file():
            bad['missing'].append(path)
        elif file.stat().st_size == 0:
            bad['empty'].append(path)
        elif decode and not _decodes(file):
            bad['damaged'].append(path)
    for what, paths in bad.items():
        if paths:
            rest = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
            problems.append(
                f'{len(paths)} pictures are {what}: {", ".join(sorted(paths)[:3])}'
                f'{rest}.' + (f' They come from {info.source}.' if info else '')
            )
    return problems


def _decodes(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.convert('RGB')
    except (OSError, SyntaxError, ValueError):
        return False
    return True

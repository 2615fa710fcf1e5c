"""Check the data that a configuration reads, in one pass.

Images: missing, unreadable or cut off, of another size than the annotations say, the
same twice (also in another split), rotated by EXIF, grey, 16-bit, CMYK, transparent.
Annotations in COCO's format: unknown ids, the same twice, boxes without area or outside
the image, polygons of fewer than three points, missing masks, classes that are empty,
in another order, or not in the configuration. The exit status is 1 if there are errors.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dsnet_mm.engine.config import check_data, dicts_in, load_config
from dsnet_mm.engine.launch import OldFlag, add_config_arguments, user_errors
from dsnet_mm.files import write_atomic

SPLITS = ('train', 'val', 'test')
ERROR, WARNING, NOTE = 'error', 'warning', 'note'
# What was found -> how bad it is, and what mmdet and mmpretrain make of it.
FINDINGS = {
    'no such image': (ERROR, 'training stops'),
    'image cannot be read': (ERROR, 'training stops'),
    'image is cut off': (ERROR, 'OpenCV fills the rest with grey, without a word'),
    'size differs from the annotations': (ERROR, 'boxes and masks are misplaced'),
    'image is too large to be checked': (WARNING, 'it is read as it is'),
    'annotations cannot be read': (ERROR, 'training does not start'),
    'unknown image_id': (ERROR, 'the annotation is left out'),
    'unknown category_id': (ERROR, 'the annotation is left out'),
    'id of an image is not unique': (ERROR, 'one of the images is lost'),
    'id of an annotation is not unique': (ERROR, 'training does not start'),
    'bbox or area is missing or no number': (ERROR, 'training does not start'),
    'object without a mask': (ERROR, 'training stops'),
    'class of the configuration is not in the file': (ERROR, 'labels are shifted'),
    'classes in another order than in the file': (ERROR, 'names are mixed up'),
    'same image in another split': (ERROR, 'the evaluation is too good'),
    'box of less than a pixel': (WARNING, 'the object is left out'),
    'box outside the image': (WARNING, 'the object is left out'),
    'polygon of fewer than three points': (WARNING, 'it is left out'),
    'annotation twice': (WARNING, 'the object counts twice'),
    'image listed twice': (WARNING, 'it is seen twice as often'),
    'same image under two names': (WARNING, 'it is seen twice as often'),
    'class without objects': (WARNING, 'it cannot be learnt, or not be measured'),
    'class of the file is not in the configuration': (NOTE, 'it is left out'),
    'box reaches out of the image': (NOTE, 'it is kept'),
    'image without objects': (NOTE, 'it is left out if filter_empty_gt is set'),
    'rotated by EXIF': (NOTE, 'it is read upright'),
    'grey': (NOTE, 'it is read with three equal channels'),
    '16-bit': (NOTE, 'the upper 8 bits are read'),
    'CMYK': (NOTE, 'it is read as RGB'),
    'transparent': (NOTE, 'what lies under transparent pixels is read'),
}


class Checked(NamedTuple):
    """An image of a split, and the size that the annotations give it."""

    split: str
    path: str
    size: tuple[int, int] | None


class Report:
    """Collects findings.

    Attributes:
        found: Places of each finding, by split and finding.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, split: str, finding: str, where: str) -> None:
        """Adds one place to a finding, a key of ``FINDINGS``."""
        assert finding in FINDINGS
        self.found[split, finding].append(where)

    def severity(self, level: str) -> int:
        """Returns the number of places of a severity."""
        return sum(
            len(places)
            for (_, finding), places in self.found.items()
            if FINDINGS[finding][0] == level
        )

    def table(self) -> Table:
        """Returns a table with the worst findings first."""
        table = Table('', 'split', 'finding', 'times', 'then')
        table.add_column('for example', overflow='fold')
        order = [ERROR, WARNING, NOTE]
        rows = sorted(self.found, key=lambda key: order.index(FINDINGS[key[1]][0]))
        for split, finding in rows:
            places = self.found[split, finding]
            level, effect = FINDINGS[finding]
            color = {ERROR: 'red', WARNING: 'yellow', NOTE: 'default'}[level]
            table.add_row(
                f'[{color}]{level}[/]',
                split,
                finding,
                str(len(places)),
                effect,
                escape(places[0]),
            )
        return table


def check_coco(
    node: dict, split: str, needs_masks: bool, report: Report
) -> Iterator[Checked]:
    """Checks an annotation file in COCO's format and yields its images.

    Args:
        node: Configuration of the data set.
        split: Name of the split.
        needs_masks: Whether the configuration loads masks.
        report: Gets the findings.
    """
    root = node.get('data_root') or ''
    ann_file = os.path.join(root, node['ann_file'])
    folder = os.path.join(root, (node.get('data_prefix') or {}).get('img', ''))
    try:
        images, annotations, categories = _read_coco(ann_file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.add(split, 'annotations cannot be read', f'{ann_file}: {error!r}')
        return

    sizes, names = {}, Counter()
    for image in images:
        if image['id'] in sizes:
            report.add(split, 'id of an image is not unique', f'image {image["id"]}')
        size = (image.get('width'), image.get('height'))
        sizes[image['id']] = size if None not in size else None
        names[image['file_name']] += 1
        if names[image['file_name']] == 2:
            report.add(split, 'image listed twice', image['file_name'])
        path = os.path.join(folder, image['file_name'])
        yield Checked(split, path, sizes[image['id']])

    with DATASETS.switch_scope_and_registry(None) as registry:
        own = registry.get(node['type']).METAINFO.get('classes')
    used = (node.get('metainfo') or {}).get('classes', own)
    in_file = {category['id']: category['name'] for category in categories}
    if used:
        for name in [name for name in used if name not in in_file.values()]:
            where = f'{name!r} is not in {ann_file}'
            report.add(split, 'class of the configuration is not in the file', where)
        for name in [name for name in in_file.values() if name not in used]:
            report.add(split, 'class of the file is not in the configuration', name)
        shared = [name for name in in_file.values() if name in used]
        if shared != [name for name in used if name in shared]:
            where = f'{", ".join(shared)} in {ann_file}'
            report.add(split, 'classes in another order than in the file', where)
    counts, ids, seen = Counter(), set(), set()
    for annotation in annotations:
        where = f'annotation {annotation.get("id")}'
        if annotation.get('id') in ids:
            report.add(split, 'id of an annotation is not unique', where)
        ids.add(annotation.get('id'))
        if annotation.get('image_id') not in sizes:
            report.add(
                split, 'unknown image_id', f'{where}: {annotation.get("image_id")}'
            )
            continue
        if annotation.get('category_id') not in in_file:
            report.add(
                split,
                'unknown category_id',
                f'{where}: {annotation.get("category_id")}',
            )
            continue
        counts[annotation['category_id']] += 1
        counts['image', annotation['image_id']] += 1
        box = annotation.get('bbox')
        key = (annotation['image_id'], annotation['category_id'], str(box))
        if key in seen:
            report.add(split, 'annotation twice', where)
        seen.add(key)
        if _is_numbers(box, 4) and _is_numbers([annotation.get('area')], 1):
            size = sizes[annotation['image_id']]
            _check_box(box, annotation['area'], size, split, where, report)
        else:
            where = f'{where}: {box}, {annotation.get("area")}'
            report.add(split, 'bbox or area is missing or no number', where)
        if needs_masks and not annotation.get('iscrowd'):
            _check_mask(annotation.get('segmentation'), split, where, report)
    for number, name in in_file.items():
        if not counts[number] and (not used or name in used):
            report.add(split, 'class without objects', name)
    for image in images:
        if not counts['image', image['id']]:
            report.add(split, 'image without objects', image['file_name'])


def _read_coco(ann_file: str) -> tuple[list[dict], list[dict], list[dict]]:
    """Reads images, annotations and categories, and checks that they have ids."""
    content = json.loads(Path(ann_file).read_bytes())
    parts = []
    for name, needed in (
        ('images', ('id', 'file_name')),
        ('annotations', ()),
        ('categories', ('id', 'name')),
    ):
        for entry in content[name]:
            if not isinstance(entry, dict) or not entry.keys() >= {*needed}:
                raise ValueError(f'{name} has {entry!r}, without {" or ".join(needed)}')
        parts.append(content[name])
    return tuple(parts)


def _is_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    )


def _check_box(
    box: list[float],
    area: float,
    size: tuple[int, int] | None,
    split: str,
    where: str,
    report: Report,
) -> None:
    """Checks a box of left, top, width and height, as ``CocoDataset`` does."""
    left, top, width, height = box
    if width < 1 or height < 1 or area <= 0:
        where = f'{where}: {box}, area {area}'
        report.add(split, 'box of less than a pixel', where)
    elif size is not None:
        right, bottom = left + width, top + height
        where = f'{where}: {box} in {size}'
        if left >= size[0] or top >= size[1] or right <= 0 or bottom <= 0:
            report.add(split, 'box outside the image', where)
        # Some of COCO's own boxes go half a pixel beyond.
        elif min(left, top) < -1 or right > size[0] + 1 or bottom > size[1] + 1:
            report.add(split, 'box reaches out of the image', where)


def _check_mask(mask: Any, split: str, where: str, report: Report) -> None:
    """Checks polygons. Run-length encodings only have to be there."""
    if not mask:
        report.add(split, 'object without a mask', where)
    elif isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list):
                report.add(split, 'object without a mask', f'{where}: {polygon!r}')
                break
            if len(polygon) < 6 or len(polygon) % 2:
                report.add(
                    split,
                    'polygon of fewer than three points',
                    f'{where}: {len(polygon)} numbers',
                )


def list_other(dataset: Any, split: str, report: Report) -> Iterator[Checked]:
    """Yields the images of another data set, as it lists them itself."""
    counts, names = Counter(), Counter()
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        if 'gt_label' in info:
            counts[int(info['gt_label'])] += 1
        if 'img_path' in info:
            names[info['img_path']] += 1
            if names[info['img_path']] == 2:
                report.add(split, 'image listed twice', info['img_path'])
            yield Checked(split, info['img_path'], None)
    for label, name in enumerate(dataset.metainfo.get('classes') or []):
        if counts and not counts[label]:
            report.add(split, 'class without objects', name)


def check_image(item: Checked) -> tuple[list[tuple[str, str]], str]:
    """Reads an image.

    Returns:
        Findings with their places, and a hash of the file, empty if there is none.
    """
    path, found = item.path, []
    try:
        content = Path(path).read_bytes()
    except OSError:
        return [('no such image', path)], ''
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
            turn = 1
            with suppress(Exception):  # a damaged EXIF entry is not a damaged image
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.load()
    except UnidentifiedImageError:
        return [('image cannot be read', path)], digest
    except Image.DecompressionBombError:
        return [('image is too large to be checked', path)], digest
    except Exception as error:  # Pillow's decoders raise errors of any type
        return [('image is cut off', f'{path}: {error}')], digest
    if turn in (5, 6, 7, 8):
        size = size[::-1]
    if turn != 1:
        found.append(('rotated by EXIF', path))
    if item.size and size != item.size:
        where = f'{path}: {size} and not {item.size}'
        found.append(('size differs from the annotations', where))
    if mode.startswith(('I', 'F')):
        found.append(('16-bit', path))
    if mode in ('1', 'L', 'LA', 'I', 'F') or mode.startswith('I;16'):
        found.append(('grey', path))
    if mode == 'CMYK':
        found.append(('CMYK', path))
    if mode in ('RGBA', 'LA', 'PA'):
        found.append(('transparent', path))
    return found, digest


def list_images(cfg: Config, split: str, report: Report) -> Iterator[Checked]:
    """Checks the annotations of a split and yields its images."""
    loader = cfg.get(f'{split}_dataloader')
    for node in dicts_in(loader):
        if 'type' not in node or 'pipeline' not in node:
            continue
        if str(node['type']).endswith('CocoDataset'):
            needs_masks = any(step.get('with_mask') for step in dicts_in(loader))
            yield from check_coco(node, split, needs_masks, report)
        else:
            dataset = deepcopy(node)
            dataset.pipeline = []
            if 'features' in dataset:  # of FewShotDataset, made from its images
                dataset.features = None
            yield from list_other(DATASETS.build(dataset), split, report)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        '--splits', nargs='+', choices=SPLITS, default=SPLITS, help='default: all'
    )
    parser.add_argument(
        '--out', type=Path, help='write all findings to this .json file'
    )
    parser.add_argument(
        '--no-images', action='store_true', help='check the annotations only'
    )
    parser.add_argument('--no-pictures', action=OldFlag, new='--no-images')
    args = parser.parse_args(argv)
    with user_errors(parser):
        if args.out and args.out.exists():
            raise ValueError(f'{args.out} exists and is left alone; choose another')
        cfg = load_config(args.config, args.cfg_options)
        splits = [s for s in args.splits if cfg.get(f'{s}_dataloader')]
        check_data(cfg, splits)
    init_default_scope(cfg.default_scope)

    report = Report()
    loaders = {split: cfg[f'{split}_dataloader'].dataset for split in splits}
    # Most configurations test on the validation set.
    splits = [
        split
        for i, split in enumerate(splits)
        if loaders[split] not in [loaders[other] for other in splits[:i]]
    ]
    with user_errors(parser):  # of data sets that look for their files themselves
        images = [p for split in splits for p in list_images(cfg, split, report)]
    if not args.no_images:
        check_images(images, report)

    console = Console()
    if report.found:
        console.print(report.table())
    errors, warned = report.severity(ERROR), report.severity(WARNING)
    print(
        f'{len(images)} images of {", ".join(splits)}: {errors} errors, '
        f'{warned} warnings.'
    )
    if args.out:
        findings = [
            dict(
                split=split, finding=finding, level=FINDINGS[finding][0], places=places
            )
            for (split, finding), places in report.found.items()
        ]
        write_atomic(args.out, json.dumps(findings, indent=2))
        print(f'All findings are in {args.out}.')
    if errors:
        sys.exit(1)


def check_images(images: list[Checked], report: Report) -> None:
    """Reads all images, with a bar."""
    first: dict[str, Checked] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(TextColumn('{task.description}'), *columns) as progress,
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool,
    ):
        warnings.simplefilter('ignore')  # of metadata, and of images that are big
        checked = pool.map(check_image, images)
        tracked = progress.track(checked, total=len(images), description='images')
        for image, (findings, digest) in zip(images, tracked, strict=True):
            for finding, where in findings:
                report.add(image.split, finding, where)
            other = first.setdefault(digest, image) if digest else image
            if other.path != image.path:
                same = other.split == image.split
                report.add(
                    image.split,
                    'same image under two names'
                    if same
                    else 'same image in another split',
                    f'{image.path} and {other.path}',
                )


if __name__ == '__main__':
    main()

"""Check the data that a configuration reads, in one pass.

Pictures: missing, unreadable or cut off, of another size than the annotations say, the
same twice (also in another split), rotated by EXIF, grey, 16-bit, CMYK, transparent.
Annotations in COCO's format: unknown ids, the same twice, boxes without area or outside
the picture, polygons of fewer than three points, missing masks, classes that are empty,
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
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import ExifTags, Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dsnet_mm.cli.arguments import add_config_arguments, user_errors
from dsnet_mm.cli.config import dicts_in, load_config
from dsnet_mm.cli.data import check_data
from dsnet_mm.files import write_atomic

SPLITS = ('train', 'val', 'test')
ERROR, WARNING, NOTE = 'error', 'warning', 'note'
# What was found -> how bad it is, and what mmdet and mmpretrain make of it.
FINDINGS = {
    'no such picture': (ERROR, 'training stops'),
    'picture cannot be read': (ERROR, 'training stops'),
    'picture is cut off': (ERROR, 'OpenCV fills the rest with grey, without a word'),
    'size differs from the annotations': (ERROR, 'boxes and masks are misplaced'),
    'annotations cannot be read': (ERROR, 'training does not start'),
    'unknown image_id': (ERROR, 'the annotation is left out'),
    'unknown category_id': (ERROR, 'the annotation is left out'),
    'id of a picture is not unique': (ERROR, 'one of the pictures is lost'),
    'id of an annotation is not unique': (ERROR, 'training does not start'),
    'bbox or area is missing or no number': (ERROR, 'training does not start'),
    'object without a mask': (ERROR, 'training stops'),
    'class of the configuration is not in the file': (ERROR, 'labels are shifted'),
    'classes in another order than in the file': (ERROR, 'names are mixed up'),
    'same picture in another split': (ERROR, 'the evaluation is too good'),
    'box of less than a pixel': (WARNING, 'the object is left out'),
    'box outside the picture': (WARNING, 'the object is left out'),
    'polygon of fewer than three points': (WARNING, 'it is left out'),
    'annotation twice': (WARNING, 'the object counts twice'),
    'picture listed twice': (WARNING, 'it is seen twice as often'),
    'same picture under two names': (WARNING, 'it is seen twice as often'),
    'class without objects': (WARNING, 'it cannot be learnt, or not be measured'),
    'class of the file is not in the configuration': (NOTE, 'it is left out'),
    'box reaches out of the picture': (NOTE, 'it is kept'),
    'picture without objects': (NOTE, 'it is left out if filter_empty_gt is set'),
    'rotated by EXIF': (NOTE, 'it is read upright'),
    'grey': (NOTE, 'it is read with three equal channels'),
    '16-bit': (NOTE, 'the upper 8 bits are read'),
    'CMYK': (NOTE, 'it is read as RGB'),
    'transparent': (NOTE, 'what lies under transparent pixels is read'),
}


class Picture(NamedTuple):
    """A picture of a split, and the size that the annotations give it."""

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
                places[0],
            )
        return table


def check_coco(
    node: dict, split: str, needs_masks: bool, report: Report
) -> Iterator[Picture]:
    """Checks an annotation file in COCO's format and yields its pictures.

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
        content = json.loads(Path(ann_file).read_bytes())
        images, annotations, categories = (
            content[key] for key in ('images', 'annotations', 'categories')
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.add(split, 'annotations cannot be read', f'{ann_file}: {error!r}')
        return

    sizes, names = {}, Counter()
    for image in images:
        if image['id'] in sizes:
            report.add(split, 'id of a picture is not unique', f'image {image["id"]}')
        size = (image.get('width'), image.get('height'))
        sizes[image['id']] = size if None not in size else None
        names[image['file_name']] += 1
        if names[image['file_name']] == 2:
            report.add(split, 'picture listed twice', image['file_name'])
        path = os.path.join(folder, image['file_name'])
        yield Picture(split, path, sizes[image['id']])

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
            report.add(split, 'picture without objects', image['file_name'])


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
            report.add(split, 'box outside the picture', where)
        # Some of COCO's own boxes go half a pixel beyond.
        elif min(left, top) < -1 or right > size[0] + 1 or bottom > size[1] + 1:
            report.add(split, 'box reaches out of the picture', where)


def _check_mask(mask: Any, split: str, where: str, report: Report) -> None:
    """Checks polygons. Run-length encodings only have to be there."""
    if not mask:
        report.add(split, 'object without a mask', where)
    elif isinstance(mask, list):
        for polygon in mask:
            if len(polygon) < 6 or len(polygon) % 2:
                report.add(
                    split,
                    'polygon of fewer than three points',
                    f'{where}: {len(polygon)} numbers',
                )


def list_other(dataset: Any, split: str, report: Report) -> Iterator[Picture]:
    """Yields the pictures of another data set, as it lists them itself."""
    counts, names = Counter(), Counter()
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        if 'gt_label' in info:
            counts[int(info['gt_label'])] += 1
        if 'img_path' in info:
            names[info['img_path']] += 1
            if names[info['img_path']] == 2:
                report.add(split, 'picture listed twice', info['img_path'])
            yield Picture(split, info['img_path'], None)
    for label, name in enumerate(dataset.metainfo.get('classes') or []):
        if counts and not counts[label]:
            report.add(split, 'class without objects', name)


def check_picture(picture: Picture) -> tuple[list[tuple[str, str]], str]:
    """Reads a picture.

    Returns:
        Findings with their places, and a hash of the file, empty if there is none.
    """
    path, found = picture.path, []
    try:
        content = Path(path).read_bytes()
    except OSError:
        return [('no such picture', path)], ''
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter('ignore')
            mode, size = image.mode, image.size
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.load()
    except UnidentifiedImageError:
        return [('picture cannot be read', path)], digest
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return [('picture is cut off', f'{path}: {error}')], digest
    if turn in (5, 6, 7, 8):
        size = size[::-1]
    if turn != 1:
        found.append(('rotated by EXIF', path))
    if picture.size and size != picture.size:
        where = f'{path}: {size} and not {picture.size}'
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


def list_pictures(cfg: Config, split: str, report: Report) -> Iterator[Picture]:
    """Checks the annotations of a split and yields its pictures."""
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
        '--no-pictures', action='store_true', help='check the annotations only'
    )
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
    pictures = [p for split in splits for p in list_pictures(cfg, split, report)]
    if not args.no_pictures:
        check_pictures(pictures, report)

    console = Console()
    if report.found:
        console.print(report.table())
    errors, warned = report.severity(ERROR), report.severity(WARNING)
    print(
        f'{len(pictures)} pictures of {", ".join(splits)}: {errors} errors, '
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


def check_pictures(pictures: list[Picture], report: Report) -> None:
    """Reads all pictures, with a bar."""
    first: dict[str, Picture] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(TextColumn('{task.description}'), *columns) as progress,
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool,
    ):
        checked = pool.map(check_picture, pictures)
        tracked = progress.track(checked, total=len(pictures), description='pictures')
        for picture, (findings, digest) in zip(pictures, tracked, strict=True):
            for finding, where in findings:
                report.add(picture.split, finding, where)
            other = first.setdefault(digest, picture) if digest else picture
            if other.path != picture.path:
                same = other.split == picture.split
                report.add(
                    picture.split,
                    'same picture under two names'
                    if same
                    else 'same picture in another split',
                    f'{picture.path} and {other.path}',
                )


if __name__ == '__main__':
    main()

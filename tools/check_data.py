"""Check the data that a configuration reads, in one pass.

Images: missing, unreadable or cut off, of another size than the annotations say, the
same twice (also in another split), rotated by EXIF, grey, 16-bit, CMYK, transparent.
Annotations in COCO's format: missing fields, unknown ids, the same twice, boxes without
area or outside the image, missing and damaged masks, classes that are empty, in another
order, more than the model has, or not in the configuration. The exit status is 1 if
there are errors.
"""

import argparse
import hashlib
import json
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
from PIL import ExifTags, Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsnet_mm.datasets.coco import read_coco
from dsnet_mm.datasets.images import damage_of
from dsnet_mm.engine.config import check_data, dicts_in, load_config, most_classes
from dsnet_mm.engine.launch import OldFlag, add_config_arguments, user_errors
from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

SPLITS = ('train', 'val', 'test')
ERROR, WARNING, NOTE = 'error', 'warning', 'note'
COLORS = {ERROR: 'red', WARNING: 'yellow', NOTE: 'default'}  # the worst first
# What was found -> how bad it is, and what mmdet and mmpretrain make of it.
FINDINGS = {
    'no such image': (ERROR, 'training stops'),
    'image cannot be read': (ERROR, 'training stops'),
    'image is cut off': (ERROR, 'OpenCV fills the rest with grey, without a word'),
    'size differs from the annotations': (ERROR, 'boxes and masks are misplaced'),
    'image is too large to be checked': (WARNING, 'it is read as it is'),
    'annotations cannot be read': (ERROR, 'training does not start'),
    'field is missing or of another type': (ERROR, 'training does not start'),
    'no image is left': (ERROR, 'training does not start'),
    'unknown image_id': (ERROR, 'the annotation is left out'),
    'unknown category_id': (ERROR, 'the annotation is left out'),
    'id of an image is not unique': (ERROR, 'one of the images is lost'),
    'id of an annotation is not unique': (ERROR, 'training does not start'),
    'bbox or area is missing or no number': (ERROR, 'training does not start'),
    'category is not unique': (ERROR, 'labels are shifted'),
    'object without a mask': (ERROR, 'training stops'),
    'mask is damaged': (ERROR, 'training stops, or the object is left out'),
    'more classes than the model has': (ERROR, 'training stops'),
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
# What damage_of tells -> finding.
DAMAGES = {
    'missing': 'no such image',
    'empty': 'image cannot be read',
    'unreadable': 'image cannot be read',
    'too large': 'image is too large to be checked',
    'cut off': 'image is cut off',
}
Found = dict[str, list[str]]
"""The places of each finding of a split. A place is text."""


class Listed(NamedTuple):
    """An image of a split, and the size that the annotations give it."""

    path: str
    size: tuple[int, int] | None = None


def check_coco(
    node: dict, needs_masks: bool, classes: float, found: Found
) -> Iterator[Listed]:
    """Checks an annotation file in COCO's format and yields its images.

    Args:
        node: Configuration of the data set.
        needs_masks: Whether the configuration loads masks.
        classes: Number of classes of the model.
        found: Gets the findings.
    """
    root = node.get('data_root') or ''
    ann_file = os.path.join(root, node['ann_file'])
    folder = os.path.join(root, (node.get('data_prefix') or {}).get('img', ''))
    try:
        lists, bad = read_coco(ann_file)
    except (OSError, ValueError) as error:
        found['annotations cannot be read'].append(str(error))
        return
    found['field is missing or of another type'] += bad
    images, annotations, categories = lists.values()

    sizes, names = {}, Counter()
    for image in images:
        if image['id'] in sizes:
            found['id of an image is not unique'].append(f'image {image["id"]}')
        sizes[image['id']] = image['width'], image['height']
        names[image['file_name']] += 1
        yield Listed(os.path.join(folder, image['file_name']), sizes[image['id']])
    found['image listed twice'] += [name for name in names if names[name] > 1]

    with DATASETS.switch_scope_and_registry(None) as registry:
        metainfo = registry.get(node['type'])._load_metainfo(node.get('metainfo'))
    in_file = {category['id']: category['name'] for category in categories}
    names = list(in_file.values())
    if len({*names}) < len(categories):
        where = ', '.join(f'{c["id"]}: {c["name"]}' for c in categories)
        found['category is not unique'].append(f'{where} in {ann_file}')
    used = metainfo.get('classes') or names
    if len(used) > classes:
        found['more classes than the model has'].append(f'{len(used)}, not {classes}')
    found['class of the configuration is not in the file'] += [
        f'{name!r} is not in {ann_file}' for name in used if name not in names
    ]
    found['class of the file is not in the configuration'] += [
        name for name in names if name not in used
    ]
    shared = [name for name in names if name in used]
    if shared != [name for name in used if name in shared]:
        where = f'{", ".join(shared)} in {ann_file}'
        found['classes in another order than in the file'].append(where)

    labelled, full, ids, seen = set(), set(), set(), set()
    for annotation in annotations:
        number, image, category, box = (
            annotation.get(key) for key in ('id', 'image_id', 'category_id', 'bbox')
        )
        where = f'annotation {number}'
        if number in ids:
            found['id of an annotation is not unique'].append(where)
        ids.add(number)
        if image not in sizes:
            found['unknown image_id'].append(f'{where}: {image}')
        elif category not in in_file:
            found['unknown category_id'].append(f'{where}: {category}')
        else:
            labelled.add(in_file[category])
            if in_file[category] in used:
                full.add(image)
            if (image, category, str(box)) in seen:
                found['annotation twice'].append(where)
            seen.add((image, category, str(box)))
            check_box(box, annotation.get('area'), sizes[image], where, found)
            if needs_masks:
                check_mask(annotation.get('segmentation'), sizes[image], where, found)
    found['class without objects'] += [n for n in shared if n not in labelled]
    found['image without objects'] += [
        image['file_name'] for image in images if image['id'] not in full
    ]
    filters = {} if node.get('test_mode') else node.get('filter_cfg') or {}
    if not any(
        (image in full or not filters.get('filter_empty_gt'))
        and min(size) >= filters.get('min_size', 0)
        for image, size in sizes.items()
    ):
        found['no image is left'].append(ann_file)


def are_numbers(values: list, most: float) -> bool:
    """Tells whether all values are numbers below a limit, so finite ones."""
    return all(isinstance(x, int | float) and abs(x) < most for x in values)


def check_box(
    box: Any, area: Any, size: tuple[int, int], where: str, found: Found
) -> None:
    """Checks a box of left, top, width and height, as ``CocoDataset`` does."""
    numbers = [*box, area] if isinstance(box, list) else []
    if len(numbers) != 5 or not are_numbers(numbers, 1e12):
        where = f'{where}: {box}, {area}'
        found['bbox or area is missing or no number'].append(where)
        return
    left, top, width, height = box
    if width < 1 or height < 1 or area <= 0:
        found['box of less than a pixel'].append(f'{where}: {box}, area {area}')
    else:
        right, bottom = left + width, top + height
        where = f'{where}: {box} in {size}'
        if left >= size[0] or top >= size[1] or right <= 0 or bottom <= 0:
            found['box outside the image'].append(where)
        # Some of COCO's own boxes go half a pixel beyond.
        elif min(left, top) < -1 or right > size[0] + 1 or bottom > size[1] + 1:
            found['box reaches out of the image'].append(where)


def check_mask(mask: Any, size: tuple[int, int], where: str, found: Found) -> None:
    """Checks polygons or a run-length code, as ``LoadAnnotations`` reads them."""
    polygons = mask if isinstance(mask, list) else []
    if not mask:
        found['object without a mask'].append(where)
    elif polygons != mask:
        if not is_code(mask, size):
            found['mask is damaged'].append(f'{where}: no run-length code of {size}')
    elif not all(isinstance(p, list) and are_numbers(p, 1e6) for p in polygons):
        found['mask is damaged'].append(f'{where}: no lists of numbers')
    for polygon in polygons:
        if isinstance(polygon, list) and (len(polygon) < 6 or len(polygon) % 2):
            numbers = f'{where}: {len(polygon)} numbers'
            found['polygon of fewer than three points'].append(numbers)


def is_code(mask: Any, size: tuple[int, int]) -> bool:
    """Tells whether a mask is a run-length code of an image of this size.

    pycocotools leaves the pixels after a code that is too short as they were in memory.
    So text is decoded here, as by its ``rleFrString``: digits of base 32, differences
    from the last but one run.
    """
    counts = mask.get('counts') if isinstance(mask, dict) else None
    if isinstance(counts, str):
        text, counts, value, shift = counts, [], 0, 0
        for digit in (ord(char) - 48 for char in text):
            if not 0 <= digit < 64:
                return False
            value |= (digit & 31) << shift
            shift += 5
            if digit < 32:
                value -= (digit >> 4) << shift  # the sign
                counts.append(value + (counts[-2] if len(counts) > 2 else 0))
                value = shift = 0
        if shift:
            return False
    width, height = size
    return (
        isinstance(counts, list)
        and all(type(count) is int and count >= 0 for count in counts)
        and sum(counts) == width * height
        and mask.get('size') == [height, width]
        and all(type(length) is int for length in mask['size'])
    )


def list_other(dataset: Any, classes: float, found: Found) -> Iterator[Listed]:
    """Yields the images of another data set, as it lists them itself."""
    labels, names = set(), Counter()
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        if 'gt_label' in info:
            labels.add(int(info['gt_label']))
        if 'img_path' in info:
            names[info['img_path']] += 1
            yield Listed(info['img_path'])
    found['image listed twice'] += [name for name in names if names[name] > 1]
    if max(labels, default=0) >= classes:
        where = f'label {max(labels)}, and {classes} classes'
        found['more classes than the model has'].append(where)
    for label, name in enumerate(dataset.metainfo.get('classes') or []):
        if labels and label not in labels:
            found['class without objects'].append(name)


def list_images(cfg: Config, split: str, found: Found) -> Iterator[Listed]:
    """Checks the annotations of a split and yields its images."""
    loader = cfg[f'{split}_dataloader']
    for node in dicts_in(loader):
        if 'type' not in node or 'pipeline' not in node:
            continue
        if str(node['type']).endswith('CocoDataset'):
            needs_masks = any(step.get('with_mask') for step in dicts_in(loader))
            yield from check_coco(node, needs_masks, most_classes(cfg), found)
        else:
            dataset = deepcopy(node)
            dataset.pipeline = []
            if 'features' in dataset:  # of FewShotDataset, made from its images
                dataset.features = None
            yield from list_other(DATASETS.build(dataset), most_classes(cfg), found)


def check_image(item: Listed) -> tuple[list[tuple[str, str]], str]:
    """Reads an image.

    Returns:
        Findings with their places, and a hash of the file, empty if there is none.
    """
    path = item.path
    damage, error = damage_of(path) or ('', '')
    digest = ''
    with suppress(OSError, ValueError):  # of a name with a zero byte
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    if damage:
        where = f'{path}: {error}' if damage == 'cut off' else path
        return [(DAMAGES[damage], where)], digest
    with Image.open(path) as image:
        mode, size, turn = image.mode, image.size, 1
        with suppress(Exception):  # a damaged EXIF entry is not a damaged image
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn in (5, 6, 7, 8):
        size = size[::-1]
    found = []
    if item.size and size != item.size:
        where = f'{path}: {size} and not {item.size}'
        found.append(('size differs from the annotations', where))
    kinds = {
        'rotated by EXIF': turn != 1,
        '16-bit': mode.startswith(('I', 'F')),
        'grey': mode in ('1', 'L', 'LA') or mode.startswith(('I', 'F')),
        'CMYK': mode == 'CMYK',
        'transparent': mode in ('RGBA', 'LA', 'PA'),
    }
    return found + [(kind, path) for kind, is_so in kinds.items() if is_so], digest


def check_images(images: dict[str, list[Listed]], found: dict[str, Found]) -> None:
    """Reads all images, with a bar.

    Args:
        images: The images of each split.
        found: Gets the findings of each split.
    """
    first: dict[str, tuple[str, str]] = {}
    pairs = [(split, item) for split, items in images.items() for item in items]
    with (
        progress_bar(len(pairs), 'reading', 'images') as bar,
        warnings.catch_warnings(),
        ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool,
    ):
        warnings.simplefilter('ignore')  # of metadata, and of images that are big
        checked = pool.map(check_image, [item for _, item in pairs])
        for (split, item), (findings, digest) in zip(pairs, checked, strict=True):
            bar.update()
            for finding, where in findings:
                found[split][finding].append(where)
            here = split, item.path
            other = first.setdefault(digest, here) if digest else here
            if other[1] != item.path:
                same = 'under two names' if other[0] == split else 'in another split'
                where = f'{item.path} and {other[1]}'
                found[split][f'same image {same}'].append(where)


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
        datasets = {}  # most configurations test on the validation set
        for split in splits:
            if cfg[f'{split}_dataloader'].dataset not in datasets.values():
                datasets[split] = cfg[f'{split}_dataloader'].dataset
        found: dict[str, Found] = {split: defaultdict(list) for split in datasets}
        # Some data sets look for their files themselves.
        images = {s: list(list_images(cfg, s, found[s])) for s in datasets}
    if not args.no_images:
        check_images(images, found)

    findings = [
        dict(split=split, finding=finding, level=FINDINGS[finding][0], places=places)
        for split in found
        for finding, places in found[split].items()
        if places
    ]
    findings.sort(key=lambda entry: list(COLORS).index(entry['level']))
    if findings:
        table = Table('', 'split', 'finding', 'times', 'then')
        table.add_column('for example', overflow='fold')
        for entry in findings:
            level, effect = FINDINGS[entry['finding']]
            table.add_row(
                f'[{COLORS[level]}]{level}[/]',
                entry['split'],
                entry['finding'],
                str(len(entry['places'])),
                effect,
                # A name that is not UTF-8 cannot be printed.
                escape(entry['places'][0].encode('utf-8', 'replace').decode()),
            )
        Console().print(table)
    errors, warned = (
        sum(len(entry['places']) for entry in findings if entry['level'] == level)
        for level in (ERROR, WARNING)
    )
    print(
        f'{sum(map(len, images.values()))} images of {", ".join(images)}: {errors} '
        f'errors, {warned} warnings.'
    )
    if args.out:
        write_atomic(args.out, json.dumps(findings, indent=2))
        print(f'All findings are in {args.out}.')
    if errors:
        sys.exit(1)


if __name__ == '__main__':
    main()

"""Draw few-shot subsets of annotations in COCO's format.

python tools/dataset_converters/few_shot_coco.py data/nuclei/annotations/few_shot \
    --source data/nuclei/annotations/instances_train_stained.json train \
    --source data/nuclei/annotations/instances_val_stained.json val \
    --images 1 2 5 10 --draws 5

It writes into the first folder:

    5images_draw0.json   5 images of each class, with all their objects
    5boxes_draw0.json    with --boxes instead: images with 5 objects of each class, and
                         only these objects, as in TFA (arXiv 2003.06957)
    drawn.json           all images of all draws
    rest.json            all others, for tests
    base.json            with --novel: the first source without objects of new classes
    rest_base.json       with --novel: rest.json with objects of the other classes,
    rest_novel.json      and of the new ones, for base and novel AP

Draws are made from the first source. With --novel the tests are the other sources: the
detector has seen all of the first one. A draw contains those of the same number with
fewer images. File names begin with the folder of their source. The classes of --novel
come last, so labels of the others stay.
"""

import argparse
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dsnet_mm.datasets.coco import read_coco
from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import check_file, check_new, write_atomic

Content = dict[str, list[dict[str, Any]]]


def merge(sources: Sequence[tuple[str, str]], novel: Collection[str]) -> Content:
    """Merges annotation files, with new numbers.

    Args:
        sources: Annotation files and the folders of their images.
        novel: Names of the classes that come last.

    Returns:
        The content of a file. Images have the number of their ``source``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is not in COCO's format, their classes differ, or classes
            are not as ``novel`` needs them.
    """
    merged: Content = dict(images=[], annotations=[], categories=[])
    for source, (path, folder) in enumerate(sources):
        check_file(path, 'annotation file', 'give one in the format of COCO')
        content, wrong = read_coco(path)
        if wrong:
            raise ValueError(f'{path} is not as COCO files are: {wrong[0]}')
        if source and content['categories'] != merged['categories']:
            raise ValueError(f'{path} has other classes than {sources[0][0]}')
        merged['categories'] = content['categories']
        numbers = {}
        for image in content['images']:
            numbers[image['id']] = number = len(merged['images']) + 1
            name = f'{folder.rstrip("/")}/{image["file_name"]}'
            image |= dict(id=number, file_name=name, source=source)
            merged['images'].append(image)
        for annotation in content['annotations']:
            # Those of other images are left out, as mmdet does.
            if (number := numbers.get(annotation['image_id'])) is not None:
                annotation |= dict(id=len(merged['annotations']) + 1, image_id=number)
                merged['annotations'].append(annotation)
    names = [category['name'] for category in merged['categories']]
    if len({*names}) < len(names):
        raise ValueError(f'two of the classes have the same name: {names}')
    if not {*novel} < {*names}:
        raise ValueError(f'novel classes are some of {names}, not all, got {novel}')
    merged['categories'].sort(key=lambda category: category['name'] in novel)
    return merged


def draw(
    content: Content, shots: Sequence[int], seed: int, boxes: bool
) -> dict[int, set[int]]:
    """Draws images, or boxes of images, of each class.

    Args:
        content: Content of an annotation file.
        shots: Numbers of images or boxes.
        seed: Number of the draw.
        boxes: Whether they are boxes. An image is then taken if its boxes of the class
            are not too many.

    Returns:
        The numbers of the annotations by number of images or boxes.

    Raises:
        ValueError: If a class has too few.
    """
    drawable = {image['id'] for image in content['images'] if image['source'] == 0}
    drawn: dict[int, set[int]] = {number: set() for number in sorted(shots)}
    for category in content['categories']:
        found: dict[int, list[int]] = {}
        for a in content['annotations']:
            if a['category_id'] == category['id'] and not a.get('iscrowd'):
                found.setdefault(a['image_id'], []).append(a['id'])
        images = sorted(found.keys() & drawable)
        random.Random(f'{seed} {category["name"]}').shuffle(images)
        kept, have = [], 0
        for number in drawn:
            for image in images:
                more = len(found[image]) if boxes else 1
                if image not in kept and have + more <= number:
                    kept.append(image)
                    have += more
            if have < number:
                what = 'boxes in whole images' if boxes else 'images'
                raise ValueError(
                    f'the class {category["name"]!r} has no {number} {what}: draw '
                    f'{seed} found {have}, in {len(images)} images; ask for fewer'
                )
            drawn[number] |= {a for image in kept for a in found[image]}
    return drawn


def convert(
    sources: Sequence[tuple[str, str]],
    shots: Sequence[int],
    draws: int,
    boxes: bool,
    novel: Collection[str],
) -> dict[str, Content]:
    """Makes all files.

    Args:
        sources: See :func:`merge`.
        shots: See :func:`draw`.
        draws: Number of draws, with the numbers 0, 1 and so on.
        boxes: See :func:`draw`.
        novel: See :func:`merge`.

    Returns:
        Contents by the name of the file.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If a number is not positive, or as :func:`merge` and :func:`draw`.
    """
    if draws < 1 or min(shots) < 1:
        raise ValueError(f'numbers are at least 1, got {[*shots]} and {draws} draws')
    content = merge(sources, novel)
    annotations = content['annotations']
    last = {c['id'] for c in content['categories'] if c['name'] in novel}
    every, drawn, files = {image['id'] for image in content['images']}, set(), {}

    def part(images: set[int], kept: Sequence[dict] = annotations) -> Content:
        return content | dict(
            images=[image for image in content['images'] if image['id'] in images],
            annotations=[a for a in kept if a['image_id'] in images],
        )

    for seed in range(draws):
        for number, chosen in draw(content, shots, seed, boxes).items():
            kept = [a for a in annotations if a['id'] in chosen]
            images = {a['image_id'] for a in kept}
            drawn |= images
            name = f'{number}{"boxes" if boxes else "images"}_draw{seed}'
            files[name] = part(images, kept if boxes else annotations)
    first = {image['id'] for image in content['images'] if image['source'] == 0}
    rest = every - (first if novel else drawn)
    files |= dict(drawn=part(drawn), rest=part(rest))
    if novel:
        new = [a for a in annotations if a['category_id'] in last]
        others = [a for a in annotations if a['category_id'] not in last]
        files |= dict(base=part(first, others))
        files |= dict(rest_base=part(rest, others), rest_novel=part(rest, new))
    return files


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path, help='folder of the annotation files')
    parser.add_argument(
        '--source',
        nargs=2,
        action='append',
        required=True,
        metavar=('FILE', 'FOLDER'),
        help='annotation file, and the folder of its images below the data root',
    )
    shots = parser.add_mutually_exclusive_group(required=True)
    shots.add_argument('--images', nargs='+', type=int, help='images of each class')
    shots.add_argument('--boxes', nargs='+', type=int, help='boxes of each class')
    parser.add_argument('--draws', type=int, default=5, help='draws (default: 5)')
    parser.add_argument('--novel', nargs='+', default=[], help='names of new classes')
    parser.add_argument('--overwrite', action='store_true', help='replace files')
    args = parser.parse_args(argv)
    with user_errors(parser):
        boxes, shots = args.boxes is not None, args.images or args.boxes
        files = convert(args.source, shots, args.draws, boxes, args.novel)
        for name in files if not args.overwrite else ():
            check_new(args.out / f'{name}.json')
        for name, content in files.items():
            write_atomic(args.out / f'{name}.json', json.dumps(content))
            images, objects = len(content['images']), len(content['annotations'])
            print(f'{name}.json: {images} images, {objects} objects')


if __name__ == '__main__':
    main()

"""Draw few-shot subsets of annotations in COCO's format.

python tools/dataset_converters/few_shot_coco.py data/nuclei/annotations/few_shot \
    --source data/nuclei/annotations/instances_train_stained.json train \
    --source data/nuclei/annotations/instances_val_stained.json val \
    --images 1 2 5 10 --draws 5

It writes into the first folder, for 5 images and draw 0:

    5images_draw0.json   5 images of each class, with all their objects
    5boxes_draw0.json    with --boxes instead: images with 5 objects of each class, and
                         only these objects, as in TFA (arXiv 2003.06957)
    drawn.json           all images of all draws
    rest.json            all others, for tests
    base.json            with --novel: all images, with objects of the other classes

A draw contains those with fewer images of the same number. Draws are made from the
first source. File names begin with the folder of their source. The classes of --novel
come last, so labels of the others stay.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsnet_mm.datasets.coco import read_coco
from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import check_file, check_new, write_atomic

Content = dict[str, list[dict[str, Any]]]


def merge(sources: Sequence[tuple[str, str]], novel: Sequence[str]) -> Content:
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
            merged['images'].append(
                {**image, 'id': number, 'file_name': name, 'source': source}
            )
        for annotation in content['annotations']:
            number, image = len(merged['annotations']) + 1, annotation['image_id']
            if image not in numbers:
                raise ValueError(f'{path} has no image {image}, which has an object')
            merged['annotations'].append(
                {**annotation, 'id': number, 'image_id': numbers[image]}
            )
    names = [category['name'] for category in merged['categories']]
    if len({*names}) < len(names):
        raise ValueError(f'two of the classes have the same name: {names}')
    if unknown := {*novel} - {*names}:
        raise ValueError(f'there is no class {sorted(unknown)}; there are {names}')
    if novel and {*novel} == {*names}:
        raise ValueError(f'all classes are novel: {names}; leave base classes')
    merged['categories'].sort(key=lambda category: category['name'] in novel)
    return merged


def draw(content: Content, shots: Sequence[int], seed: int, boxes: bool) -> list[set]:
    """Draws images, or boxes of images, of each class.

    Args:
        content: Content of an annotation file.
        shots: Numbers of images or boxes.
        seed: Number of the draw.
        boxes: Whether they are boxes. An image is then taken if its boxes of the class
            are not too many.

    Returns:
        The numbers of the annotations for each of ``shots``.

    Raises:
        ValueError: If a class has too few.
    """
    drawable = {image['id'] for image in content['images'] if image['source'] == 0}
    drawn: list[set] = [set() for _ in shots]
    for category in content['categories']:
        found: dict[int, list[int]] = defaultdict(list)
        for a in content['annotations']:
            crowd = a.get('iscrowd') or a['image_id'] not in drawable
            if a['category_id'] == category['id'] and not crowd:
                found[a['image_id']].append(a['id'])
        what, name = ('boxes' if boxes else 'images'), category['name']
        if not found:
            raise ValueError(f'the class {name!r} has no boxes; leave it out')
        images = sorted(found)
        random.Random(f'{seed} {name}').shuffle(images)
        kept: list[int] = []
        for number in sorted({*shots}):
            for image in [i for i in images if i not in kept]:
                have = sum(len(found[i]) for i in kept) if boxes else len(kept)
                if have + (len(found[image]) if boxes else 1) <= number:
                    kept.append(image)
            have = sum(len(found[i]) for i in kept) if boxes else len(kept)
            if have < number:
                raise ValueError(
                    f'the class {name!r} has no {number} {what} in whole images (draw '
                    f'{seed} has {have} of {sum(map(len, found.values()))} boxes in '
                    f'{len(found)} images); ask for fewer'
                )
            for i, wanted in enumerate(shots):
                if wanted == number:
                    drawn[i] |= {a for image in kept for a in found[image]}
    return drawn


def convert(
    sources: Sequence[tuple[str, str]],
    shots: Sequence[int],
    draws: int,
    boxes: bool,
    novel: Sequence[str],
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
    annotations, files, every = content['annotations'], {}, set()

    def part(images: set[int], kept: Sequence[dict]) -> Content:
        return {
            'images': [image for image in content['images'] if image['id'] in images],
            'annotations': [a for a in kept if a['image_id'] in images],
            'categories': content['categories'],
        }

    for seed in range(draws):
        for number, chosen in zip(
            shots, draw(content, shots, seed, boxes), strict=True
        ):
            drawn = [a for a in annotations if a['id'] in chosen]
            images = {a['image_id'] for a in drawn}
            every |= images
            name = f'{number}{"boxes" if boxes else "images"}_draw{seed}'
            files[name] = part(images, drawn if boxes else annotations)
    files['drawn'] = part(every, annotations)
    files['rest'] = part({i['id'] for i in content['images']} - every, annotations)
    if novel:
        last = {c['id'] for c in content['categories'] if c['name'] in novel}
        base = [a for a in annotations if a['category_id'] not in last]
        files['base'] = part({image['id'] for image in content['images']}, base)
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
        files = convert(
            args.source,
            args.images or args.boxes,
            args.draws,
            args.boxes is not None,
            args.novel,
        )
        paths = {args.out / f'{name}.json': content for name, content in files.items()}
        for path in paths if not args.overwrite else ():
            check_new(path)
        for path, content in paths.items():
            write_atomic(path, json.dumps(content))
    for path, content in paths.items():
        images, objects = len(content['images']), len(content['annotations'])
        print(f'{path.name}: {images} images, {objects} objects')


if __name__ == '__main__':
    main()

"""Split the annotations of the nuclei by stain.

python tools/dataset_converters/nuclei_by_stain.py data/nuclei

Beside each annotations/instances_SPLIT.json it writes instances_SPLIT_fluorescence.json
and instances_SPLIT_stained.json. An image is stained, with colours on a bright ground,
if the largest minus the smallest of its red, green and blue is above 5 on average.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import check_new, write_atomic


def is_stained(path: Path) -> bool:
    """Tells whether an image shows stained tissue, not fluorescence."""
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f'{path} cannot be read as an image; convert the set again')
    return bool(np.ptp(image, axis=2).mean() > 5)


def split(root: Path, overwrite: bool) -> dict[str, int]:
    """Writes the annotation files of each stain.

    Args:
        root: Folder of the nuclei, as nuclei_to_coco.py writes it.
        overwrite: Whether to replace files.

    Returns:
        The number of images in each file.

    Raises:
        FileExistsError: If a file exists and ``overwrite`` is False.
        FileNotFoundError: If there are no annotations.
        ValueError: If an image is missing or cannot be read.
    """
    folder, counts = root / 'annotations', {}
    sources = [folder / f'instances_{split}.json' for split in ('train', 'val', 'test')]
    sources = [path for path in sources if path.is_file()]
    if not sources:
        raise FileNotFoundError(
            f'{folder} holds no instances_train.json; give the folder that '
            f'nuclei_to_coco.py has written'
        )
    for source in sources:
        content = json.loads(source.read_text())
        images = root / source.stem.removeprefix('instances_')
        stained = {
            image['id']: is_stained(images / image['file_name'])
            for image in content['images']
        }
        for name, wanted in (('fluorescence', False), ('stained', True)):
            path = folder / f'{source.stem}_{name}.json'
            if not overwrite:
                check_new(path)
            kept = {number for number in stained if stained[number] == wanted}
            part = {
                **content,
                'images': [i for i in content['images'] if i['id'] in kept],
                'annotations': [
                    a for a in content['annotations'] if a['image_id'] in kept
                ],
            }
            write_atomic(path, json.dumps(part))
            counts[path.name] = len(kept)
    return counts


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('root', type=Path, help='folder of the nuclei')
    parser.add_argument('--overwrite', action='store_true', help='replace files')
    args = parser.parse_args(argv)
    with user_errors(parser):
        counts = split(args.root, args.overwrite)
    for name, images in counts.items():
        print(f'{name}: {images} images')


if __name__ == '__main__':
    main()

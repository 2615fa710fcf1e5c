"""Write CIFAR-10 as folders of images, with lists for training and selection.

python tools/dataset_converters/cifar10_to_folders.py cifar10.zip data/cifar10
python tools/dataset_converters/cifar10_to_folders.py FOLDER data/cifar10

The source is an archive of images, train/CLASS/*.jpg and test/CLASS/*.jpg, or the
folder that holds the official cifar-10-batches-py. A tenth of the training images is
left out of training: train.txt has 45,000 of them, val.txt 5,000, test.txt 10,000.
"""

import argparse
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from rich.progress import track

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import replacing

SUFFIXES = ('.jpg', '.png')


def archived(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yields split, class, file name and content of the images in an archive.

    Raises:
        ValueError: If it is no archive, or holds other things than the splits.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f'{path} is no zip archive')
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith(SUFFIXES)]
        for name in track(sorted(names), 'images'):
            parts = PurePosixPath(name).parts
            if len(parts) < 3 or parts[-3] not in ('train', 'test'):
                raise ValueError(
                    f'{path} holds {name}; train/CLASS/IMAGE and test/CLASS/IMAGE '
                    f'are expected'
                )
            yield *parts[-3:], archive.read(name)


def official(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yields split, class, file name and content of the official images.

    Raises:
        FileNotFoundError: If the folder does not hold them.
    """
    from torchvision.datasets import CIFAR10

    for split in ('train', 'test'):
        try:
            images = CIFAR10(str(folder), train=split == 'train')
        except RuntimeError as error:
            raise FileNotFoundError(
                f'{folder} does not hold cifar-10-batches-py as published; unpack '
                f'cifar-10-python.tar.gz there'
            ) from error
        for i, (image, label) in enumerate(track(images, split)):
            _, png = cv2.imencode('.png', np.asarray(image)[..., ::-1])
            yield split, images.classes[label], f'{i:05}.png', png.tobytes()


def convert(source: Path, out: Path) -> dict[str, int]:
    """Writes the images and the lists.

    The folder appears only when it is complete.

    Args:
        source: Archive of images, or folder of the official files.
        out: Folder to make.

    Returns:
        The number of images in each list.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If the source does not exist.
        ValueError: If it is something else.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists and is left alone; choose another folder')
    if not source.exists():
        raise FileNotFoundError(f'there is no {source}')
    images = official(source) if source.is_dir() else archived(source)
    found: dict[str, dict[str, list[str]]] = {'train': {}, 'test': {}}
    with replacing(out.resolve()) as fresh:
        for split, kind, name, content in images:
            path = fresh / split / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            found[split].setdefault(kind, []).append(f'{kind}/{name}')
        if not found['train'] or found['train'].keys() != found['test'].keys():
            raise ValueError(
                f'{source} does not hold the same classes in train and test: '
                f'{sorted(found["train"])}, {sorted(found["test"])}'
            )
        lists: dict[str, list[str]] = {'train': [], 'val': [], 'test': []}
        for label, kind in enumerate(sorted(found['train'])):
            for i, name in enumerate(sorted(found['train'][kind])):
                lists['train' if i % 10 else 'val'].append(f'{name} {label}')
            lists['test'] += [f'{name} {label}' for name in sorted(found['test'][kind])]
        for name, lines in lists.items():
            (fresh / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return {name: len(lines) for name, lines in lists.items()}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path, help='archive or folder')
    parser.add_argument('out', type=Path, help='folder to make')
    args = parser.parse_args(argv)
    with user_errors(parser):
        counts = convert(args.source, args.out)
    print(', '.join(f'{name}: {count} images' for name, count in counts.items()))


if __name__ == '__main__':
    main()

"""Write CIFAR-10 as folders of images, with lists for training and selection.

python tools/dataset_converters/cifar10_to_folders.py cifar10.zip data/cifar10
python tools/dataset_converters/cifar10_to_folders.py FOLDER data/cifar10

The source is an archive of images, train/CLASS/*.jpg and test/CLASS/*.jpg, or the
folder that holds the official cifar-10-batches-py. A tenth of the training images is
left out of training: train.txt has 45,000 of them, val.txt 5,000, test.txt 10,000.
"""

import argparse
import re
import zipfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.files import replacing

IMAGE = re.compile(r'(?:.*/)?(train|test)/([\w-]{1,60})/([\w-]{1,60}\.(?:jpg|png))')
"""Names of images in an archive, without ``..`` and blanks."""

MOST_BYTES, MOST_OF_IMAGE = 2**30, 2**20
"""Limits of the unpacked images, and of one of them. CIFAR-10 has 60,000 of 3 kB."""


def archived(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yields split, class, file name and content of the images in an archive.

    Raises:
        ValueError: If it is no archive, is damaged, or holds other things than the
            splits, or more than ``MOST_BYTES``.
    """
    try:
        yield from _members(path)
    except Exception as error:  # zipfile and zlib raise errors of any type
        reason = str(error) or type(error).__name__
        raise ValueError(f'{path} cannot be read as a zip archive: {reason}') from error


def _members(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        found: dict[tuple[str, ...], zipfile.ZipInfo] = {}
        total = 0
        for member in archive.infolist():
            if not member.filename.endswith(('.jpg', '.png')):
                with archive.open(member):  # fails if the name is damaged
                    continue
            match = IMAGE.fullmatch(member.filename)
            if not match or match.groups() in found:
                raise ValueError(
                    f'it holds {member.filename!r}{" twice" if match else ""}; images '
                    f'train/CLASS/NAME.png or .jpg and test/CLASS/NAME.png are expected'
                )
            total += member.file_size
            if member.file_size > MOST_OF_IMAGE or total > MOST_BYTES:
                raise ValueError(
                    f'{member.filename} has {member.file_size} bytes, and all images '
                    f'up to it {total}; at most {MOST_OF_IMAGE} and {MOST_BYTES} are '
                    f'read'
                )
            # The size of a member of other methods is not limited while it is read.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f'{member.filename} is compressed by another method than deflate'
                )
            found[match.groups()] = member
        for place, member in track(sorted(found.items(), key=itemgetter(0)), 'images'):
            with archive.open(member) as file:
                # It ends at the size that the archive declares, and with a checksum.
                yield *place, file.read(MOST_OF_IMAGE + 1)


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

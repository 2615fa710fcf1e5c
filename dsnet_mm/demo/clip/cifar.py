"""CIFAR-10 instead of drawn pictures: six classes for the pre-training, four held out.

Both functions read a ZIP file with ``cifar10/{train,test}/class_name/*.jpg``.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dsnet_mm.demo.folders import replacing

from .pretraining import SIZE, Batch

CIFAR_HELD_OUT = ('frog', 'horse', 'ship', 'truck')
"""The last four classes. The first six train the model."""

CAPTIONS = ('a photo of a {}.', 'a picture of a {}.', 'a small {}.', 'a {}.')


def cifar_pairs(
    archive: str | Path, batch_size: int = 64, seed: int = 0
) -> Iterator[Batch]:
    """Shifts, flips and captions pictures of the first six classes, without end.

    Args:
        archive: The ZIP file.
        batch_size: Pictures of a batch.
        seed: Seed of the order, the shifts and the captions.

    Yields:
        Batches, see ``Batch``.

    Raises:
        ValueError: If there are no such pictures in the file.
    """
    rng = np.random.default_rng([seed, 4])
    images, names = [], []
    with ZipFile(archive) as file:
        for name, member in _members(file, 'train'):
            if name not in CIFAR_HELD_OUT:
                image = Image.open(BytesIO(file.read(member))).convert('RGB')
                images.append(np.asarray(image))
                names.append(name)
    images = np.pad(np.stack(images), ((0, 0), (4, 4), (4, 4), (0, 0)), 'reflect')
    while True:
        chosen = rng.integers(len(images), size=batch_size)
        batch = []
        for index in chosen:
            y, x = rng.integers(9, size=2)
            crop = images[index, y : y + 32, x : x + 32]
            batch.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        tensor = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float()
        tensor = F.interpolate(tensor, size=SIZE, mode='bicubic', antialias=True)
        yield (
            tensor.clamp(0, 255),
            [CAPTIONS[rng.integers(len(CAPTIONS))].format(names[i]) for i in chosen],
        )


def write_cifar(
    out: str | Path, archive: str | Path, train: int = 100, test: int = 500
) -> None:
    """Writes the held-out classes as ``{train,val,test}/class_name/*.jpg``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        archive: The ZIP file.
        train: Pictures of each class from the training part. One fifth of them is
            for validation.
        test: Pictures of each class from the test part.

    Raises:
        ValueError: If there are no such pictures in the file.
    """
    out = Path(out)
    if out.exists():
        return
    with ZipFile(archive) as file, replacing(out) as fresh:
        for part, count in (('train', train), ('test', test)):
            pictures = _members(file, part)
            for label in CIFAR_HELD_OUT:
                members = sorted(member for name, member in pictures if name == label)
                for i, member in enumerate(members[:count]):
                    is_val = part == 'train' and i >= count - count // 5
                    folder = fresh / ('val' if is_val else part) / label
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / Path(member).name).write_bytes(file.read(member))


def _members(file: ZipFile, part: str) -> list[tuple[str, str]]:
    """Returns the class and the path of each picture of a part, in the file's order."""
    paths = [member.split('/') for member in file.namelist()]
    members = [
        (path[2], '/'.join(path))
        for path in paths
        if len(path) == 4 and path[:2] == ['cifar10', part] and path[3]
    ]
    if not members:
        raise ValueError(
            f'{file.filename} has no pictures cifar10/{part}/class_name/*.jpg; its '
            f'paths start like {next(iter(file.namelist()), "nothing")!r}.'
        )
    return members

"""Trains a small CLIP without a download, then runs all few-shot methods on it.

Images and captions are drawn. The classes of the few-shot task have textures and shapes
that the model has never seen. With --cifar10, six classes of CIFAR-10 train the model,
and the other four are the task.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.demo.scenes import draw_scene
from dsnet_mm.demo.tiny_clip import (
    FOLDER,
    HELD_OUT,
    SIZE,
    STEPS,
    Batch,
    pretrain,
    random_scene,
    scene_pairs,
)
from dsnet_mm.few_shot import FewShotConfig, run
from dsnet_mm.few_shot.report import write_report
from dsnet_mm.files import replacing

METHODS = (
    *('linear_probe', 'linear_probe_zs', 'clap', 'lp++', 'gda', 'proker'),
    *('coop', 'task_res', 'tip_adapter', 'tip_adapter_f'),
    *('clip_adapter', 'clip_adapter_learnt', 'clip_adapter_text', 'clip_adapter_both'),
    *('clip_adapter_paper', 'clip_adapter_released'),
)

CIFAR_HELD_OUT = ('frog', 'horse', 'ship', 'truck')
CIFAR_CAPTIONS = ('a photo of a {}.', 'a picture of a {}.', 'a small {}.', 'a {}.')


def write_task(out: Path, train: int = 24, val: int = 8, test: int = 60) -> None:
    """Writes the drawn task as ``{train,val,test}/class_name/*.png``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        train: Training images of each class.
        val: Validation images of each class.
        test: Test images of each class.
    """
    if out.exists():
        return
    with replacing(out) as fresh:
        for part, count in enumerate((train, val, test)):
            for label, name in enumerate(HELD_OUT):
                folder = fresh / ('train', 'val', 'test')[part] / name.replace(' ', '_')
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([0, part, label, i])
                    image, _ = draw_scene([random_scene(rng, name)[0]], SIZE, rng)
                    Image.fromarray(image).save(folder / f'{i:03d}.png')


def cifar_members(file: ZipFile, part: str) -> list[tuple[str, str]]:
    """Returns the class and the path of each image of a part, in the file's order.

    Raises:
        ValueError: If there are none.
    """
    pattern = re.compile(rf'cifar10/{part}/([^/]+)/[^/]+')
    found = [match for name in file.namelist() if (match := pattern.fullmatch(name))]
    if not found:
        raise ValueError(
            f'{file.filename} has no images cifar10/{part}/class_name/*.jpg; its '
            f'paths start like {next(iter(file.namelist()), "nothing")!r}.'
        )
    return [(match[1], match[0]) for match in found]


def cifar_pairs(archive: Path, batch_size: int = 64) -> Iterator[Batch]:
    """Shifts, flips and captions images of the first six classes, without end.

    Raises:
        ValueError: If there are no such images in the archive.
    """
    rng = np.random.default_rng([0, 4])
    with ZipFile(archive) as file:
        members = [
            m for m in cifar_members(file, 'train') if m[0] not in CIFAR_HELD_OUT
        ]
        images = [Image.open(BytesIO(file.read(m))).convert('RGB') for _, m in members]
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
        captions = [
            CIFAR_CAPTIONS[rng.integers(len(CIFAR_CAPTIONS))].format(members[i][0])
            for i in chosen
        ]
        yield tensor.clamp(0, 255), captions


def write_cifar(out: Path, archive: Path, train: int = 100, test: int = 500) -> None:
    """Writes the held-out classes as ``{train,val,test}/class_name/*.jpg``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        archive: The ZIP file.
        train: Images of each class from the training part. One fifth of them is for
            validation.
        test: Images of each class from the test part.

    Raises:
        ValueError: If there are no such images in the archive.
    """
    if out.exists():
        return
    with ZipFile(archive) as file, replacing(out) as fresh:
        for part, count in (('train', train), ('test', test)):
            members = sorted(cifar_members(file, part))
            for label in CIFAR_HELD_OUT:
                paths = [path for name, path in members if name == label]
                for i, path in enumerate(paths[:count]):
                    is_val = part == 'train' and i >= count - count // 5
                    folder = fresh / ('val' if is_val else part) / label
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / Path(path).name).write_bytes(file.read(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=FOLDER)
    parser.add_argument(
        '--steps', type=int, default=STEPS, help='optimizer steps of the pre-training'
    )
    parser.add_argument(
        '--cifar10',
        type=Path,
        help='ZIP of real images, cifar10/{train,test}/class/*.jpg, instead of drawn '
        'ones: six classes train the model, four are the task',
    )
    parser.add_argument('--methods', nargs='+', default=METHODS)
    parser.add_argument('--shots', nargs='+', type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    args = parser.parse_args()

    if args.cifar10 and not is_zipfile(args.cifar10):
        sys.exit(f'error: --cifar10 takes a ZIP file, and {args.cifar10} is not one.')
    try:
        if args.cifar10:
            write_cifar(args.work_dir / 'held_out', args.cifar10)
            pairs = cifar_pairs(args.cifar10)
        else:
            write_task(args.work_dir / 'held_out')
            pairs = scene_pairs()
        model, weights = pretrain(args.work_dir, pairs, args.steps)
    except ValueError as error:
        sys.exit(f'error: {error}')
    config = FewShotConfig(
        dataset=str(args.work_dir / 'held_out'),
        model=str(model),
        pretrained=str(weights),
        methods=tuple(args.methods),
        shots=tuple(args.shots),
        seeds=tuple(args.seeds),
        overrides={'coop': dict(n_ctx=4)},
        cache_dir=str(args.work_dir / 'features'),
    )
    results = args.work_dir / 'results'
    try:
        records = run(config, results)
    except (ValueError, FileExistsError) as error:
        sys.exit(f'error: {error}')
    console = Console()
    console.print(Markdown(write_report(results, records)))
    console.print(f'{results}/results.md and accuracy.png')


if __name__ == '__main__':
    main()

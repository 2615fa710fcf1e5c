"""Compares few-shot methods with an image encoder that is installed with the package.

The encoder is EfficientNet-Lite0, trained on ImageNet, without text. The images are
drawn, and the class matrix of the methods is made of the training images. With
--cifar10 the images are photographs, and the class matrix has the rows of the encoder's
own classifier for classes of ImageNet.
"""

import argparse
import re
import sys
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.demo.actions import DEMO_ENCODER
from dsnet_mm.demo.scenes import draw_class
from dsnet_mm.few_shot import FewShotConfig, run
from dsnet_mm.few_shot.report import write_report
from dsnet_mm.files import replacing

METHODS = ('linear_probe', 'clap', 'gda', 'tip_adapter_f', 'task_res', 'clip_adapter')

DRAWN = tuple(
    f'{texture} {shape}'
    for texture in ('striped', 'dotted', 'checked', 'zigzag')
    for shape in ('disc', 'star', 'heart')
)

CIFAR_ROWS = {
    'airplane': ['airliner', 'warplane'],
    'automobile': ['beach wagon', 'convertible', 'minivan', 'sports car', 'limousine'],
    'bird': ['robin', 'jay', 'goldfinch', 'bulbul', 'ostrich', 'hummingbird'],
    'cat': ['tabby', 'tiger cat', 'persian cat', 'siamese cat', 'egyptian cat'],
    'deer': ['hartebeest', 'impala', 'gazelle'],
    'dog': ['chihuahua', 'beagle', 'labrador retriever', 'german shepherd', 'pug'],
    'frog': ['bullfrog', 'tree frog', 'tailed frog'],
    'horse': ['sorrel'],
    'ship': ['container ship', 'liner', 'speedboat', 'schooner'],
    'truck': ['garbage truck', 'moving van', 'pickup', 'trailer truck', 'tow truck'],
}
"""Classes of ImageNet for those of CIFAR-10. There are no deer and no horses among them
but antelopes and the sorrel."""


def write_drawn(out: Path, train: int = 24, test: int = 40) -> None:
    """Writes drawn images as ``{train,test}/class_name/*.png``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        train: Training images of each class.
        test: Test images of each class.
    """
    if out.exists():
        return
    with replacing(out) as fresh:
        for part, count in enumerate((train, test)):
            for label, name in enumerate(DRAWN):
                folder = fresh / ('train', 'test')[part] / name.replace(' ', '_')
                folder.mkdir(parents=True)
                for i in range(count):
                    image = draw_class(name, np.random.default_rng([0, part, label, i]))
                    Image.fromarray(image).save(folder / f'{i:03d}.png')


def write_cifar(out: Path, archive: Path, train: int = 24, test: int = 100) -> None:
    """Writes images of CIFAR-10 as ``{train,test}/class_name/*``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        archive: ZIP file with ``cifar10/{train,test}/class_name/*``.
        train: Images of each class from the training part.
        test: Images of each class from the test part.

    Raises:
        ValueError: If the archive has no such images.
    """
    if out.exists():
        return
    with ZipFile(archive) as file, replacing(out) as fresh:
        for part, count in (('train', train), ('test', test)):
            pattern = re.compile(rf'cifar10/{part}/([^/]+)/([^/]+)')
            taken: dict[str, int] = {}
            for path in sorted(file.namelist()):
                match = pattern.fullmatch(path)
                if match is None or taken.get(match[1], 0) == count:
                    continue
                taken[match[1]] = taken.get(match[1], 0) + 1
                folder = fresh / part / match[1]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / match[2]).write_bytes(file.read(path))
            if not taken:
                raise ValueError(
                    f'{archive} has no images cifar10/{part}/class_name/*.jpg; its '
                    f'paths start like {next(iter(file.namelist()), "nothing")!r}.'
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo_clip'))
    parser.add_argument(
        '--cifar10',
        type=Path,
        help='ZIP of real images, cifar10/{train,test}/class/*.jpg, instead of drawn '
        'ones',
    )
    parser.add_argument('--methods', nargs='+', default=METHODS)
    parser.add_argument('--shots', nargs='+', type=int, default=[1, 4, 16])
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    args = parser.parse_args()

    if args.cifar10 and not is_zipfile(args.cifar10):
        sys.exit(f'error: --cifar10 takes a ZIP file, and {args.cifar10} is not one.')
    name = 'cifar10' if args.cifar10 else 'drawn'
    images, results = args.work_dir / name, args.work_dir / f'{name}_results'
    try:
        if args.cifar10:
            write_cifar(images, args.cifar10)
        else:
            write_drawn(images)
        config = FewShotConfig(
            dataset=str(images),
            model=DEMO_ENCODER[0],
            pretrained=DEMO_ENCODER[1],
            class_rows=CIFAR_ROWS if args.cifar10 else None,
            methods=tuple(args.methods),
            shots=tuple(args.shots),
            seeds=tuple(args.seeds),
            views=4,
            crop_scale=(0.5, 1.0),
            cache_dir=str(args.work_dir / 'features'),
        )
        records = run(config, results)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'error: {error}')
    console = Console()
    console.print(Markdown(write_report(results, records)))
    console.print(f'{results}/results.md and accuracy.png')


if __name__ == '__main__':
    main()

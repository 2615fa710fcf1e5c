"""Writes the synthetic data set of the demo: detection, classification, a preview."""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

from dsnet_mm.demo.scenes import SceneSettings, make_scenes

HELP = {
    'train': 'detection images',
    'val': 'detection images held out',
    'cls_train': 'classification images of each class',
    'cls_val': 'classification images of each class held out',
    'size': 'height and width of a detection image, in pixels',
    'cls_size': 'height and width of a classification image',
    'seed': 'random seed',
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('out', type=Path, help='folder to make')
    for field in fields(SceneSettings):
        option = f'--{field.name.replace("_", "-")}'
        parser.add_argument(
            option, type=int, default=field.default, help=HELP[field.name]
        )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace a set made with other settings',
    )
    args = vars(parser.parse_args(argv))
    out, overwrite = args.pop('out'), args.pop('overwrite')
    start = time.perf_counter()
    try:
        settings = SceneSettings(**args)
        manifest = make_scenes(out, settings, overwrite=overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f'make_scenes: {error}')
    if manifest is None:
        print(f'{out} holds this set already; nothing to do.')
        return
    seconds = time.perf_counter() - start
    print(
        f'{settings.train} + {settings.val} detection images with '
        f'{manifest["objects"]} objects and {settings.cls_train} + {settings.cls_val} '
        f'classification images a class written to {out} in {seconds:.1f} s; '
        f'preview: {out / "preview.png"}'
    )


if __name__ == '__main__':
    main()

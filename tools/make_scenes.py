"""Writes the synthetic data set of the demo: detection, classification, a preview."""

import argparse
import sys
import time
from pathlib import Path

from dsnet_mm.demo.scenes import SceneSettings, make_scenes


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = SceneSettings()
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument(
        '--train', type=int, default=default.train, help='detection pictures'
    )
    parser.add_argument(
        '--val', type=int, default=default.val, help='detection pictures held out'
    )
    parser.add_argument(
        '--cls-train',
        type=int,
        default=default.cls_train,
        help='classification pictures of each class',
    )
    parser.add_argument(
        '--cls-val',
        type=int,
        default=default.cls_val,
        help='classification pictures of each class held out',
    )
    parser.add_argument(
        '--size',
        type=int,
        default=default.size,
        help='height and width of a detection picture, in pixels',
    )
    parser.add_argument(
        '--cls-size',
        type=int,
        default=default.cls_size,
        help='height and width of a classification picture',
    )
    parser.add_argument('--seed', type=int, default=default.seed, help='random seed')
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
        manifest = make_scenes(out, settings, overwrite=overwrite, progress=True)
    except (ValueError, FileExistsError) as error:
        sys.exit(f'make_scenes: {error}')
    if manifest is None:
        print(f'{out} holds this set already; nothing to do.')
        return
    seconds = time.perf_counter() - start
    print(
        f'{settings.train} + {settings.val} detection pictures with '
        f'{manifest["objects"]} objects and {settings.cls_train} + {settings.cls_val} '
        f'classification pictures a class written to {out} in {seconds:.1f} s; '
        f'preview: {out / "preview.png"}'
    )


if __name__ == '__main__':
    main()

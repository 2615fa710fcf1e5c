"""Find objects in pictures, or classify them.

Writes into the folder OUT: predictions.json in COCO's result format, pictures.json with
the numbers of pictures and classes in it, and the drawn pictures.
"""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path

import cv2
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.cli.arguments import (
    add_config_arguments,
    add_trust_argument,
    user_errors,
)
from dsnet_mm.files import write_atomic

from .drawing import draw
from .prediction import Prediction
from .predictor import Predictor, list_pictures


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('picture', type=Path, help='picture, or folder of pictures')
    parser.add_argument('--out', type=Path, required=True, help='new folder of results')
    parser.add_argument(
        '--device', help='cpu, cuda, cuda:1 ... (default: a GPU, if any)'
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='pictures or tiles in a forward'
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='least score of an object'
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold batch norms into the layers beside them (fuse_for_inference)',
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='cut pictures into tiles of this side, and make one object of its parts',
    )
    parser.add_argument(
        '--overlap',
        type=int,
        default=128,
        metavar='PIXELS',
        help='overlap of tiles, larger than a common object',
    )
    parser.add_argument(
        '--no-pictures', action='store_true', help='do not draw the pictures'
    )
    add_trust_argument(parser)
    args = parser.parse_args(argv)

    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f'{args.out} exists and is left alone; choose another')
        pictures = list_pictures(args.picture)
        predictor = Predictor(
            args.config,
            args.checkpoint,
            device=args.device,
            batch_size=args.batch_size,
            score_thr=args.score_thr,
            fuse=args.fuse,
            tile=args.tile,
            overlap=args.overlap,
            cfg_options=args.cfg_options,
        )
    root = args.picture if args.picture.is_dir() else args.picture.parent
    images, entries, counts = [], [], Counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(TextColumn('{task.description}'), *columns) as progress:
        bar = progress.add_task('pictures', total=len(pictures))
        tiles = progress.add_task('tiles', visible=args.tile is not None)

        def track(chunks: list) -> list:
            progress.reset(tiles, total=len(chunks))
            return progress.track(chunks, task_id=tiles)

        for prediction in _quietly(predictor(pictures, track)):
            name = Path(prediction.picture).relative_to(root)
            images.append(
                dict(
                    id=len(images) + 1,
                    file_name=str(name),
                    width=prediction.width,
                    height=prediction.height,
                )
            )
            entries += prediction.to_coco(len(images))
            if prediction.scores is None:
                counts.update(found.label for found in prediction.objects)
            else:
                counts[int(prediction.scores.argmax())] += 1
            if not args.no_pictures:
                write_picture(predictor, prediction, args.out / 'pictures' / name)
            progress.update(bar, completed=len(images) + len(predictor.unreadable))
        progress.update(bar, completed=len(pictures))

    if not images:
        parser.error(f'none of {len(pictures)} pictures in {args.picture} can be read')
    categories = [
        dict(id=i, name=name) for i, name in enumerate(predictor.class_names, 1)
    ]
    write_atomic(
        args.out / 'pictures.json',
        json.dumps(dict(images=images, annotations=[], categories=categories)),
    )
    write_atomic(args.out / 'predictions.json', json.dumps(entries))

    console = Console()
    table = Table('class', 'objects' if predictor.detects else 'pictures')
    for label, count in counts.most_common():
        table.add_row(predictor.class_names[label], str(count))
    console.print(table)
    for path in predictor.unreadable:
        print(f'{path} cannot be read as a picture and was skipped.')
    print(
        f'{len(images)} of {len(pictures)} pictures were read. '
        f'Results are in {args.out}.'
    )


def _quietly(predictions):
    """Leaves out the warnings of single files, which are named at the end."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*cannot be read as a picture')
        yield from predictions


def write_picture(predictor: Predictor, prediction: Prediction, path: Path) -> None:
    """Draws a prediction into a file, a JPEG unless its name ends with ``.png``."""
    if path.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
        path = path.with_name(path.name + '.jpg')
    image = predictor.read(prediction.picture)
    drawn = draw(image, prediction, predictor.palette)
    _, encoded = cv2.imencode(path.suffix, drawn)
    write_atomic(path, encoded.tobytes())


if __name__ == '__main__':
    main()

"""Find objects in images, or classify them.

Writes into the folder OUT: predictions.json in COCO's result format, images.json with
the numbers of images and classes in it, and the drawn images.
"""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.engine.launch import (
    OldFlag,
    add_config_arguments,
    add_trust_argument,
    user_errors,
)
from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

from .drawing import draw
from .prediction import Prediction
from .predictor import Predictor, list_images


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('image', type=Path, help='image, or folder of images')
    parser.add_argument('--out', type=Path, required=True, help='new folder of results')
    parser.add_argument(
        '--device', help='cpu, cuda, cuda:1 ... (default: a GPU, if any)'
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='images or tiles in a forward'
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='minimum score of an object'
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
        help='cut images into tiles of this side, and make one object of its parts',
    )
    parser.add_argument(
        '--overlap',
        type=int,
        default=128,
        metavar='PIXELS',
        help='overlap of tiles, larger than a common object',
    )
    parser.add_argument(
        '--no-images', action='store_true', help='do not draw the images'
    )
    parser.add_argument('--no-pictures', action=OldFlag, new='--no-images')
    add_trust_argument(parser)
    args = parser.parse_args(argv)

    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f'{args.out} exists and is left alone; choose another')
        paths = list_images(args.image)
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
    root = args.image if args.image.is_dir() else args.image.parent
    written, entries, labels, counts = [], [], set(), Counter()
    # The files that cannot be read are named at the end.
    with (
        progress_bar(len(paths), 'reading', 'images') as bar,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings('ignore', message='.*cannot be read as an image')

        def track(chunks: list) -> Iterator:
            for i, chunk in enumerate(chunks, 1):
                bar.set_postfix_str(f'forward {i} of {len(chunks)}')
                yield chunk

        for prediction in predictor(paths, track if args.tile else iter):
            name = Path(prediction.image).relative_to(root)
            written.append(
                dict(
                    id=len(written) + 1,
                    file_name=str(name),
                    width=prediction.width,
                    height=prediction.height,
                )
            )
            entries += (found := prediction.to_coco(len(written)))
            labels.update(entry['category_id'] - 1 for entry in found)
            if prediction.scores is None:
                counts.update(found.label for found in prediction.objects)
            else:
                counts[int(prediction.scores.argmax())] += 1
            if not args.no_images:
                write_image(predictor, prediction, args.out / 'images' / name)
            bar.update(len(written) + len(predictor.unreadable) - bar.n)
        bar.update(len(paths) - bar.n)

    if not written:
        parser.error(f'none of {len(paths)} images in {args.image} can be read')
    # A checkpoint without names of classes, such as converted weights, has numbers.
    names = predictor.class_names or [str(i) for i in range(1 + max(labels, default=0))]
    categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    write_atomic(
        args.out / 'images.json',
        json.dumps(dict(images=written, annotations=[], categories=categories)),
    )
    write_atomic(args.out / 'predictions.json', json.dumps(entries))

    console = Console()
    table = Table('class', 'objects' if predictor.detects else 'images')
    for label, count in counts.most_common():
        table.add_row(escape(names[label]), str(count))
    console.print(table)
    for path in predictor.unreadable:
        print(f'{path} cannot be read as an image and was skipped.')
    print(
        f'{len(written)} of {len(paths)} images were read. Results are in {args.out}.'
    )


def write_image(predictor: Predictor, prediction: Prediction, path: Path) -> None:
    """Draws a prediction into a file, a JPEG unless its name ends with ``.png``."""
    if path.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
        path = path.with_name(path.name + '.jpg')
    image = predictor.read(prediction.image)
    drawn = draw(image, prediction, predictor.palette)
    _, encoded = cv2.imencode(path.suffix, drawn)
    write_atomic(path, encoded.tobytes())


if __name__ == '__main__':
    main()

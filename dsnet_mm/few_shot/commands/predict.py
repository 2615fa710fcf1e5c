"""``tools/few_shot.py predict``: the classes of images."""

import argparse
import sys

from rich.console import Console

from dsnet_mm.datasets.images import find_images
from dsnet_mm.few_shot.predict import (
    as_csv,
    as_json,
    as_table,
    predict,
)
from dsnet_mm.files import check_new, write_atomic

from .classifier import add_classifier_arguments, read_classifier_arguments


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'predict',
        help='classify images',
        description='Prints a table. Images that cannot be read are named and '
        'skipped. The exit status is 1 if none can be read.',
    )
    add_classifier_arguments(parser)
    parser.add_argument('images', nargs='+', help='images and folders of images')
    parser.add_argument('--top', type=int, default=3, help='classes of an image')
    parser.add_argument('--batch-size', type=int, default=64)
    for kind in ('json', 'csv'):
        parser.add_argument(
            f'--{kind}',
            metavar='FILE',
            help=f'write {kind.upper()} instead of the table, - for the screen',
        )
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Runs the command."""
    for file in (args.json, args.csv):
        if file not in (None, '-'):
            check_new(file)
    images, notes = find_images(args.images)
    classifier = read_classifier_arguments(args)
    predictions, problems = predict(classifier, images, args.top, args.batch_size)
    for line in (*notes, *problems):
        print(line, file=sys.stderr)
    if not predictions:
        raise ValueError('none of the images can be read.')
    if args.json is None and args.csv is None:
        Console().print(as_table(predictions))
    for file, text in (
        (args.json, as_json(predictions, problems)),
        (args.csv, as_csv(predictions)),
    ):
        if file == '-':
            print(text, end='')
        elif file is not None:
            write_atomic(file, text)
    if problems:
        print(
            f'{len(predictions)} of {len(images)} images classified, '
            f'{len(problems)} skipped.',
            file=sys.stderr,
        )

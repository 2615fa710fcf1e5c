"""``tools/few_shot.py predict``: the classes of pictures."""

import argparse
import sys

from rich.console import Console

from dsnet_mm.few_shot.predict import (
    as_csv,
    as_json,
    as_table,
    find_pictures,
    predict,
    write_new,
)

from .classifier import add_classifier_arguments, read_classifier_arguments


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'predict',
        help='classify pictures',
        description='Prints a table. Pictures that cannot be read are named and '
        'skipped. The exit status is 1 if none can be read.',
    )
    add_classifier_arguments(parser)
    parser.add_argument('pictures', nargs='+', help='pictures and folders of pictures')
    parser.add_argument('--top', type=int, default=3, help='classes of a picture')
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
    pictures, notes = find_pictures(args.pictures)
    classifier = read_classifier_arguments(args)
    predictions, problems = predict(classifier, pictures, args.top, args.batch_size)
    for line in (*notes, *problems):
        print(line, file=sys.stderr)
    if not predictions:
        raise ValueError('none of the pictures can be read.')
    if args.json is None and args.csv is None:
        Console().print(as_table(predictions))
    for file, text in (
        (args.json, as_json(predictions, problems)),
        (args.csv, as_csv(predictions)),
    ):
        if file == '-':
            print(text, end='')
        elif file is not None:
            write_new(file, text)
    if problems:
        print(
            f'{len(predictions)} of {len(pictures)} pictures classified, '
            f'{len(problems)} skipped.',
            file=sys.stderr,
        )

"""``tools/few_shot.py doctor``: what is wrong with a data set."""

import argparse
import sys

from dsnet_mm.datasets.check import diagnose


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser('doctor', help='say what is wrong with a data set')
    parser.add_argument('dataset', help='name, folder or CSV file')
    parser.add_argument('--data-root', default='data')
    parser.add_argument(
        '--decode',
        action='store_true',
        help='read every image: find damaged ones, and test images with the pixels '
        'of a training or validation image',
    )
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Runs the command. The exit status is 1 if there is a problem."""
    problems = diagnose(args.dataset, args.data_root, args.decode)
    if problems:
        sys.exit('\n'.join(problems))
    print(
        'no problem found.'
        if args.decode
        else 'no problem found; --decode also reads all images and compares their '
        'pixels.'
    )

"""``tools/few_shot.py test``: a classifier on another data set."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.few_shot.transfer import transfer, write_transfer

from .classifier import add_classifier_arguments, read_classifier_arguments


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'test',
        help='test a classifier on another data set',
        description='Tests on all images of a folder, or on its test part if it has '
        'one. Writes test.md, test.json and confusion.png.',
    )
    add_classifier_arguments(parser)
    parser.add_argument('dataset', help='name, folder, CSV file or parquet file')
    parser.add_argument('--data-root', default='data')
    parser.add_argument('--cache-dir', default='work_dirs/few_shot_features')
    parser.add_argument(
        '--out', help='folder of the results (work_dirs/test_CLASSIFIER_DATASET)'
    )
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Runs the command."""
    classifier = read_classifier_arguments(args)
    result = transfer(classifier, args.dataset, args.data_root, args.cache_dir)
    name = f'test_{Path(args.classifier).stem}_{result.dataset}'
    out = Path(args.out or Path('work_dirs') / name)
    Console().print(Markdown(write_transfer(out, args.classifier, result)))
    print(
        f'{result.score.accuracy:.2f} % of {result.images} images are right; see '
        f'{out}/test.md, test.json, confusion.png'
    )
    run = Path(args.classifier).resolve().parent.parent / 'run.json'
    if run.is_file():
        config = json.loads(run.read_text(encoding='utf-8'))['config']
        if Path(config['dataset'] or '').stem == Path(args.dataset).resolve().stem:
            print(
                f'The run of this classifier has a data set of the same name. If it is '
                f'this one, and has no test part of its own, training images are '
                f'among those tested; {run.parent}/results.md is without them.'
            )

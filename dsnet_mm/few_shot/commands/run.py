"""``tools/few_shot.py run``: methods x shots x seeds."""

import argparse
import shlex
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.few_shot.choice import choose
from dsnet_mm.few_shot.config import FewShotConfig
from dsnet_mm.few_shot.deployment import read_classifier
from dsnet_mm.few_shot.methods import METHODS
from dsnet_mm.few_shot.report import write_report
from dsnet_mm.few_shot.runner import run

from .arguments import add_data_arguments, read_options


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'run',
        help='methods x shots x seeds: table, plot and classifiers',
        epilog=describe_methods(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data_arguments(parser)
    parser.add_argument(
        '--features', help='file of features, instead of a data set and a model'
    )
    parser.add_argument('--work-dir', help='folder of the results')
    parser.add_argument('--methods', nargs='+', metavar='METHOD', help='see below')
    parser.add_argument(
        '--seeds', nargs='+', type=int, help='seeds of draws and methods (1 2 3)'
    )
    parser.add_argument(
        '--selection',
        help='val, cv or fixed (default: val, or fixed without validation images)',
    )
    parser.add_argument(
        '--final',
        action='store_true',
        help='also fit the chosen method to all labelled images',
    )
    parser.set_defaults(call=call)


def describe_methods() -> str:
    """Returns a list of all methods with their hyper-parameters."""
    defaults = ', '.join(FewShotConfig.methods)
    lines = [f'methods (default: {defaults}), with their fixed settings:']
    for name, method in METHODS.items():
        lines.append(f'  {name}: {method.title}')
        options = ' '.join(f'{k}={v}' for k, v in method.defaults.items())
        if options:
            lines.append(f'      {options}')
        searched = ', '.join({**method.grid, **method.late_grid})
        if searched:
            lines.append(f'      val and cv select {searched}')
    return '\n'.join(lines)


def call(args: argparse.Namespace) -> None:
    """Runs the command."""
    names = ('features', 'methods', 'seeds', 'selection')
    options = read_options(args, names)
    try:
        config = FewShotConfig(**options)
    except TypeError as error:
        raise ValueError(f'unknown option: {error}.') from error
    name = Path(args.config or config.features or config.dataset).absolute().stem
    prefix = '' if args.config else 'few_shot_'
    if not args.config and config.features:
        prefix = 'features_'  # the run on the images has the same name
    work_dir = Path(args.work_dir or Path('work_dirs') / f'{prefix}{name}')
    records = run(config, work_dir, final=args.final)
    Console().print(Markdown(write_report(work_dir, records)))
    print(f'{work_dir}/results.md, accuracy.png, runs/, classifiers/')
    file = work_dir / (
        'classifiers/final.safetensors' if args.final else choose(records).file
    )
    # Not through rich, which would break the command into lines.
    print(f'\nThe classifier to use: {file}\nIt classifies images by')
    print(f'    python tools/few_shot.py predict {shlex.quote(str(file))} IMAGES')
    encoder = read_classifier(file)[1]
    if encoder['identity'] is None:
        print(f'    with --model MODEL --pretrained WEIGHTS of {encoder["model"]}')

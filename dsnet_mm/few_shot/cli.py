"""The commands of ``tools/few_shot.py``."""

import argparse
import functools
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown, TableElement
from rich.table import Table

from dsnet_mm.datasets import PUBLIC_DATASETS
from dsnet_mm.datasets.check import diagnose
from dsnet_mm.datasets.images import find_images
from dsnet_mm.environment import existing_device, install_command
from dsnet_mm.files import check_new, print_any_name, write_atomic

from .calibration import Calibration
from .choice import REFERENCE, choose
from .config import FewShotConfig
from .deployment import (
    DeployedClassifier,
    files_to_name,
    load_classifier,
    read_classifier,
)
from .encode import encode, share_of_torchrun
from .fit import fit
from .methods import METHODS
from .methods.training import RECIPE
from .onnx import export_onnx
from .other_formats import convert_checkpoint, export_matrix, export_open_clip
from .predict import as_csv, as_json, as_table, predict
from .report import write_report
from .runner import run
from .transfer import transfer, transfer_run, write_transfer
from .work_dir import read_json

try:
    from dsnet_mm.engine.launch import CfgOptions
except ImportError:  # mmengine is needed for configurations and --cfg-options only
    CfgOptions = 'store'

FORMATS = {
    'onnx': 'image tower and classifier as one network, compared in onnxruntime',
    'matrix': 'weight and bias of a linear classifier',
    'open_clip': "open_clip's weights with a linear adapter in the image projection",
    'classifier': 'classifier file from a checkpoint of MMEngine, needs --config',
}


COMMANDS: dict[str, tuple[Callable, str, str, tuple]] = {}
"""Function, help, more help and options of each command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command. An error of the user is one sentence, with exit status 1.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    logging.basicConfig(format='%(message)s')
    parser = argparse.ArgumentParser(description='Few-shot classification with CLIP.')
    parsers = parser.add_subparsers(dest='command', required=True)
    for name, (call, help_, more, options) in COMMANDS.items():
        command = parsers.add_parser(
            name,
            help=help_,
            epilog=more,
            aliases=['doctor'] * (name == 'check'),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(call=call)
        for flag, settings in options:
            command.add_argument(flag, **settings)
    args = parser.parse_args(argv)
    print_any_name()
    if args.command == 'doctor':
        print('doctor is called check now.', file=sys.stderr)
    try:
        args.call(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'error: {error}')


def command(help: str, *options: tuple[str, dict], more: str = '') -> Callable:
    """Registers a function as the command of its name."""

    def register(call: Callable) -> Callable:
        COMMANDS[call.__name__.removesuffix('_command')] = call, help, more, options
        return call

    return register


def option(flag: str, help: str, **settings: object) -> tuple[str, dict]:
    """Returns an option as :func:`command` takes it."""
    return flag, dict(settings, help=help)


FLAG = dict(action='store_true')
DATA_ROOT = option('--data-root', 'folder of the public data sets', default='data')
DATA = (
    option('source', 'data set, file of features or configuration', nargs='?'),
    option('--dataset', 'name, folder, CSV file or parquet file'),
    option('--model', 'model of open_clip, a JSON file, or timm:NAME'),
    option('--pretrained', 'tag or file of its weights'),
    option('--download', 'fetch weights that are not here', **FLAG, default=None),
    option('--data-root', 'folder of the public data sets'),
    option('--device', 'device of the encoder (default: auto, a GPU if there is one)'),
    option(
        '--cfg-options',
        'other options, see FewShotConfig, such as views=0 or '
        'overrides.clip_adapter.alpha=0.5; task=NAME chooses the data set of a '
        'configuration',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
    ),
)
SHOTS = option('--shots', 'training images of each class', nargs='+', type=int)
ENCODER = (
    option('--model', 'model of open_clip, if it is a file or the classifier has none'),
    option(
        '--pretrained', 'its weights, if they are a file or the classifier has none'
    ),
    option('--download', 'fetch weights that are not here', **FLAG),
)
CLASSIFIER = (
    option('classifier', 'classifier file that run or export wrote'),
    *ENCODER,
    option('--device', 'device of the encoder', default='auto'),
)


def describe_methods() -> str:
    """Returns a list of all methods with their hyper-parameters."""
    defaults = ', '.join(FewShotConfig.methods)
    lines = [fold(f'methods (default: {defaults}), with their fixed settings:')]
    for name, method in METHODS.items():
        lines.append(f'  {name}: {method.title}')
        if method.source:
            lines.append(fold(f'from {method.source}', indent=6))
        own = [item for item in method.defaults.items() if item not in RECIPE.items()]
        if own:
            lines.append(fold(' '.join(f'{k}={v}' for k, v in own), indent=6))
        if method.grid:
            lines.append(fold(f'val and cv select {", ".join(method.grid)}', indent=6))
    return '\n'.join(lines)


def fold(text: str, indent: int = 0) -> str:
    """Breaks a text between words into lines of at most 79 characters."""
    words = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(textwrap.fill(text, 79 - indent, **words), ' ' * indent)


# ----------------------------------------------------------------------- run, encode


def read_options(args: argparse.Namespace) -> tuple[dict, str]:
    """Returns options of :class:`FewShotConfig`, and the folder of the results.

    The options of the command line have precedence over those of a configuration.
    """
    options, work_dir, source = {}, None, args.source
    kind = 'dataset' if source is None else kind_of(source)
    is_config = kind == 'config'
    if CfgOptions == 'store' and (is_config or args.cfg_options):
        raise ImportError(
            f'a configuration, or --cfg-options, needs mmengine; '
            f'{install_command("mmengine")}'
        )
    changes = dict(args.cfg_options)
    if is_config:
        task = changes.pop('task', None)
        options, work_dir = read_few_shot(source, task, args.dataset)
    elif source is not None and args.dataset is not None:
        raise ValueError(f'name one data set, not both {source} and {args.dataset}.')
    elif source is not None:
        options[kind] = source
    known = {field.name for field in fields(FewShotConfig)}
    options |= {k: v for k, v in vars(args).items() if k in known and v is not None}
    if changes:
        from mmengine.config import Config

        nested = Config(options)
        nested.merge_from_dict(changes)
        options = nested.to_dict()
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f'unknown option {", ".join(unknown)}; the options are '
            f'{", ".join(sorted(known))}.'
        )
    if work_dir is None:
        kind = 'features' if options.get('features') else 'few_shot'
        data = options.get('features') or options.get('dataset') or '.'
        work_dir = f'work_dirs/{kind}_{Path(data).absolute().stem}'
    return options, work_dir


def kind_of(source: str) -> str:
    """Returns what an argument is: ``'dataset'``, ``'features'`` or ``'config'``.

    Raises:
        FileNotFoundError: If there is nothing of this name.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    # A configuration of this package may be given by its name.
    if source.startswith('clip-adapter') or suffix in ('.py', '.json', '.yaml', '.yml'):
        return 'dataset' if path.is_dir() else 'config'
    if source not in PUBLIC_DATASETS and not path.exists():
        raise FileNotFoundError(
            f'there is no {source}; name a folder of images, a CSV or parquet file, a '
            f'.safetensors file of features, a public data set such as eurosat, or a '
            f'configuration.'
        )
    return 'features' if suffix == '.safetensors' else 'dataset'


def read_few_shot(path: str, task: str | None, dataset: str | None) -> tuple[dict, str]:
    """Returns ``few_shot`` of a configuration, and the folder of its results.

    Prompts and other options can depend on the data set, so ``--dataset`` is the task
    of a configuration that has a choice of them.
    """
    from dsnet_mm.engine.config import read_config

    cfg = read_config(path, task)
    if task is None and dataset is not None and 'task' in cfg:
        cfg = read_config(path, dataset)
    if 'few_shot' not in cfg:
        raise ValueError(f'{path} has no few_shot=dict(...).')
    return cfg.few_shot.to_dict(), cfg.get('work_dir', f'work_dirs/{Path(path).stem}')


@command(
    'methods x shots x seeds: table, plot and classifiers',
    *DATA,
    SHOTS,
    option('--features', 'file of features, instead of a data set and a model'),
    option('--work-dir', 'folder of the results'),
    option('--methods', 'see below', nargs='+', metavar='METHOD'),
    option('--seeds', 'seeds of draws and methods (1 2 3)', nargs='+', type=int),
    option('--selection', 'val, cv or fixed (default: val, fixed without such images)'),
    option('--base-to-new', 'fit to half of the classes', **FLAG, default=None),
    option('--final', 'also fit the chosen method to all images', **FLAG),
    more=describe_methods(),
)
def run_command(args: argparse.Namespace) -> None:
    """Runs methods x shots x seeds, and prints the table."""
    options, default = read_options(args)
    work_dir = Path(args.work_dir or default)
    records = run(FewShotConfig(**options), work_dir, final=args.final)
    print_markdown(write_report(work_dir, records))
    print(f'{work_dir}/results.md, accuracy.png, runs/, classifiers/\n')
    file = work_dir / choose(records).file
    if args.final:
        file = work_dir / 'classifiers/final.safetensors'
    print_use(file)


class FoldedTable(TableElement):
    """A table of Markdown whose cells are folded if they are too long, not cut."""

    def __rich_console__(self, *arguments: Any) -> Iterator[Table]:
        for table in super().__rich_console__(*arguments):
            table.padding = (0, 1, 0, 0)
            for column in table.columns:
                column.overflow = 'fold'
            yield table


def print_markdown(text: str) -> None:
    """Prints Markdown."""
    markdown = Markdown(text)
    markdown.elements = {**Markdown.elements, 'table_open': FoldedTable}
    Console().print(markdown)


def print_use(file: Path) -> None:
    """Prints how a classifier file is used. A shell takes the command as it is."""
    lines, groups = ['python tools/few_shot.py predict'], [[str(file), 'IMAGES']]
    for key, value in files_to_name(read_classifier(file)[1]).items():
        groups.append([f'--{key}', value or key.upper()])
    for text in map(shlex.join, groups):
        if len(lines[-1]) + len(text) < 72:
            lines[-1] += f' {text}'
        else:
            lines.append(f'    {text}')
    command = ' \\\n    '.join(lines)
    print(f'The classifier to use:\n    {file}\nIt classifies images by\n    {command}')


# ------------------------------------------------------------------------------- fit


@command(
    'fit a classifier to all your images',
    *DATA,
    option('--method', 'see run --help (clip_adapter)', default=REFERENCE),
    option('--out', 'classifier file to write (work_dirs/fit_DATASET.safetensors)'),
    more='Classes may have unequal numbers of images, and count equally. No image is\n'
    'held back for a test, but a part test of the data set is left alone.',
)
def fit_command(args: argparse.Namespace) -> None:
    """Fits a method to all images, and says what it is fitted to."""
    options, _ = read_options(args)
    options |= dict(methods=(args.method,), shots=None)
    config = FewShotConfig(**options)
    data = config.features or config.dataset
    out = Path(args.out or f'work_dirs/fit_{Path(data).absolute().stem}.safetensors')
    counts = fit(config, out, args.method)
    text = (
        f'{METHODS[args.method].title} is fitted to {sum(counts.values())} images of '
        f'{len(counts)} classes, {min(counts.values())} to {max(counts.values())} of '
        f'each; the classes count equally. Its accuracy is not known: test it on '
        f'images that are not among these.'
    )
    print(fold(text), end='\n\n')
    print_use(out)


# ---------------------------------------------------------------------------- encode


@command(
    'encode a data set into a file for run --features',
    *DATA,
    SHOTS,
    option('--out', 'file to write, .safetensors', required=True),
    more='Several processes share the work:\n'
    '    torchrun --nproc-per-node 4 tools/few_shot.py encode ...\n'
    'On machines without a common torchrun, set RANK and WORLD_SIZE; they need a\n'
    'common cache_dir. The same command continues after an interruption, with any\n'
    'number of processes.',
)
def encode_command(args: argparse.Namespace) -> None:
    """Encodes the share of this process."""
    options, _ = read_options(args)
    shots = options.pop('shots', None)
    rank, processes = share_of_torchrun()
    local = int(os.environ.get('LOCAL_RANK', 0))
    if processes > 1 and torch.cuda.is_available():
        options.setdefault('device', f'cuda:{local}')
    missing = encode(
        FewShotConfig(**options),
        args.out,
        None if shots is None else tuple(shots),
        (rank, processes),
        quiet=local > 0,
    )
    if missing:
        print(
            f'process {rank} of {processes} is done; {missing} images are missing, '
            f'and the process that encodes the last of them writes {args.out}. If no '
            f'other process is at work, call the command again.'
        )
    else:
        print(f'{args.out} is written; tools/few_shot.py run --features {args.out}')


# ------------------------------------------------------------- predict, test, export


def load(
    args: argparse.Namespace, file: str, device: str = 'cpu'
) -> DeployedClassifier:
    """Loads a classifier with the encoder that the arguments name."""
    return load_classifier(
        file,
        model=args.model,
        pretrained=args.pretrained,
        download=args.download,
        device=existing_device(device),
    )


@command(
    'classify images',
    *CLASSIFIER,
    option('images', 'images and folders of images', nargs='+'),
    option('--top', 'classes of an image', type=int, default=3),
    option('--batch-size', 'images in memory at once', type=int, default=64),
    option('--reject', 'say which images are of none of the classes', **FLAG),
    option('--coverage', 'add the set that has the class so often, 0.9', type=float),
    option('--json', 'file of JSON instead of the table, - for the screen'),
    option('--csv', 'file of CSV instead of the table, - for the screen'),
    more='Images that cannot be read are named and skipped. The exit status is 1 if\n'
    'none can be read.',
)
def predict_command(args: argparse.Namespace) -> None:
    """Prints or writes the classes of images."""
    for file in (args.json, args.csv):
        if file not in (None, '-'):
            check_new(file)
    images, notes = find_images(args.images)
    classifier = load(args, args.classifier, args.device)
    predictions, problems = predict(
        classifier,
        images,
        args.top,
        args.batch_size,
        reject=args.reject,
        coverage=args.coverage,
    )
    if args.reject or args.coverage is not None:
        notes = (*notes, classifier.calibration.describe())
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


@command(
    'test a classifier, or all methods of a run, on other data sets',
    option('classifier', 'classifier file, or the folder of a run'),
    *CLASSIFIER[1:],
    option('dataset', 'names, folders, CSV files or parquet files', nargs='+'),
    DATA_ROOT,
    option('--cache-dir', 'folder of the features (default: that of the run)'),
    option('--out', 'folder of the results (work_dirs/test_CLASSIFIER_DATASET)'),
    more='Tests on all images of a folder, or on its test part if it has one. Writes\n'
    'test.md, test.json and confusion.png. Of a run it tests all classifiers with\n'
    'the most shots, and writes one table of methods and data sets.',
)
def test_command(args: argparse.Namespace) -> None:
    """Tests a classifier, and says where its training images may be among those."""
    source, config = Path(args.classifier).resolve(), {}
    run = source if source.is_dir() else source.parent.parent
    if (run / 'run.json').is_file():
        config = read_json(run / 'run.json')['config']
    cache = args.cache_dir or config.get('cache_dir') or FewShotConfig.cache_dir
    where = args.data_root, cache
    if source.is_dir():
        out = Path(args.out or f'work_dirs/test_{source.name}')
        read = functools.partial(load, args, device=args.device)
        print_markdown(transfer_run(source, args.dataset, out, read, *where))
        print(f'{out}/test.md, test.json')
    elif args.out and len(args.dataset) > 1:
        raise ValueError('--out is for one data set; leave it out, or name one.')
    else:
        classifier = load(args, args.classifier, args.device)
        for dataset in args.dataset:
            result = transfer(classifier, dataset, *where)
            name = f'test_{Path(args.classifier).stem}_{result.dataset}'
            out = Path(args.out or f'work_dirs/{name}')
            print_markdown(write_transfer(out, args.classifier, result))
            print(
                f'{result.score.accuracy:.2f} % of {result.images} images are right; '
                f'see test.md, test.json, confusion.png in\n{out}'
            )
    names = [Path(dataset).resolve().stem for dataset in args.dataset]
    if Path(config.get('dataset') or '').stem in names:
        text = (
            f'The run of this classifier has a data set of the same name. If it is one '
            f'of these, and has no test part of its own, training images are among '
            f'those tested; {run}/results.md is without them.'
        )
        print(fold(text))


@command(
    'write a classifier for other programs',
    option('source', 'classifier file, or checkpoint of MMEngine'),
    option('out', 'file to write'),
    option('--format', 'see below', choices=FORMATS, default='onnx'),
    option('--config', 'configuration of the checkpoint'),
    *ENCODER,
    more='\n'.join(f'{name}: {what}' for name, what in FORMATS.items()),
)
def export_command(args: argparse.Namespace) -> None:
    """Writes a classifier in the format of another program."""
    check_new(args.out)
    if args.format == 'classifier':
        if args.config is None:
            raise ValueError(
                'a checkpoint needs the configuration that it was trained with; name '
                'it with --config.'
            )
        convert_checkpoint(
            *(args.source, args.config, args.out), args.pretrained, args.download
        )
    elif args.format == 'matrix':
        classifier, about = read_classifier(args.source)
        names, temperature = about['class_names'], Calibration.read(about).temperature
        export_matrix(classifier, tuple(names), args.out, temperature)
    elif args.format == 'open_clip':
        export_open_clip(load(args, args.source), args.out)
    else:
        gap = export_onnx(load(args, args.source), args.out)
        print(f'in onnxruntime probabilities differ from PyTorch by {gap:.1e} at most')
    print(f'{args.out} is written.')


@command(
    'say what is wrong with a data set',
    option('dataset', 'name, folder or CSV file'),
    DATA_ROOT,
    option('--decode', 'also compare the pixels of all images', **FLAG),
)
def check_command(args: argparse.Namespace) -> None:
    """Prints what is wrong with a data set. The exit status is 1 if anything is."""
    problems = diagnose(args.dataset, args.data_root, args.decode)
    if problems:
        sys.exit('\n'.join(problems))
    more = '; --decode also reads all images and compares their pixels'
    print(f'no problem found{"" if args.decode else more}.')

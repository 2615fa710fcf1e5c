"""Few-shot classification: run methods, test a classifier, look over a data set.

``run`` takes a configuration file, or just a data set and a model::

    python tools/few_shot.py run configs/clip_adapter/clip-adapter_rn50_eurosat.py
    python tools/few_shot.py run --dataset my_pictures --model RN50-quickgelu \
        --pretrained openai --shots 1 4 16
    python tools/few_shot.py predict work_dirs/RUN/classifiers/FILE.safetensors holiday/
    python tools/few_shot.py test work_dirs/RUN/classifiers/FILE.safetensors imagenet_a
    python tools/few_shot.py export work_dirs/RUN/classifiers/FILE.safetensors it.onnx
    python tools/few_shot.py doctor eurosat
"""

import argparse
import logging
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.datasets.doctor import diagnose
from dsnet_mm.few_shot import FewShotConfig, run
from dsnet_mm.few_shot.commands import export, predict, test
from dsnet_mm.few_shot.report import write_report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Few-shot classification with CLIP.')
    commands = parser.add_subparsers(dest='command', required=True)
    runs = commands.add_parser('run', help='methods x shots x seeds: table and plot')
    runs.add_argument('config', nargs='?', help='configuration file')
    runs.add_argument('--work-dir', help='folder of the results')
    runs.add_argument('--dataset', help='name, folder or CSV file')
    runs.add_argument('--model', help='model of open_clip, or a JSON file')
    runs.add_argument('--pretrained', help='tag or file of its weights')
    runs.add_argument('--data-root', help='folder of the public data sets')
    runs.add_argument('--methods', nargs='+', help='names of the methods')
    runs.add_argument('--shots', nargs='+', type=int)
    runs.add_argument('--seeds', nargs='+', type=int)
    runs.add_argument('--selection', help='val, cv or fixed')
    runs.add_argument('--device', help='device of the encoder')
    runs.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='other options as key=value, see FewShotConfig',
    )
    for command in (predict, test, export):
        command.add_parser(commands)
    doctor = commands.add_parser('doctor', help='say what is wrong with a data set')
    doctor.add_argument('dataset', help='name, folder or CSV file')
    doctor.add_argument('--data-root', default='data')
    doctor.add_argument('--decode', action='store_true', help='open every picture')
    return parser.parse_args()


def run_command(args: argparse.Namespace) -> None:
    options = {}
    if args.config is not None:
        options = Config.fromfile(args.config).get('few_shot')
        if options is None:
            raise ValueError(f'{args.config} has no few_shot=dict(...).')
        options = options.to_dict()
    named = vars(args)
    for key in (
        *('dataset', 'model', 'pretrained', 'data_root', 'methods'),
        *('shots', 'seeds', 'selection', 'device'),
    ):
        if named[key] is not None:
            options[key] = named[key]
    options.update(args.cfg_options)
    missing = {'dataset', 'model'} - options.keys()
    if missing:
        raise ValueError(f'name the {" and the ".join(sorted(missing))}, see --help.')
    options.setdefault('pretrained', None)
    try:
        config = FewShotConfig(**options)
    except TypeError as error:
        raise ValueError(f'unknown option: {error}.') from error
    work_dir = args.work_dir or Path('work_dirs') / (
        Path(args.config).stem
        if args.config
        else f'few_shot_{Path(config.dataset).stem}'
    )
    records = run(config, work_dir)
    console = Console()
    console.print(Markdown(write_report(work_dir, records)))
    console.print(f'{work_dir}/results.md, accuracy.png, runs/, classifiers/')


def main() -> None:
    args = parse_args()
    logging.basicConfig(format='%(message)s')
    if args.command == 'doctor':
        problems = diagnose(args.dataset, args.data_root, args.decode)
        sys.exit('\n'.join(problems) if problems else None)
    try:
        if args.command == 'run':
            run_command(args)
        else:
            args.call(args)
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()

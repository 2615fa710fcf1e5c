"""Trains a small CLIP without a download, then runs all few-shot methods on it.

Pictures and captions are drawn. The classes of the few-shot task have textures and
shapes that the model has never seen.
"""

import argparse
import sys
from pathlib import Path
from zipfile import is_zipfile

from rich.console import Console
from rich.markdown import Markdown

from dsnet_mm.demo.clip import (
    FOLDER,
    STEPS,
    cifar_pairs,
    pretrain,
    scene_pairs,
    write_cifar,
    write_pictures,
)
from dsnet_mm.few_shot import FewShotConfig, run
from dsnet_mm.few_shot.report import write_report

METHODS = (
    *('linear_probe', 'linear_probe_zs', 'clap', 'lp++', 'gda', 'proker'),
    *('coop', 'task_res', 'tip_adapter', 'tip_adapter_f'),
    *('clip_adapter', 'clip_adapter_learnt', 'clip_adapter_text', 'clip_adapter_both'),
    *('clip_adapter_paper', 'clip_adapter_released'),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work-dir', type=Path, default=FOLDER)
    parser.add_argument(
        '--steps', type=int, default=STEPS, help='optimizer steps of the pre-training'
    )
    parser.add_argument(
        '--cifar10',
        type=Path,
        help='ZIP of real pictures, cifar10/{train,test}/class/*.jpg, instead of drawn '
        'ones: six classes train the model, four are the task',
    )
    parser.add_argument('--methods', nargs='+', default=METHODS)
    parser.add_argument('--shots', nargs='+', type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    args = parser.parse_args()

    if args.cifar10 and not is_zipfile(args.cifar10):
        sys.exit(f'error: --cifar10 takes a ZIP file, and {args.cifar10} is not one.')
    try:
        if args.cifar10:
            write_cifar(args.work_dir / 'held_out', args.cifar10)
            pairs = cifar_pairs(args.cifar10)
        else:
            write_pictures(args.work_dir / 'held_out')
            pairs = scene_pairs()
        model, weights = pretrain(args.work_dir, pairs, args.steps)
    except ValueError as error:
        sys.exit(f'error: {error}')
    config = FewShotConfig(
        dataset=str(args.work_dir / 'held_out'),
        model=str(model),
        pretrained=str(weights),
        methods=tuple(args.methods),
        shots=tuple(args.shots),
        seeds=tuple(args.seeds),
        overrides={'coop': dict(n_ctx=4)},
        crop_scale=(0.5, 1.0),
        cache_dir=str(args.work_dir / 'features'),
    )
    results = args.work_dir / 'results'
    try:
        records = run(config, results)
    except (ValueError, FileExistsError) as error:
        sys.exit(f'error: {error}')
    console = Console()
    console.print(Markdown(write_report(results, records)))
    console.print(f'{results}/results.md and accuracy.png')


if __name__ == '__main__':
    main()

"""Measures the tables of docs/few_shot_results.md, on files of real features.

    python -m tools.evidence.few_shot FOLDER work_dirs/few_shot_tables

FOLDER has caltech101.safetensors and imagenet.safetensors. The same command continues
an interrupted measurement. It writes results/few_shot/features.csv.
"""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsnet_mm.few_shot import FewShotConfig, run
from dsnet_mm.few_shot.methods import METHODS
from dsnet_mm.few_shot.report import collect, write_report
from dsnet_mm.files import write_atomic

CSV = Path('results/few_shot/features.csv')

ROBUST = (
    *('clip_adapter', 'clip_adapter_paper', 'clip_adapter_released', 'linear_probe'),
    *('clap', 'lp++', 'gda', 'proker', 'tip_adapter_f', 'task_res'),
)
"""Methods that are tested with wrong text features."""


def wrong_text(text: Tensor, kind: str) -> Tensor:
    """Gives classes the text features of others: of half of the classes, or of all."""
    if kind == 'all shifted':
        return text.roll(1, 0)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    half = order[: len(text) // 2]
    text = text.clone()
    text[half] = text[half.roll(1)]
    return text


def tables(folder: Path, work_dir: Path) -> Iterator[tuple[str, str, FewShotConfig]]:
    """Yields data set, case and options of each run."""
    every = tuple(
        name
        for name, method in METHODS.items()
        if name != 'zero_shot' and not method.needs_encoder
    )
    for name, shots, seeds in (
        ('caltech101', (1, 4, 16), (1, 2, 3, 4, 5)),
        ('imagenet', (1, 2), (1, 2, 3)),
    ):
        file = folder / f'{name}.safetensors'
        options = dict(shots=shots, seeds=seeds, selection='fixed')
        # 12,800 steps take long with 1,000 classes.
        methods = tuple(m for m in every if name != 'imagenet' or m != 'cross_modal')
        yield (
            name,
            'fixed',
            FewShotConfig(features=str(file), methods=methods, **options),
        )
        for kind in ('half permuted', 'all shifted'):
            changed = work_dir / f'{name} {kind}.safetensors'
            if not changed.exists():
                with safe_open(file, 'pt') as stored:
                    tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
                    about = stored.metadata()
                tensors['text_features'] = wrong_text(tensors['text_features'], kind)
                work_dir.mkdir(parents=True, exist_ok=True)
                save_file(tensors, changed, about)
            yield (
                name,
                kind,
                FewShotConfig(features=str(changed), methods=ROBUST, **options),
            )
        if name == 'caltech101':
            options['selection'] = 'val'
            yield (
                name,
                'val',
                FewShotConfig(features=str(file), methods=methods, **options),
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='folder of the two files')
    parser.add_argument('work_dir', type=Path, help='folder of the runs')
    parser.add_argument('--data', nargs='+', help='only these of the two data sets')
    args = parser.parse_args()
    head = ['data set', 'case', 'method', 'shots', 'seeds', 'accuracy', 'gain', 'half']
    rows = []
    for name, case, config in tables(args.folder, args.work_dir):
        if args.data and name not in args.data:
            continue
        folder = args.work_dir / f'{name} {case}'
        records = run(config, folder)
        write_report(folder, records)
        cells = collect(records)
        zero_shot = next(cell for cell in cells.values() if not cell.shots)
        for cell in cells.values():
            gain = cell.minus(zero_shot)
            numbers = (gain.mean, gain.half) if gain else (0.0, 0.0)
            numbers = [f'{x:.2f}' for x in (cell.mean, *numbers)]
            seeds = len(cell.records)
            rows.append([name, case, cell.label, cell.shots, seeds, *numbers])
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows([head, *rows])
        write_atomic(CSV, text.getvalue())
        print(f'{name}, {case}: {folder}/results.md', flush=True)


if __name__ == '__main__':
    main()

"""Writes the weights of a recorded run to share, with a card."""

import json
from pathlib import Path
from typing import Any

import yaml

from dsnet_mm.checkpoint import read_checkpoint, write_safetensors
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.resume import find_checkpoint_to_resume
from dsnet_mm.files import check_new, write_atomic

from .runs import ROOT, Run, as_json, differing, own_keys
from .tables import TABLES, percent

WEIGHTS = ROOT / 'weights'
# What makes weights what they are: the network and its training.
TRAINING = (
    'model',
    'train_dataloader',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
)


def publish(
    run: Run, name: str, config: Path | None = None, overwrite: bool = False
) -> str:
    """Writes ``weights/NAME.safetensors`` and the card ``weights/NAME.md``.

    The card has the metrics of the training's result and those of the written file.

    Args:
        run: A finished run.
        name: Name of the files.
        config: Configuration for those who use the weights, relative to the root of
            the repository, or None for that of the run. Both have the same training.
        overwrite: Whether to replace files of that name.

    Returns:
        The entry of ``configs/dsnet/metafile.yml``.

    Raises:
        FileExistsError: If a file exists and ``overwrite`` is False.
        FileNotFoundError: If the run is not recorded, or its checkpoint is missing.
        ValueError: If the training of ``config`` is another one.
    """
    weights, card = WEIGHTS / f'{name}.safetensors', WEIGHTS / f'{name}.md'
    if not overwrite:
        check_new(weights)
        check_new(card)
    checkpoint = find_checkpoint_to_resume(str(run.work_dir))
    if not (run.file.is_file() and checkpoint):
        raise FileNotFoundError(
            f'{run.file} and a checkpoint in {run.work_dir} are needed; run '
            f'python tools/reproduce.py {run.table} {run.row.name} --seed {run.seed}'
        )
    result = json.loads(run.file.read_text())
    if config is not None:
        check_training(run, config, result)
        run.config = config
    meta = dict(
        configuration=str(run.config), seed=str(run.seed), commit=result['commit']
    )
    write_safetensors(weights, read_checkpoint(checkpoint)['state_dict'], meta)
    metrics, _ = run.test(str(weights), run.work_dir / 'weights')
    write_atomic(card, make_card(run, name, result, metrics))
    return make_entry(run, name, result, metrics)


def check_training(run: Run, config: Path, result: dict[str, Any]) -> None:
    """Checks that a configuration is that of a recorded training.

    Args:
        run: The run.
        config: Configuration, relative to the root of the repository.
        result: Its recorded result.

    Raises:
        ValueError: If it has another model, other data or another schedule.
    """
    now = as_json(load_config(str(ROOT / config), {}))
    keys = {k for k in run.keys | own_keys(ROOT / config) if k[0] in TRAINING}
    if others := differing(result['config'], now, keys):
        raise ValueError(
            f'{config} has another {" and ".join(others)} than the run '
            f'`{result["command"]}`; give the configuration that trains these weights'
        )


def digits(key: str, metrics: dict[str, float]) -> float:
    """Returns a metric in percent, with one digit after the point."""
    return round(percent(key, metrics[key]), 1)


def make_entry(
    run: Run, name: str, result: dict[str, Any], metrics: dict[str, float]
) -> str:
    """Returns an entry of a metafile; arguments as those of :func:`make_card`."""
    table = TABLES[run.table]
    kept = list(table.metrics)[:1] + [m for m in table.metrics if m == 'coco/bbox_mAP']
    tasks = ('Image Classification', 'Instance Segmentation')
    data = table.title.split(',')[0]
    metrics = {table.metrics[m]: digits(m, metrics) for m in kept}
    entry = {
        'Name': name,
        'Config': str(run.config),
        'Weights': f'weights/{name}.safetensors',
        'Metadata': {'Training Data': data, 'Parameters': result['model']['params']},
        'Results': [dict(Task=tasks[len(kept) > 1], Dataset=data, Metrics=metrics)],
        'In Collection': 'DS-Net',
    }
    return yaml.safe_dump([entry], sort_keys=False)


def make_card(
    run: Run, name: str, result: dict[str, Any], metrics: dict[str, float]
) -> str:
    """Returns the card of weights in Markdown.

    Args:
        run: The run.
        name: Name of the weights.
        result: Its recorded result.
        metrics: Metrics of the written weights.
    """
    table = TABLES[run.table]
    machine = result['machine']
    versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
    weights = f'weights/{name}.safetensors'
    megabytes = (WEIGHTS / f'{name}.safetensors').stat().st_size / 1e6
    test = f'python tools/test.py {run.config} {weights}'
    rows = [
        f'| {key} | {digits(key, result["metrics"])} | {digits(key, metrics)} |'
        for key in table.metrics
    ]
    return '\n'.join(
        [
            f'# {name}',
            '',
            f'{run.row.label}. {result["model"]["params"] / 1e6:.2f} M parameters in '
            f'half precision, {megabytes:.1f} MB.',
            '',
            f'- Configuration: [{run.config}](../{run.config})',
            f'- Data: {table.data}',
            f'- Licence: that of this repository; {table.licence}',
            f'- Trained by `{result["command"]}`: seed {run.seed}, commit '
            f'{result["commit"]}, {result["train_cpu_seconds"]:.0f} processor seconds',
            f'- Machine: {machine["processor"]}, {machine["threads"]} threads; '
            f'{versions}',
            f'- Limits: {table.limits}',
            '',
            '| metric, % | training, single precision | this file |',
            '|---|--:|--:|',
            *rows,
            '',
            f'The last column is that of `{test}`.',
            '',
        ]
    )

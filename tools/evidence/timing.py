"""Times the rows of a table in turns, and measures their memory."""

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.runner import Runner

from dsnet_mm.engine.config import load_config
from dsnet_mm.environment import machine
from measure.memory import peak_in_child
from measure.turns import time_in_turns

from .runs import CONFIGS, ROOT, versions
from .tables import TABLES

KINDS = ('train', 'predict')
"""What is measured: a training step on a batch of the training data, and backbone and
neck on one image."""


def make_call(
    kind: str, config: str, options: dict[str, Any], size: int
) -> Callable[[], object]:
    """Builds a model with random weights and returns the call that is measured.

    Args:
        kind: One of ``KINDS``.
        config: Configuration file.
        options: Values of the configuration, by dotted name.
        size: Side of the image.
    """
    cfg = load_config(config, options)
    cfg.experiment_name = f'timing_{Path(config).stem}'
    cfg.work_dir = 'work_dirs/evidence/timing'
    for split in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{split}_{part}'] = None
    cfg.log_level = 'ERROR'
    cfg.model.backbone.init_cfg = None
    runner = Runner.from_cfg(cfg)
    model = runner.model
    if kind == 'train':
        optimizer = runner.build_optim_wrapper(cfg.optim_wrapper)
        batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
        model.train()
        return lambda: model.train_step(copy.deepcopy(batch), optimizer)
    image = torch.zeros(1, 3, size, size)
    model.eval()

    @torch.inference_mode()
    def predict() -> None:
        maps = model.backbone(image)
        if model.with_neck:
            model.neck(maps)

    return predict


def time_rows(name: str, turns: int, data_root: str | None) -> dict[str, Any]:
    """Times and measures every row of a table.

    Args:
        name: Name of the table.
        turns: Each turn calls every row once, after a first one that is dropped.
        data_root: Folder of the data, or None for that of the configurations.

    Returns:
        Median seconds of each row, the median of its ratio to the first row within the
        turns, and the most MiB that a call holds besides weights and input.
    """
    table = TABLES[name]
    root = {'data_root': data_root} if data_root else {}
    settings = {
        (row.name, kind): (
            kind,
            str(ROOT / CONFIGS / f'{row.config}.py'),
            {**row.options, **root},
            table.size,
        )
        for row in table.rows
        for kind in KINDS
    }
    calls = {key: make_call(*setting) for key, setting in settings.items()}
    times = time_in_turns(calls, range(turns + 1))
    rows: dict[str, dict] = {}
    for (row, kind), seconds in times.items():
        first = times[table.rows[0].name, kind]
        rows.setdefault(row, {})[kind] = dict(
            seconds=median(seconds),
            ratio=median(a / b for a, b in zip(seconds, first, strict=True)),
            mib=peak_in_child(make_call, *settings[row, kind]),
        )
    return dict(turns=turns, rows=rows, machine=machine(), versions=versions())

"""Times the rows of a table in turns, in one process."""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from .runs import CONFIGS, ROOT, load_config, machine, versions
from .tables import TABLES


def prepare(cfg: Config, size: int) -> dict[str, Callable[[], object]]:
    """Builds a model with random weights and the calls that are timed.

    Args:
        cfg: Configuration.
        size: Side of the picture that is predicted.

    Returns:
        ``train``: a training step on a batch of the training data. ``predict``: the
        raw outputs for one picture.
    """
    cfg.work_dir = 'work_dirs/evidence/timing'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.log_level = 'ERROR'
    cfg.model.backbone.init_cfg = None
    runner = Runner.from_cfg(cfg)
    model = runner.model
    optimizer = runner.build_optim_wrapper(cfg.optim_wrapper)
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
    picture = torch.zeros(1, 3, size, size)

    def train() -> None:
        model.train()
        model.train_step(copy.deepcopy(batch), optimizer)

    def predict() -> None:
        model.eval()
        with torch.inference_mode():
            maps = model.backbone(picture)
            if model.with_neck:
                model.neck(maps)

    return dict(train=train, predict=predict)


def time_rows(name: str, turns: int, data_root: str | None) -> dict[str, Any]:
    """Times backbone and neck on one picture, and a training step, of every row.

    Args:
        name: Name of the table.
        turns: Each turn calls every row once. The first turn is dropped.
        data_root: Folder of the data, or None for that of the configurations.

    Returns:
        Median seconds of each row, and the median of its ratio to the first row
        within the turns.
    """
    table = TABLES[name]
    root = {'data_root': data_root} if data_root else {}
    calls = {}
    for row in table.rows:
        cfg = load_config(str(ROOT / CONFIGS / f'{row.config}.py'), root)
        cfg.experiment_name = f'timing_{row.name}'
        calls[row.name] = prepare(cfg, table.size)
    seconds = {row: {kind: [] for kind in kinds} for row, kinds in calls.items()}
    for turn in range(turns + 1):
        for row, kinds in calls.items():
            for kind, call in kinds.items():
                start = time.perf_counter()
                call()
                if turn:
                    seconds[row][kind].append(time.perf_counter() - start)
    first = seconds[table.rows[0].name]
    return dict(
        turns=turns,
        rows={
            row: {
                kind: dict(
                    seconds=median(measured),
                    ratio=median(
                        a / b for a, b in zip(measured, first[kind], strict=True)
                    ),
                )
                for kind, measured in kinds.items()
            }
            for row, kinds in seconds.items()
        },
        machine=machine(),
        versions=versions(),
    )

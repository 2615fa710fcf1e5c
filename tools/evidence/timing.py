"""Times the rows of a table in turns, in one process, and measures their memory.

The memory of a row is measured in a process of its own, which runs this file.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.runner import Runner

from measure.memory import peak_of

from .runs import CONFIGS, ROOT, load_config, machine, versions
from .tables import TABLES


def prepare(
    config: str, options: dict[str, Any], size: int, data_root: str | None
) -> dict[str, Callable[[], object]]:
    """Builds a model with random weights and the calls that are measured.

    Args:
        config: Configuration file.
        options: Values of the configuration that the row sets, by dotted name.
        size: Side of the image.
        data_root: Folder of the data, or None for that of the configuration.

    Returns:
        ``train``: a training step on a batch of the training data. ``predict``:
        backbone and neck on one image.
    """
    root = {'data_root': data_root} if data_root else {}
    cfg = load_config(config, options | root)
    cfg.experiment_name = f'timing_{Path(config).stem}'
    cfg.work_dir = 'work_dirs/evidence/timing'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.log_level = 'ERROR'
    cfg.model.backbone.init_cfg = None
    runner = Runner.from_cfg(cfg)
    model = runner.model
    optimizer = runner.build_optim_wrapper(cfg.optim_wrapper)
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
    image = torch.zeros(1, 3, size, size)

    def train() -> None:
        model.train()
        model.train_step(copy.deepcopy(batch), optimizer)

    def predict() -> None:
        model.eval()
        with torch.inference_mode():
            maps = model.backbone(image)
            if model.with_neck:
                model.neck(maps)

    return dict(train=train, predict=predict)


def time_rows(name: str, turns: int, data_root: str | None) -> dict[str, Any]:
    """Times backbone and neck on one image, and a training step, of every row.

    Args:
        name: Name of the table.
        turns: Each turn calls every row once. The first turn is dropped.
        data_root: Folder of the data, or None for that of the configurations.

    Returns:
        Median seconds of each row, the median of its ratio to the first row within the
        turns, and the most MiB that a call holds besides weights and input.
    """
    table = TABLES[name]
    settings = {
        row.name: (
            str(ROOT / CONFIGS / f'{row.config}.py'),
            dict(row.options),
            table.size,
            data_root,
        )
        for row in table.rows
    }
    calls = {row: prepare(*setting) for row, setting in settings.items()}
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
                    mib=peak_in_child(kind, *settings[row]),
                )
                for kind, measured in kinds.items()
            }
            for row, kinds in seconds.items()
        },
        machine=machine(),
        versions=versions(),
    )


def peak_in_child(kind: str, *settings: Any) -> float:
    """Measures the memory of a call in a process of its own.

    Args:
        kind: Key of what :func:`prepare` returns.
        *settings: Its arguments.

    Raises:
        RuntimeError: If it fails.
    """
    command = [sys.executable, '-m', __name__, json.dumps([kind, *settings])]
    # Freed tensors go back to the system at once, so that each new one is counted.
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(child.stderr[-500:])
    return float(child.stdout.splitlines()[-1])


def main() -> None:
    """Prints the memory of the call that :func:`peak_in_child` names."""
    kind, *settings = json.loads(sys.argv[1])
    call = prepare(*settings)[kind]
    call()  # allocates what stays
    print(peak_of(call))


if __name__ == '__main__':
    main()

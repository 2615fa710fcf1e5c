"""Times DS-Net of this checkout against that of another checkout.

Each checkout has a worker process that imports its own ``dsnet_mm``. Both run the
program of this checkout, ``calls.py``. The workers take turns: one computes, the
other waits. Even turns start with the old checkout, odd turns with the new one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from rich.table import Table

import dsnet_mm

from .models import Panel, Settings

NEW = Path(dsnet_mm.__file__).resolve().parents[1]
"""This checkout."""

WORKER = Path(__file__).with_name('calls.py')


def check_checkout(old: Path) -> None:
    """Refuses a folder that cannot be compared with this checkout.

    Raises:
        FileNotFoundError: If there is no dsnet_mm in it.
        ValueError: If the operators are compiled in only one of the two.
    """
    if not (old / 'dsnet_mm' / '__init__.py').is_file():
        raise FileNotFoundError(f'there is no dsnet_mm in {old}; give a checkout.')
    compiled = {root: any(root.glob('dsnet_mm/ops/_C.*')) for root in (old, NEW)}
    if compiled[old] != compiled[NEW]:
        with_ops, without = sorted(compiled, key=compiled.get, reverse=True)
        raise ValueError(
            f'the operators are compiled in {with_ops} and not in {without}; run '
            f'python setup.py build_ext --inplace there.'
        )


class Worker:
    """A process that times a call of one checkout's DS-Net when it is told to.

    Args:
        checkout: Its dsnet_mm is imported.
        case: What ``calls.py`` takes.

    Raises:
        RuntimeError: If the process fails or imports another dsnet_mm.
    """

    def __init__(self, checkout: Path, case: dict) -> None:
        self.checkout = checkout
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(case)],
            env={**os.environ, 'PYTHONPATH': str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        imported = self._read()
        if not Path(imported).is_relative_to(checkout):
            self.stop()
            raise RuntimeError(f'the worker of {checkout} imported {imported}.')

    def time(self) -> float:
        """Returns the seconds of one call."""
        time.sleep(0.01)  # until the other worker's threads have stopped spinning
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return float(self._read())

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def _read(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            status = self.process.wait()
            raise RuntimeError(
                f'the worker of {self.checkout} ended with status {status}; its error '
                f'is above.'
            )
        return line


def compare(
    old: Path, panels: list[Panel], settings: Settings, arch: str | dict = 'small'
) -> Iterator[dict]:
    """Times both checkouts in alternating turns.

    Args:
        old: The other checkout.
        panels: Modes, sizes, dtypes and batches. Inference is timed fused and not.
        settings: Device, threads, turns and dropout. The first turn is dropped.
        arch: As in :class:`~dsnet_mm.models.DSNet`.

    Yields:
        A result for each row: its name, the median milliseconds of both checkouts,
        and median and quartiles of new / old. Each turn gives one such ratio.

    Raises:
        RuntimeError: If a worker fails.
    """
    for panel in panels:
        for fused in (False,) if panel.training else (True, False):
            case = panel._asdict() | settings._asdict() | dict(fused=fused, arch=arch)
            workers: list[Worker] = []
            times: list[list[float]] = [[], []]
            try:
                for checkout in (old, NEW):
                    workers.append(Worker(checkout, case))
                for turn in range(settings.turns):
                    for i in (0, 1) if turn % 2 == 0 else (1, 0):
                        times[i].append(workers[i].time())
            finally:
                for worker in workers:
                    worker.stop()
            old_times, new_times = times[0][1:], times[1][1:]
            ratios = [b / a for a, b in zip(old_times, new_times, strict=True)]
            low, ratio, high = quantiles(ratios, n=4, method='inclusive')
            form = '' if panel.training else ', fused' if fused else ', not fused'
            yield {
                'row': panel.title + form,
                'old_ms': 1e3 * median(old_times),
                'new_ms': 1e3 * median(new_times),
                'ratio': ratio,
                'quartiles': (low, high),
            }


def table_of_comparison(results: list[dict]) -> Table:
    """Returns the table of the results of :func:`compare`."""
    table = Table('DS-Net-S*', title='this checkout against another')
    for header in ('old, ms', 'new, ms', 'new / old', 'quartiles of turns'):
        table.add_column(header, justify='right')
    for result in results:
        low, high = result['quartiles']
        table.add_row(
            result['row'],
            f'{result["old_ms"]:.1f}',
            f'{result["new_ms"]:.1f}',
            f'{result["ratio"]:.3f}',
            f'{low:.3f} to {high:.3f}',
        )
    return table

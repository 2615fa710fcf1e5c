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

from .rows import Panel

TOOLS = Path(__file__).resolve().parents[1]
NEW = TOOLS.parent
"""This checkout."""


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
    """

    def __init__(self, checkout: Path, case: dict) -> None:
        self.checkout = checkout
        path = os.pathsep.join([str(checkout), str(TOOLS)])
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'measure.calls', json.dumps(case)],
            cwd=checkout,
            env={**os.environ, 'PYTHONPATH': path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        """Waits until the worker is ready.

        Raises:
            RuntimeError: If the process fails or imports another dsnet_mm.
        """
        imported = self._read()
        if not Path(imported).is_relative_to(self.checkout):
            raise RuntimeError(f'the worker of {self.checkout} imported {imported}.')

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


def compare(old: Path, panels: list[Panel], turns: int, threads: int) -> Iterator[dict]:
    """Times both checkouts in alternating turns.

    Args:
        old: The other checkout.
        panels: Modes, sizes, dtypes and batches. Inference is timed fused and not.
        turns: Number of turns. The first turn is dropped.
        threads: Number of threads.

    Yields:
        A result for each row: its name, the median milliseconds of both checkouts,
        and median and quartiles of new / old. Each turn gives one such ratio.

    Raises:
        RuntimeError: If a worker fails.
    """
    for panel in panels:
        for fused in (False,) if panel.training else (True, False):
            case = panel._asdict() | dict(threads=threads, fused=fused)
            workers: list[Worker] = []
            pairs = []
            try:
                for checkout in (old, NEW):
                    workers.append(Worker(checkout, case))
                    workers[-1].check()
                for turn in range(turns):
                    order = workers if turn % 2 == 0 else workers[::-1]
                    times = {worker: worker.time() for worker in order}
                    pairs.append([times[worker] for worker in workers])
            finally:
                for worker in workers:
                    worker.stop()
            low, ratio, high = quantiles(
                [b / a for a, b in pairs[1:]], n=4, method='inclusive'
            )
            form = '' if panel.training else ', fused' if fused else ', not fused'
            yield {
                'row': panel.title + form,
                'old_ms': 1e3 * median(a for a, _ in pairs[1:]),
                'new_ms': 1e3 * median(b for _, b in pairs[1:]),
                'ratio': ratio,
                'quartiles': (low, high),
            }


def table_of_comparison(results: list[dict]) -> Table:
    """Returns the table of the results of :func:`compare`."""
    table = Table('DS-Net-S*', title='this checkout against another')
    for header in ('old, ms', 'new, ms', 'new / old', 'quartiles of turns'):
        table.add_column(header, justify='right')
    for result in results:
        old, new = (f'{result[key]:.1f}' for key in ('old_ms', 'new_ms'))
        quartiles = '{:.3f} to {:.3f}'.format(*result['quartiles'])
        table.add_row(result['row'], old, new, f'{result["ratio"]:.3f}', quartiles)
    return table

"""Measures the memory of a row in a process of its own.

The parent calls :func:`peak_in_child`, which runs this file as a program.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .models import Panel, Row, Settings, prepare


def peak_in_child(row: Row, panel: Panel, settings: Settings) -> float:
    """Runs :func:`peak_here` in a process of its own.

    Raises:
        RuntimeError: If it fails.
    """
    command = [sys.executable, '-m', __name__, json.dumps([row, panel, settings])]
    # Freed tensors go back to the system at once, so that each new one is counted.
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        status = f'the process ended with status {child.returncode}'
        raise RuntimeError((child.stderr.splitlines() or [status])[-1])
    return float(child.stdout.splitlines()[-1])


def peak_here(row: Row, panel: Panel, settings: Settings) -> float:
    """Returns the most MiB that one call holds besides weights and input."""
    net, call = prepare(row, panel, settings)
    call()  # allocates what stays: kernels, threads, compiled code
    net.zero_grad(set_to_none=True)
    if settings.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_of(call)


def peak_of(call: Callable[[], object]) -> float:
    """Returns by how many MiB this process grows at most during a call."""

    def mib(field: str) -> float:
        status = Path('/proc/self/status').read_text()
        return int(re.search(rf'{field}:\s+(\d+)', status)[1]) / 1024

    # Not ru_maxrss: it cannot be reset, and it starts at the parent's size.
    Path('/proc/self/clear_refs').write_text('5')
    before = mib('VmRSS')
    call()
    return mib('VmHWM') - before


def main() -> None:
    row, panel, settings = json.loads(sys.argv[1])
    mode, size, dtype, batch = panel
    settings = Settings(*settings)
    torch.set_num_threads(settings.threads)
    panel = Panel(mode, tuple(size), dtype, batch)
    print(peak_here(Row(*row), panel, settings))


if __name__ == '__main__':
    main()

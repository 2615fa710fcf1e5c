"""Times the rows of a table in turns."""

from collections.abc import Callable, Hashable
from statistics import median

import torch

from .calls import time_call
from .models import (
    DTYPES,
    MODELS,
    Panel,
    Row,
    Settings,
    multiply_adds,
    prepare,
    rows_of,
)

PRODUCT = (4096, 2048, 2048)
"""Rows, inner size and columns of the matrix product whose rate gives the floor."""


def time_in_turns(
    calls: dict[Hashable, Callable[[], object]],
    settings: Settings,
    advance: Callable[[], None],
) -> tuple[dict[Hashable, float], dict[Hashable, str]]:
    """Times calls in turns: each turn runs every call once.

    Args:
        calls: The calls by name.
        settings: The number of turns and the device. The first turn is dropped.
        advance: Called after each call, for a progress bar.

    Returns:
        The median seconds of each call, and the reason for each that failed.
    """
    times, errors = {name: [] for name in calls}, {}
    for _ in range(settings.turns):
        for name, call in calls.items():
            if name not in errors:
                try:
                    times[name].append(time_call(call, settings.device))
                except Exception as error:  # one that fails must not end the run
                    errors[name] = one_line(error)
            advance()
    seconds = {n: median(times[n][1:]) for n in calls if n not in errors}
    return seconds, errors


def measure(
    panel: Panel, settings: Settings, advance: Callable[[], None]
) -> tuple[dict[Row, dict], Callable[[], None] | None]:
    """Times the rows of a table.

    Args:
        panel: The table.
        settings: Models, device and turns.
        advance: Called after each call, for a progress bar.

    Returns:
        The result of each row, without memory, and the timed call of DS-Net or None.
        Of the two memory formats of a model there is only the faster one.
    """
    torch.compiler.reset()
    rows = rows_of(panel, settings)
    calls, errors = {}, {}
    for row in rows:
        try:
            _, calls[row] = prepare(row, panel, settings)
        except Exception as error:  # a size that a peer does not take
            errors[row] = one_line(error)
    options = dict(dtype=DTYPES[panel.dtype], device=settings.device)
    height, inner, width = PRODUCT
    a, b = torch.randn(height, inner, **options), torch.randn(inner, width, **options)
    c = torch.empty(height, width, **options)
    calls['product'] = lambda: torch.mm(a, b, out=c)
    seconds, failed = time_in_turns(calls, settings, advance)
    errors |= failed
    peak = 2 * height * inner * width / seconds['product']

    best: dict[str, Row] = {}  # memory format of each model
    for row in sorted(rows, key=lambda row: seconds.get(row, 1e9)):
        best.setdefault(row.name, row)
    ours = seconds.get(Row('ours'))
    results = {}
    for name in dict.fromkeys(row.name for row in rows):
        row = best[name]
        result = dict(
            model=name,
            ms=None,
            images_per_s=None,
            times_ours=None,
            peak_mib=None,
            gflop=None,
            floor_ms=None,
            floor_fraction=None,
            layout=row.layout,
            error=errors.get(row),
            top1=MODELS[row.key][2],
            peak_gflops=peak / 1e9,
        )
        if row in seconds:
            flop = 2 * panel.batch * multiply_adds(row.key, panel.size)
            flop *= 3 if panel.training else 1
            result |= dict(
                ms=seconds[row] * 1e3,
                images_per_s=panel.batch / seconds[row],
                times_ours=seconds[row] / ours if ours else None,
                gflop=flop / 1e9,
                floor_ms=flop / peak * 1e3,
                floor_fraction=flop / peak / seconds[row],
            )
        results[row] = result
    return results, calls[Row('ours')] if ours else None


def one_line(error: Exception) -> str:
    """Returns the type and the message of an error, in 200 characters at most."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:200]

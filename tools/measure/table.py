"""Tables of the results for the terminal."""

from collections.abc import Callable

import torch
from rich.table import Table

from .models import Panel

COLUMNS = dict(  # header and format of each field
    ms=('ms', '.1f'),
    images_per_s=('images/s', '.1f'),
    times_ours=('x ours', '.2f'),
    peak_mib=('memory, MiB', '.0f'),
    gflop=('GFLOP', '.1f'),
    floor_ms=('floor, ms', '.1f'),
    floor_fraction=('floor / time', '.0%'),
)


def table_of(results: list[dict], panel: Panel) -> Table:
    """Returns the table of a panel's results."""
    product = f'a matrix product reaches {results[0]["peak_gflops"]:.0f} GFLOP/s'
    table = Table('model', title=f'{panel.title}; {product}')
    for header, _ in COLUMNS.values():
        table.add_column(header, justify='right')
    table.add_column('memory format, or error')
    for result in results:
        cells = [
            '-' if result[field] is None else format(result[field], spec)
            for field, (_, spec) in COLUMNS.items()
        ]
        table.add_row(result['model'], *cells, result['error'] or result['layout'])
    return table


def table_of_operators(call: Callable[[], object], device: str) -> Table:
    """Profiles a call and returns the operators with over 1 % of its time."""
    field = f'self_{"device" if device == "cuda" else "cpu"}_time_total'
    with torch.profiler.profile() as profiler:
        call()
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    table = Table('operator', 'calls', 'ms', 'share', title='Operators of DS-Net-S*')
    for event in events:
        used = getattr(event, field)
        if used > 0.01 * total:
            cells = str(event.count), f'{used / 1e3:.2f}', f'{used / total:.1%}'
            table.add_row(event.key[:60], *cells)
    return table

"""What docs/speed.md shows: its panels, its tables and its plot."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from dsnet_mm.files import write_atomic

from .calls import MAX_GLOBAL_TOKENS
from .rows import DTYPES, KEYS, NAMES, PARTS, Panel

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / 'results' / 'speed.csv'
PAGE = ROOT / 'docs' / 'speed.md'
PLOT = ROOT / 'docs' / 'images' / 'speed.png'

MODES = ('inference', 'training')
KINDS = [(mode, dtype) for mode in MODES for dtype in DTYPES]
DETECTION = (800, 1344)
SIZES = ((448, 448), DETECTION, (1088, 1920), (1536, 2048))
INPUTS = (((224, 224), 8), *((size, 1) for size in SIZES))  # with batch
SAME = ('machine', 'threads', 'torch', 'timm', 'mmdet', 'commit')
"""What all rows of a record have in common."""


def panels_of_page() -> list[Panel]:
    """Returns the panels of docs/speed.md."""
    one = Panel('inference', DETECTION, 'float32', 1, MAX_GLOBAL_TOKENS)
    kinds = [one._replace(mode=mode, dtype=dtype) for mode, dtype in KINDS]
    return [
        *(one._replace(mode=mode, network='detector') for mode in MODES),
        *(kind._replace(network='neck') for kind in kinds),
        *(kind._replace(size=size, batch=n) for kind in kinds for size, n in INPUTS),
    ]


def keys_of(panel: Panel) -> list[str]:
    """Returns the rows of a panel: the plain network only where it is quick."""
    small = panel.size in ((224, 224), DETECTION)
    quick = small and (panel.mode, panel.dtype) == KINDS[0]
    return [key for key in KEYS if key != 'plain' or quick]


def has_memory(panel: Panel) -> bool:
    """Tells whether the memory of a panel is measured."""
    found = (panel.network, panel.size, panel.dtype)
    return found == ('backbone', DETECTION, 'float32')


def panel_of(row: dict) -> tuple[str, ...]:
    """Returns what tells the panel of a row from the others."""
    return tuple(str(row[field]) for field in ('network', 'size', 'mode', 'dtype'))


def write_csv(rows: list[dict]) -> None:
    """Writes the record."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(RECORD, text.getvalue())


def read_csv() -> list[dict[str, str]]:
    """Reads the record, no rows if there is none."""
    text = RECORD.read_text() if RECORD.is_file() else ''
    return list(csv.DictReader(text.splitlines()))


def table(*rows: list[str]) -> str:
    """Returns a table in Markdown; the first row is its head."""
    rule = ['---'] + ['--:'] * (len(rows[0]) - 1)
    return '\n'.join(f'| {" | ".join(r)} |' for r in (rows[0], rule, *rows[1:]))


def show(number: float | None, spec: str = '.2f') -> str:
    """Formats a number, a dash if there is none."""
    return '-' if number is None else f'{number:{spec}}'


def ratio(number: float | None) -> str:
    """Formats the time of a peer over ours: bold where the peer is faster."""
    return f'**{number:.2f}**' if number and number < 1 else show(number)


def sections(rows: list[dict[str, str]]) -> dict[str, str]:
    """Returns the generated parts of the page by name.

    Args:
        rows: Rows of the record. If there are none, the parts say so.

    Raises:
        ValueError: If the rows are of several commits or machines.
    """
    if not rows:
        text = 'TO-MEASURE: `python tools/analysis_tools/benchmark.py --record`'
        parts = ('run', 'plot', 'ratios', 'memory', 'detectors', 'necks')
        return dict.fromkeys(parts, text)
    for field in SAME:
        if len(found := sorted({row[field] for row in rows})) > 1:
            raise ValueError(
                f'{RECORD.name} is of several runs, its {field} is '
                f'{" and ".join(found)}; measure it by --record'
            )
    cells = {(*panel_of(row), row['key']): row for row in rows}

    def get(
        field: str, network: str, kind: tuple, keys: Iterable[str], size=DETECTION
    ) -> list[float | None]:
        panel = (network, '{}x{}'.format(*size), *kind)
        found = [cells.get((*panel, key), {}).get(field) for key in keys]
        return [float(text) if text else None for text in found]

    names, detectors = NAMES['backbone'], NAMES['detector']
    peers = [key for key in names if key != 'ours']
    ratios, growth, memory, heads, necks = [], [], [], [], []
    for kind in KINDS:
        pixels = []
        for size, batch in INPUTS:
            title = f'{", ".join(kind)}, {size[0]}x{size[1]}' + ' x 8' * (batch > 1)
            pixels += get('us_per_pixel', 'backbone', kind, ['ours'], size)
            found = get('times_ours', 'backbone', kind, peers, size)
            ratios.append([title, show(pixels[-1]), *map(ratio, found)])
        if all(pixels):
            high, low = max(pixels[1:]), min(pixels[1:])  # without the batch of 8
            growth.append(f'{high / low - 1:.0%} ({", ".join(kind)})')
        found = get('ms', 'neck', kind, ['fpn', 'ours', 'uncapped'])
        if all(found):
            both = [show(ms / found[0]) for ms in found[1:]]
            necks.append([', '.join(kind), *both])
    for mode in MODES:
        kind = (mode, 'float32')
        mib = get('peak_mib', 'backbone', kind, names)
        memory.append([mode, *(show(number, '.0f') for number in mib)])
        for key in detectors:
            ms, times = (
                get(f, 'detector', kind, [key])[0] for f in ('ms', 'times_ours')
            )
            parts = [get(f'{part}_ms', 'detector', kind, [key])[0] for part in PARTS]
            if ms:
                shares = [f'{part / ms:.0%}' for part in parts]
                title = f'{mode}, {detectors[key]}'
                heads.append([title, show(ms / 1e3), ratio(times), *shares])
    titles = ['ours', *(names[key] for key in peers)]
    facts = '{machine}, {threads} threads; torch {torch}, timm {timm}, mmdet {mmdet}'
    return dict(
        run=(facts + '; commit {commit}, {date}.').format(**rows[0]),
        plot='![Microseconds a pixel over the size of images](images/speed.png)\n\n'
        'From 448x448 to 1536x2048, the largest time a pixel of ours exceeds the '
        f'smallest by {", ".join(growth)}.',
        ratios=table(['', 'ours, us a pixel', *titles[1:]], *ratios),
        memory=table(['MiB', *titles], *memory),
        detectors=table(
            ['', 'seconds', 'ratio', 'backbone', 'neck', 'RPN', 'RoI heads'], *heads
        ),
        necks=table(['time over that of FPN', 'DS-FPN', 'uncapped'], *necks),
    )


def write_page() -> list[Path]:
    """Writes the generated parts of docs/speed.md, and its plot.

    Returns:
        The files that were written.
    """
    from evidence.report import fill

    rows = read_csv()
    write_atomic(PAGE, fill(PAGE.read_text(), sections(rows)))
    if rows:
        write_atomic(PLOT, draw(rows))
    return [PAGE, PLOT][: 1 + bool(rows)]


def draw(rows: list[dict[str, str]]) -> bytes:
    """Plots the time a pixel of backbones over the size of single images, in float32.

    Args:
        rows: Rows of the record.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure((11, 4), dpi=110, layout='constrained')
    for ax, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for size in SIZES:
            panel = ('backbone', '{}x{}'.format(*size), mode, 'float32')
            for row in rows:
                shown = panel_of(row) == panel and row['key'] != 'plain'
                if shown and row['us_per_pixel']:
                    point = (size[0] * size[1], float(row['us_per_pixel']))
                    lines.setdefault(row['key'], []).append(point)
        # The legend has the order of the lines at their right end.
        for key in sorted(lines, key=lambda key: -lines[key][-1][1]):
            index = list(NAMES['backbone']).index(key)
            ax.plot(
                *zip(*lines[key], strict=True),
                '--o' if key == 'uncapped' else '-o',
                color='black' if index < 2 else f'C{index}',
                linewidth=1.3 if index else 2.5,
                markersize=4,
                label=NAMES['backbone'][key].replace('*', '\u2217'),
            )
        ax.set(title=f'{mode}, float32', ylabel='microseconds a pixel', ylim=0)
        sizes = ['{}x{}'.format(*size) for size in SIZES]
        ax.set_xticks([height * width for height, width in SIZES], sizes, fontsize=7)
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(fontsize=8)
    buffer = io.BytesIO()
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()

"""What docs/speed.md shows: its panels, its tables and its plot."""

import csv
import io
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


def write_csv(rows: list[dict], path: Path) -> None:
    """Writes rows, which all have the same columns."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads rows, none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def table(*rows: list[str]) -> str:
    """Returns a table in Markdown; the first row is its head."""
    rule = ['---'] + ['--:'] * (len(rows[0]) - 1)
    return '\n'.join(f'| {" | ".join(r)} |' for r in (rows[0], rule, *rows[1:]))


def ratio(number: float | None) -> str:
    """Formats the time of a peer over ours: bold where the peer is faster."""
    if number is None:
        return '-'
    return f'**{number:.2f}**' if number < 1 else f'{number:.2f}'


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

    def get(field: str, network: str, size: tuple, kind: tuple, key: str):
        height, width = size
        at = (network, f'{height}x{width}', *kind, key)
        text = cells.get(at, {}).get(field)
        return float(text) if text else None

    def numbers(field: str, network: str, keys: list[str], kind: tuple) -> list:
        return [get(field, network, DETECTION, kind, key) for key in keys]

    ratios, growth, heads, necks = [], [], [], []
    peers = [key for key in NAMES['backbone'] if key != 'ours']
    for kind in KINDS:
        for size, batch in INPUTS:
            title = f'{", ".join(kind)}, {size[0]}x{size[1]}' + ' x 8' * (batch > 1)
            pixel = get('us_per_pixel', 'backbone', size, kind, 'ours')
            found = [get('times_ours', 'backbone', size, kind, key) for key in peers]
            ratios.append([title, f'{pixel or 0:.2f}', *map(ratio, found)])
        pixel = [get('us_per_pixel', 'backbone', size, kind, 'ours') for size in SIZES]
        if all(pixel):
            growth.append(f'{max(pixel) / min(pixel) - 1:.0%} ({", ".join(kind)})')
        fpn, *ours = numbers('ms', 'neck', ['fpn', 'ours', 'uncapped'], kind)
        necks.append([', '.join(kind), *(f'{(x or 0) / (fpn or 1):.2f}' for x in ours)])
    kinds = [(mode, 'float32') for mode in MODES]
    for kind in kinds:
        for key, name in NAMES['detector'].items():
            fields = ['ms', 'times_ours', *(f'{part}_ms' for part in PARTS)]
            found = [get(field, 'detector', DETECTION, kind, key) for field in fields]
            if all(found):
                shares = [f'{part / found[0]:.0%}' for part in found[2:]]
                cell = [f'{kind[0]}, {name}', f'{found[0] / 1e3:.2f}']
                heads.append([*cell, ratio(found[1]), *shares])
    names = [NAMES['backbone'][key] for key in peers]
    mib = [numbers('peak_mib', 'backbone', NAMES['backbone'], kind) for kind in kinds]
    facts = '{machine}, {threads} threads; torch {torch}, timm {timm}, mmdet {mmdet}'
    return dict(
        run=(facts + '; commit {commit}, {date}.').format(**rows[0]),
        plot='![Microseconds a pixel over the size of images](images/speed.png)\n\n'
        'Largest over smallest time a pixel of DS-Net-S\\*, from 448x448 to 1536x2048, '
        f'less one: {", ".join(growth)}.',
        ratios=table(['', 'ours, us a pixel', *names], *ratios),
        memory=table(
            ['MiB', 'ours', *names],
            *(
                [mode, *(f'{x:.0f}' if x else '-' for x in found)]
                for mode, found in zip(MODES, mib, strict=True)
            ),
        ),
        detectors=table(
            ['', 'seconds', 'ratio', 'backbone', 'neck', 'RPN', 'RoI heads'], *heads
        ),
        necks=table(['time over that of FPN', 'DS-FPN', 'DS-FPN, uncapped'], *necks),
    )


def write_page() -> list[Path]:
    """Writes the generated parts of docs/speed.md, and its plot.

    Returns:
        The files that were written.
    """
    from evidence.report import fill

    rows = read_csv(RECORD)
    write_atomic(PAGE, fill(PAGE.read_text(), sections(rows)))
    image = draw([row for row in rows if row['dtype'] == 'float32'])
    if image:
        write_atomic(PLOT, image)
    return [PAGE, PLOT] if image else [PAGE]


def draw(rows: list[dict]) -> bytes:
    """Plots the time a pixel of backbones over the size, a plot a mode and dtype.

    Args:
        rows: Rows of a table. Those of one image are shown, without the plain network.

    Returns:
        A PNG file, empty if there are no such rows.
    """
    from matplotlib.figure import Figure

    plots: dict[str, dict[str, dict[int, float]]] = {}
    ticks = {}
    for row in rows:
        one = str(row['batch']) == '1' and row['key'] != 'plain'
        if row['network'] == 'backbone' and one and row['us_per_pixel']:
            height, width = map(int, row['size'].split('x'))
            ticks[height * width] = row['size']
            lines = plots.setdefault(f'{row["mode"]}, {row["dtype"]}', {})
            points = lines.setdefault(row['key'], {})
            points[height * width] = float(row['us_per_pixel'])
    if not plots:
        return b''
    figure = Figure((5.5 * len(plots), 4), dpi=110, layout='constrained')
    axes = figure.subplots(1, len(plots), squeeze=False)[0]
    for ax, (title, lines) in zip(axes, plots.items(), strict=True):
        # The legend has the order of the lines at their right end.
        for key in sorted(lines, key=lambda key: -lines[key][max(lines[key])]):
            index = list(NAMES['backbone']).index(key)
            ax.plot(
                *zip(*sorted(lines[key].items()), strict=True),
                '--o' if key == 'uncapped' else '-o',
                color='black' if index < 2 else f'C{index}',
                linewidth=1.3 if index else 2.5,
                markersize=4,
                label=NAMES['backbone'][key].replace('*', '\u2217'),
            )
        ax.set(title=title, xscale='log', ylim=0, ylabel='microseconds a pixel')
        ax.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
        ax.legend(fontsize=8)
    buffer = io.BytesIO()
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(buffer, format='png', metadata={'Software': None})
    return buffer.getvalue()

"""Table and plot of a few-shot run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from dsnet_mm.files import write_atomic

from .methods import METHODS

REFERENCE = 'clip_adapter'
"""Method that the others are compared with, on the same draws."""


@dataclass(frozen=True)
class Cell:
    """A method at some shots.

    Attributes:
        label: Method, and ``oracle`` if it was selected on the test split.
        shots: Shots, 0 for zero-shot.
        accuracies: Test accuracy by seed, in percent.
        ece: Mean expected calibration error, in percent.
        fit_seconds: Mean time of a fit.
        select_seconds: Mean time of selection and fit.
        parameters: Number of learnt parameters.
    """

    label: str
    shots: int
    accuracies: dict[int, float]
    ece: float
    fit_seconds: float
    select_seconds: float
    parameters: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracies.values())))

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval of the mean over seeds."""
        return half_interval(list(self.accuracies.values()))


def half_interval(values: list[float]) -> float | None:
    """Half of the 95 % confidence interval of a mean, by Student's t.

    Args:
        values: One value for each seed.

    Returns:
        Half the width, or None for fewer than three values.
    """
    if len(values) < 3:
        return None
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def collect(records: list[dict]) -> list[Cell]:
    """Group the records of a run by method and shots."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for record in records:
        oracle = ' (oracle)' if record['selection'] == 'oracle' else ''
        label = METHODS[record['method']].title + oracle
        groups.setdefault((label, record['shots']), []).append(record)
    return [
        Cell(
            label,
            shots,
            {r['seed']: r['test']['accuracy'] for r in group},
            float(np.mean([r['test']['ece'] for r in group])),
            float(np.mean([r['fit_seconds'] for r in group])),
            float(np.mean([r['select_seconds'] for r in group])),
            group[0]['parameters'],
        )
        for (label, shots), group in groups.items()
    ]


def table(records: list[dict], about: dict) -> str:
    """Format a run as Markdown.

    Args:
        records: What ``run`` returned.
        about: Content of ``run.json``.

    Returns:
        Two tables. First: the accuracy of each method by shots, with the 95 %
        confidence interval of the mean over seeds. Second, at the most shots: the
        gain over zero-shot, the paired comparison with CLIP-Adapter, calibration,
        time and parameters. Then the methods that are not above zero-shot by more
        than the interval.
    """
    cells = {(cell.label, cell.shots): cell for cell in collect(records)}
    zero_shot = next(cell for cell in cells.values() if cell.shots == 0)
    shots = sorted({cell.shots for cell in cells.values()} - {0})
    labels = list(dict.fromkeys(label for label, k in cells if k))
    config = about['config']
    prompts = about['prompts']
    lines = [
        f'# {Path(config["dataset"]).name}, {Path(config["model"]).stem}',
        '',
        f'{len(about["class_names"])} classes, '
        f'{records[0]["test"]["pictures"]} test pictures, seeds '
        f'{", ".join(map(str, config["seeds"]))}; preprocessing '
        f'`{config["preprocessing"]}`; '
        + (
            f'prompt `{prompts[0]}`'
            if len(prompts) == 1
            else f'{len(prompts)} prompts from `{prompts[0]}` on'
        )
        + f'; hyper-parameters by `{config["selection"]}`. Test accuracy in %, mean '
        'and 95 % confidence interval over seeds (Student t).',
        '',
        '| method | ' + ' | '.join(f'{k} shots' for k in shots) + ' |',
        '|---|' + '--:|' * len(shots),
        f'| {zero_shot.label} | '
        + ' | '.join([f'{zero_shot.mean:.2f}'] * len(shots))
        + ' |',
    ]
    for label in labels:
        row = [_with_interval(cells.get((label, k))) for k in shots]
        lines.append(f'| {label} | ' + ' | '.join(row) + ' |')
    if any('(oracle)' in label for label in labels):
        lines += [
            '',
            'Oracle: hyper-parameters chosen on the test split; not a result.',
        ]

    most = shots[-1]
    reference = cells.get((METHODS[REFERENCE].title, most))
    lines += [
        '',
        f'## At {most} shots',
        '',
        '| method | gain over zero-shot | minus CLIP-Adapter, paired (p) | ECE '
        '| fit, s | with selection, s | parameters |',
        '|---|--:|--:|--:|--:|--:|--:|',
        f'| {zero_shot.label} | - | - | {zero_shot.ece:.1f} | - | - | 0 |',
    ]
    behind = []
    for label in labels:
        cell = cells.get((label, most))
        if cell is None:
            continue
        gain = cell.mean - zero_shot.mean
        if cell.interval is None or gain <= cell.interval:
            behind.append(label)
        interval = '' if cell.interval is None else f' ± {cell.interval:.2f}'
        lines.append(
            f'| {label} | {gain:+.2f}{interval} | {_paired(cell, reference)} | '
            f'{cell.ece:.1f} | {cell.fit_seconds:.2f} | {cell.select_seconds:.2f} | '
            f'{cell.parameters:,} |'
        )
    if behind:
        why = (
            ' (three seeds or more are needed to tell)'
            if len(config['seeds']) < 3
            else ''
        )
        lines += [
            '',
            f'Not above zero-shot by more than the confidence interval at {most} '
            f'shots{why}: {", ".join(behind)}.',
        ]
    else:
        lines += [
            '',
            f'All methods are above zero-shot by more than the confidence interval at '
            f'{most} shots.',
        ]
    return '\n'.join(lines) + '\n'


def _with_interval(cell: Cell | None) -> str:
    if cell is None:
        return '-'
    half = '' if cell.interval is None else f' ± {cell.interval:.2f}'
    return f'{cell.mean:.2f}{half}'


def _paired(cell: Cell, reference: Cell | None) -> str:
    """Format the mean difference on the same draws, its interval and paired p-value."""
    if reference is None or cell is reference:
        return '-'
    seeds = sorted(cell.accuracies.keys() & reference.accuracies.keys())
    gaps = [cell.accuracies[s] - reference.accuracies[s] for s in seeds]
    half = half_interval(gaps)
    if half is None:
        return f'{np.mean(gaps):+.2f}'
    p = stats.ttest_1samp(gaps, 0).pvalue if np.std(gaps) > 0 else float('nan')
    return f'{np.mean(gaps):+.2f} ± {half:.2f} ({p:.2f})'


def plot(records: list[dict], about: dict, path: str | Path) -> None:
    """Plot the accuracy over shots with confidence intervals.

    Args:
        records: What ``run`` returned.
        about: Content of ``run.json``.
        path: PNG file to write.
    """
    import io

    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cells = collect(records)
    zero_shot = next(cell for cell in cells if cell.shots == 0)
    figure = Figure((7.2, 4.6), dpi=150, layout='constrained')
    axes = figure.subplots()
    axes.axhline(zero_shot.mean, color='0.35', ls='--', lw=1.2, label=zero_shot.label)
    markers = 'osD^vP*X<>hp'
    labels = list(dict.fromkeys(c.label for c in cells if c.shots))
    for i, label in enumerate(labels):
        line = sorted((c for c in cells if c.label == label), key=lambda c: c.shots)
        is_main = label == METHODS[REFERENCE].title
        # Side by side, so that intervals can be told apart.
        shift = 2 ** (0.25 * (i / max(len(labels) - 1, 1) - 0.5))
        _, _, bars = axes.errorbar(
            [c.shots * shift for c in line],
            [c.mean for c in line],
            [c.interval or 0 for c in line],
            label=label,
            color='black' if is_main else colormaps['tab20'](2 * i % 20 + i // 10),
            marker=markers[i % len(markers)],
            ls=':' if 'oracle' in label else '-',
            lw=2.4 if is_main else 1.3,
            ms=5,
            elinewidth=1,
            zorder=3 if is_main else 2,
        )
        for bar in bars:
            bar.set_alpha(0.4)
    shots = sorted({c.shots for c in cells} - {0})
    axes.set_xscale('log', base=2)
    axes.set_xticks(shots, map(str, shots))
    axes.set(
        xlabel='labelled pictures of each class',
        ylabel='test accuracy, %',
        title=f'{Path(about["config"]["dataset"]).name}, '
        f'{Path(about["config"]["model"]).stem}',
    )
    axes.grid(color='0.9')
    axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    write_atomic(path, buffer.getvalue())


def write_report(work_dir: str | Path, records: list[dict]) -> str:
    """Write ``results.md`` and ``accuracy.png`` of a finished run.

    Args:
        work_dir: Folder of the run.
        records: What ``run`` returned.

    Returns:
        The table.
    """
    work_dir = Path(work_dir)
    about = json.loads((work_dir / 'run.json').read_text(encoding='utf-8'))
    text = table(records, about)
    write_atomic(work_dir / 'results.md', text)
    plot(records, about, work_dir / 'accuracy.png')
    return text

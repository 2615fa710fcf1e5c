"""Writes the tables and plots of the documentation from the recorded results."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

from dsnet_mm.files import write_atomic

from .runs import RESULTS, ROOT
from .tables import TABLES, Row, is_sweep, percent

PAGES = tuple(ROOT / 'docs' / f'{x}.md' for x in ('results', 'few_shot_detection'))
PLOTS = ROOT / 'docs' / 'images'

SHOWN = ('coco/segm_mAP', 'coco/segm_mAP_50', 'coco/bbox_mAP', 'accuracy/top1')
"""Metrics of the page; results/ has all of them."""

Results = Mapping[str, Mapping[int, dict[str, Any]]]
"""Results of a table by row and seed."""


def read_results(name: str) -> Results:
    """Reads the recorded results of a table, rows without any left out."""
    found: dict[str, dict[int, dict]] = {}
    for row in TABLES[name].rows:
        for path in sorted(RESULTS.glob(f'{name}/{row.name}-seed*.json')):
            result = json.loads(path.read_text())
            found.setdefault(row.name, {})[result['seed']] = result
    return found


def values(results: Results, row: str, metric: str) -> dict[int, float]:
    """Returns a metric of a row by seed, in percent; -1 stands for no objects."""
    return {
        seed: percent(metric, result['metrics'][metric])
        for seed, result in results.get(row, {}).items()
        if result['metrics'][metric] != -1
    }


def summary(numbers: list[float], sign: str = '') -> str:
    """Formats the mean and, of three and more, the 95 % interval (Student t)."""
    if not numbers:
        return '-'
    text, count = f'{mean(numbers):{sign}.1f}', len(numbers)
    if count < 3:
        return text
    return f'{text} ± {stats.t.ppf(0.975, count - 1) * stdev(numbers) / count**0.5:.1f}'


def main_table(name: str, results: Results) -> str:
    """Returns the table of means in Markdown, with the paired difference."""
    table = TABLES[name]
    time = read_timing(name)
    shown = {key: title for key, title in table.metrics.items() if key in SHOWN}
    first = table.rows[0]
    metric = next(iter(shown))
    titles = ['row', 'seeds', 'multiply-adds, M', *shown.values()]
    titles.append(f'difference from {first.label}')
    titles += ['training step', 'one image'] if time else []
    lines = [line(titles), line(['---'] + ['--:'] * (len(titles) - 1))]
    base = values(results, first.name, metric)
    for row in table.rows:
        runs = results.get(row.name)
        if not runs:
            continue
        model = next(iter(runs.values()))['model']
        cost = model['backbone_multiply_adds'] + model.get('neck_multiply_adds', 0)
        cells = [row.label, len(runs), f'{cost / 1e6:.1f}']
        for key in shown:
            cells.append(summary(list(values(results, row.name, key).values())))
        ours = values(results, row.name, metric)
        gaps = [ours[seed] - base[seed] for seed in base if seed in ours]
        cells.append('-' if row is first else summary(gaps, '+'))
        if time:
            measured = time['rows'][row.name]
            cells += [f'{measured[kind]["ratio"]:.2f}' for kind in ('train', 'predict')]
        lines.append(line(cells))
    return '\n'.join(lines)


def sweep_table(name: str, results: Results, metric: str) -> str:
    """Returns a metric in Markdown: a column for each number at the end of labels."""
    title = f'{TABLES[name].metrics[metric]} by {TABLES[name].by}'
    cells: dict[str, dict[float, str]] = {}
    for row in TABLES[name].rows:
        label, rate = row.label.rsplit(', ', 1)
        numbers = list(values(results, row.name, metric).values())
        cells.setdefault(label, {})[float(rate)] = summary(numbers)
    rates = sorted({rate for found in cells.values() for rate in found})
    titles = [title, *(f'{rate:g}' for rate in rates)]
    lines = [line(titles), line(['---'] + ['--:'] * len(rates))]
    for label, found in cells.items():
        lines.append(line([label, *(found.get(rate, '-') for rate in rates)]))
    return '\n'.join(lines)


def line(cells: list[Any]) -> str:
    """Returns a line of a table in Markdown."""
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def read_timing(name: str) -> dict | None:
    """Reads the times of a table, if they were measured."""
    path = RESULTS / name / 'timing.json'
    return json.loads(path.read_text()) if path.is_file() else None


def section(name: str, results: Results) -> str:
    """Returns a table in Markdown, and how it was measured."""
    table = TABLES[name]
    if not results:
        return f'Not measured yet: `python tools/reproduce.py {name}`.'
    runs = [run for row in results.values() for run in row.values()]
    if table.by:
        shown = list(table.metrics)[: 1 if is_sweep(name) else None]
        text = '\n\n'.join(sweep_table(name, results, key) for key in shown)
    else:
        text = main_table(name, results)
    wanted = sum(row.seeds for row in table.rows)
    machines = sorted({run['machine']['processor'] for run in runs})
    return text + (
        f'\n\n{len(runs)} of {wanted} runs; `python tools/reproduce.py {name}`; '
        f'torch {runs[0]["versions"]["torch"]}; {", ".join(machines)}.'
    )


def plot(name: str, results: Results) -> bytes:
    """Plots a table: its first metric by row, or over training and cost.

    Returns:
        A PNG file.
    """
    table = TABLES[name]
    curves = any(
        'accuracy/top1' in point
        for row in results.values()
        for run in row.values()
        for point in run['curve']
    )
    panels = 3 if curves else 2
    metric, title = next(iter(table.metrics.items()))
    colors = plt.get_cmap('tab10' if len(results) <= 10 else 'tab20').colors
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.8))
    for i, row in enumerate(row for row in table.rows if row.name in results):
        style = dict(color=colors[i % len(colors)], label=row.label)
        runs = results[row.name]
        numbers = list(values(results, row.name, metric).values())
        if curves:
            plot_accuracy(axes[0], axes[1], runs, style)
            cost = next(iter(runs.values()))['model']['backbone_multiply_adds'] / 1e6
            axes[-1].plot([cost] * len(numbers), numbers, 'o', alpha=0.7, **style)
        else:
            plot_loss(axes[0], runs, style)
            axes[-1].plot(numbers, [row.label] * len(numbers), 'o', alpha=0.7, **style)
    if curves:
        axes[-1].set(xlabel='multiply-adds of the backbone, M', ylabel=f'{title}, %')
        axes[-1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    else:
        axes[-1].set(xlabel=f'{title}, % (a point for each seed)')
        axes[-1].invert_yaxis()
        axes[-1].tick_params(axis='y', labelsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[['top', 'right']].set_visible(False)
    figure.suptitle(table.title, fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    # No date or version in the file: the same results give the same bytes.
    figure.savefig(buffer, dpi=100, metadata={'Software': None})
    plt.close(figure)
    return buffer.getvalue()


def plot_accuracy(epochs: Axes, seconds: Axes, runs: Mapping, style: dict) -> None:
    """Plots the accuracy on images left out over epochs and processor seconds."""
    for run in runs.values():
        points = [p for p in run['curve'] if 'accuracy/top1' in p]
        steps = [p['step'] for p in points]
        accuracies = [p['accuracy/top1'] for p in points]
        times = [run['train_cpu_seconds'] * step / steps[-1] for step in steps]
        epochs.plot(steps, accuracies, '.-', alpha=0.7, color=style['color'])
        seconds.plot(times, accuracies, '.-', alpha=0.7, color=style['color'])
    epochs.xaxis.get_major_locator().set_params(integer=True)
    epochs.set(xlabel='epochs', ylabel='accuracy on images left out, %')
    seconds.set(xlabel='processor seconds', ylabel='accuracy on images left out, %')


def plot_loss(ax: Axes, runs: Mapping, style: dict) -> None:
    """Plots the loss over iterations, the mean of all seeds."""
    steps: dict[int, list[float]] = {}
    for run in runs.values():
        for point in run['curve']:
            if 'loss' in point:
                steps.setdefault(point['step'], []).append(point['loss'])
    ax.plot(sorted(steps), [mean(steps[s]) for s in sorted(steps)], **style)
    ax.set(xlabel='iteration', ylabel='training loss')


PLACE = re.compile(r'(<!-- table: (\S+) -->\n).*?(<!-- end -->)', re.DOTALL)
"""A generated part of the page."""


def fill(page: str, sections: Mapping[str, str]) -> str:
    """Replaces the generated parts of a page.

    Args:
        page: Text with a comment ``<!-- table: NAME -->`` before and ``<!-- end -->``
            after each part.
        sections: The parts by name. The page need not have all.

    Raises:
        ValueError: If the page has a place for another part.
    """
    names = [found[2] for found in PLACE.finditer(page)]
    if unknown := set(names) - set(sections):
        raise ValueError(
            f'the page names the tables {sorted(unknown)}; there are {list(sections)}'
        )
    return PLACE.sub(lambda m: f'{m[1]}{sections[m[2]]}\n{m[3]}', page)


def write_pages() -> list[Path]:
    """Writes the tables that the pages have, and plots beside them.

    Returns:
        The files that were written.
    """
    results = {name: read_results(name) for name in TABLES}
    sections = {name: section(name, found) for name, found in results.items()}
    files = []
    for path in PAGES:
        page = path.read_text()
        files.append(path)
        write_atomic(path, fill(page, sections))
        for name in (found[2] for found in PLACE.finditer(page)):
            if results[name] and not TABLES[name].by:
                files.append(PLOTS / f'results_{name}.png')
                write_atomic(files[-1], plot(name, results[name]))
    return files


def compare(name: str, row: Row, seed: int, result: dict, recorded: dict) -> str:
    """Compares a new result with the recorded one.

    Returns:
        A sentence.

    Raises:
        ValueError: If they differ by more than the tolerance of the table.
    """
    table = TABLES[name]
    metric, title = next(iter(table.metrics.items()))
    new, old = (
        values({row.name: {seed: found}}, row.name, metric)[seed]
        for found in (result, recorded)
    )
    text = (
        f'{name} {row.name}, seed {seed}: {title} {new:.1f}, recorded {old:.1f}, '
        f'tolerance {table.tolerance}'
    )
    if abs(new - old) > table.tolerance:
        raise ValueError(f'{text}: not reproduced')
    return f'{text}: reproduced'

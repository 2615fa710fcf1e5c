"""Table and plot of a few-shot run."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from dsnet_mm.files import write_atomic

from .choice import REFERENCE, choose, shots_text
from .methods import METHODS


@dataclass(frozen=True)
class Cell:
    """Results of a method with a number of shots.

    Attributes:
        label: Method, and ``oracle`` if it was selected on the test split.
        shots: Shots, 0 for zero-shot.
        accuracies: Test accuracy by seed, in percent.
        ece: Mean expected calibration error, in percent.
        fit_seconds: Mean time of a fit.
        select_seconds: Mean time of selection and fit.
        parameters: Number of learnt parameters.
        selections: How the hyper-parameters were chosen, each value once.
    """

    label: str
    shots: int
    accuracies: dict[int, float]
    ece: float
    fit_seconds: float
    select_seconds: float
    parameters: int
    selections: tuple[str, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracies.values())))

    @property
    def interval(self) -> float | None:
        """Half of the width of the 95 % confidence interval of the mean over seeds."""
        return half_interval(list(self.accuracies.values()))


def half_interval(values: list[float]) -> float | None:
    """Returns half of the 95 % confidence interval of a mean, by Student's t.

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
    """Groups the records of a run by method and shots."""
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
            tuple(sorted({r['selection'] for r in group})),
        )
        for (label, shots), group in groups.items()
    ]


def holm(p_values: list[float]) -> list[float]:
    """Corrects p-values for their number (Holm, Scand. J. Statist. 6, 1979).

    Args:
        p_values: p-value of each comparison. NaN is no comparison.

    Returns:
        The corrected values, at most 1.
    """
    corrected, largest = list(p_values), 0.0
    order = sorted(i for i, p in enumerate(p_values) if not np.isnan(p))
    order.sort(key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def table(records: list[dict], about: dict) -> str:
    """Formats a run as Markdown.

    Args:
        records: What ``run`` returned.
        about: Content of ``run.json``.

    Returns:
        Two tables. The first has the accuracy of each method and number of shots, with
        the 95 % confidence interval of the mean over seeds, and a mark where nothing
        was selected. The second is for the largest number of shots. It has the gain
        over zero-shot, the paired comparison with CLIP-Adapter, with p-values corrected
        by Holm, calibration, time and parameters. Sentences name the methods whose gain
        over zero-shot is not larger than the interval, and the classifier to use.
    """
    cells = {(cell.label, cell.shots): cell for cell in collect(records)}
    zero_shot = next(cell for cell in cells.values() if cell.shots == 0)
    shots = sorted({cell.shots for cell in cells.values()} - {0})
    labels = list(dict.fromkeys(label for label, k in cells if k))
    results = [_describe(records, about), '']
    columns = [*map(shots_text, shots)] or ['accuracy']
    results += [
        f'| method | {" | ".join(columns)} |',
        '|---|' + '--:|' * len(columns),
        f'| {zero_shot.label} |' + f' {zero_shot.mean:.2f} |' * len(columns),
    ]
    selection = about['config']['selection']
    for label in labels:
        row = [_with_interval(cells.get((label, k)), selection) for k in shots]
        results.append(f'| {label} | ' + ' | '.join(row) + ' |')
    parts = [
        [f'# {about["title"]}'],
        results,
        *([x] for x in _notes(list(cells.values()), records, about)),
    ]
    if shots:
        parts += [
            [f'## At {shots_text(shots[-1])}'],
            *_most_shots(cells, labels, shots[-1]),
        ]
    chosen = choose(records)
    parts.append([f'Classifier to use: `{chosen.file}`. {chosen.why}'])
    return '\n\n'.join('\n'.join(lines) for lines in parts) + '\n'


def _describe(records: list[dict], about: dict) -> str:
    """Describes data and protocol of a run in a few sentences."""
    config, prompts = about['config'], about['prompts']
    facts = [
        f'{len(about["class_names"])} classes, '
        f'{records[0]["test"]["pictures"]} test images, seeds '
        f'{", ".join(map(str, config["seeds"]))}'
    ]
    if config['features'] is None:
        facts.append(f'preprocessing `{config["preprocessing"]}`')
    if len(prompts) == 1:
        facts.append(f'prompt `{prompts[0]}`')
    elif prompts:
        facts.append(f'{len(prompts)} prompts from `{prompts[0]}` on')
    facts.append(f'hyper-parameters by `{config["selection"]}`')
    return (
        '; '.join(facts) + '. Test accuracy in %, mean and 95 % confidence interval '
        'over seeds (Student t).'
    )


def _notes(cells: list[Cell], records: list[dict], about: dict) -> list[str]:
    """Returns what a reader of the first table must know."""
    notes = list(about['notes'])
    selection = about['config']['selection']
    if selection != 'fixed' and any(
        'fixed' in cell.selections for cell in cells if cell.shots
    ):
        notes.append(
            'f: nothing was selected. The method has a fixed setting, or there was '
            'nothing to select by.'
        )
    if any('val' in cell.selections for cell in cells):
        notes.append(
            'Selection by `val` uses min(shots, 4) more labelled images of each '
            'class: "1 shot" is two labels a class, "16 shots" is 20.'
        )
    same = sorted({r['shots'] for r in records if r['shots'] and not r['redrawn']})
    if same:
        notes.append(
            f'At {", ".join(map(str, same))} shots the file has no other images to '
            f'draw: all seeds have the same training images, and the intervals are '
            f'only those of initialisation, order and validation images.'
        )
    if overrides := about['config']['overrides']:
        options = (
            f'{METHODS[name].title} {key}={value}'
            for name, values in overrides.items()
            for key, value in values.items()
        )
        notes.append(f'Set, not selected: {", ".join(options)}.')
    if any('(oracle)' in cell.label for cell in cells):
        notes.append('Oracle: hyper-parameters chosen on the test split; not a result.')
    software = dict.fromkeys(
        record.get('made_with', 'an older version') for record in records
    )
    notes.append(f'Made with {"; and with ".join(software)}.')
    return notes


def _most_shots(
    cells: dict[tuple[str, int], Cell], labels: list[str], most: int
) -> list[list[str]]:
    """Returns the table for the largest number of shots, and a sentence on it."""
    zero_shot = next(cell for cell in cells.values() if cell.shots == 0)
    reference = cells.get((METHODS[REFERENCE].title, most))
    rows = [cells[label, most] for label in labels if (label, most) in cells]
    p_values = holm([_p_value(cell, reference) for cell in rows])
    lines = [
        '| method | gain over zero-shot | minus CLIP-Adapter, paired (p, Holm) | ECE '
        '| fit, s | with selection, s | parameters |',
        '|---|--:|--:|--:|--:|--:|--:|',
        f'| {zero_shot.label} | - | - | {zero_shot.ece:.1f} | - | - | 0 |',
    ]
    results, behind = 0, []
    for cell, p in zip(rows, p_values, strict=True):
        gain = cell.mean - zero_shot.mean
        is_result = '(oracle)' not in cell.label
        results += is_result
        if is_result and (cell.interval is None or gain <= cell.interval):
            behind.append(cell.label)
        interval = '' if cell.interval is None else f' ± {cell.interval:.2f}'
        lines.append(
            f'| {cell.label} | {gain:+.2f}{interval} | {_paired(cell, reference, p)} | '
            f'{cell.ece:.1f} | {cell.fit_seconds:.2f} | {cell.select_seconds:.2f} | '
            f'{cell.parameters:,} |'
        )
    if not results:
        return [lines]
    if behind:
        few = any(len(cell.accuracies) < 3 for cell in rows)
        why = ' (three seeds or more are needed to tell)' if few else ''
        sentence = (
            f'Not above zero-shot by more than the confidence interval at '
            f'{shots_text(most)}{why}: {", ".join(behind)}.'
        )
    else:
        sentence = (
            f'All methods are above zero-shot by more than the confidence interval at '
            f'{shots_text(most)}.'
        )
    return [lines, [sentence]]


def _with_interval(cell: Cell | None, selection: str) -> str:
    if cell is None:
        return '-'
    half = '' if cell.interval is None else f' ± {cell.interval:.2f}'
    fixed = ' f' if 'fixed' in cell.selections and selection != 'fixed' else ''
    return f'{cell.mean:.2f}{half}{fixed}'


def _gaps(cell: Cell, reference: Cell) -> list[float]:
    """Returns the differences of two methods on the same draws."""
    seeds = sorted(cell.accuracies.keys() & reference.accuracies.keys())
    return [cell.accuracies[s] - reference.accuracies[s] for s in seeds]


def _p_value(cell: Cell, reference: Cell | None) -> float:
    """Returns the p-value of a paired t-test, NaN if there is none."""
    if reference is None or cell is reference or '(oracle)' in cell.label:
        return float('nan')
    gaps = _gaps(cell, reference)
    if len(gaps) < 3 or np.std(gaps) == 0:
        return float('nan')
    return float(stats.ttest_1samp(gaps, 0).pvalue)


def _paired(cell: Cell, reference: Cell | None, p: float) -> str:
    """Formats the mean difference on the same draws, its interval and p-value."""
    if reference is None or cell is reference:
        return '-'
    gaps = _gaps(cell, reference)
    half = half_interval(gaps)
    interval = '' if half is None else f' ± {half:.2f}'
    return f'{np.mean(gaps):+.2f}{interval}' + ('' if np.isnan(p) else f' ({p:.2f})')


def plot(records: list[dict], about: dict, path: str | Path) -> None:
    """Plots the accuracy over shots with confidence intervals.

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
        # Points are shifted, so that the intervals do not cover each other.
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
        xlabel='training images of each class',
        ylabel='test accuracy, %',
        title=about['title'],
    )
    axes.grid(color='0.9')
    axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    write_atomic(path, buffer.getvalue())


def write_report(work_dir: str | Path, records: list[dict]) -> str:
    """Writes ``results.md`` and ``accuracy.png`` of a finished run.

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

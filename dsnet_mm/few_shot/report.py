"""Table and plot of a few-shot run."""

import io
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
        records: Content of ``runs/*.json``, one for each seed.
    """

    label: str
    shots: int
    records: list[dict]

    @property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy by seed, in percent."""
        return {r['seed']: r['test']['accuracy'] for r in self.records}

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracies.values())))

    @property
    def interval(self) -> float | None:
        """Half of the width of the 95 % confidence interval of the mean over seeds."""
        return half_interval(list(self.accuracies.values()))

    @property
    def is_oracle(self) -> bool:
        return self.records[0]['selection'] == 'oracle'

    @property
    def ece(self) -> float:
        """Mean expected calibration error, in percent."""
        return float(np.mean([r['test']['ece'] for r in self.records]))

    def seconds(self, what: str) -> float:
        """Mean time of a fit (``'fit'``), or of selection and fit (``'select'``)."""
        return float(np.mean([r[f'{what}_seconds'] for r in self.records]))

    def gaps(self, reference: 'Cell | None') -> list[float]:
        """Differences from a method on the same draws, none from itself."""
        if reference is None or reference is self:
            return []
        mine, other = self.accuracies, reference.accuracies
        return [mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())]


def half_interval(values: list[float]) -> float | None:
    """Returns half of the 95 % confidence interval of a mean, by Student's t.

    ``values`` has one value for each seed. For fewer than three it is None.
    """
    if len(values) < 3:
        return None
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def holm(p_values: list[float]) -> list[float]:
    """Corrects p-values for their number (Holm, Scand. J. Statist. 6, 1979).

    NaN is no comparison. The corrected values are at most 1.
    """
    corrected, largest = list(p_values), 0.0
    order = sorted(i for i, p in enumerate(p_values) if not np.isnan(p))
    order.sort(key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def collect(records: list[dict]) -> dict[tuple[str, int], Cell]:
    """Groups the records of a run by label and shots."""
    cells: dict[tuple[str, int], Cell] = {}
    for record in records:
        oracle = ' (oracle)' if record['selection'] == 'oracle' else ''
        title = record.get('title', METHODS[record['method']].title)
        key = title + oracle, record['shots']
        cells.setdefault(key, Cell(*key, [])).records.append(record)
    return cells


def table(records: list[dict], about: dict) -> str:
    """Formats the records of a run, and the content of ``run.json``, as Markdown.

    The first table has the accuracy of each method and number of shots, with the 95 %
    confidence interval of the mean over seeds, and a mark where nothing was selected.
    The second is for the largest number of shots. It has the gain over zero-shot, the
    paired comparison with CLIP-Adapter, with p-values corrected by Holm, calibration,
    time and parameters. Sentences name the methods whose gain over zero-shot is not
    larger than the interval, and the classifier to use.
    """
    cells = collect(records)
    zero_shot = next((cell for cell in cells.values() if cell.shots == 0), None)
    shots = sorted({k for _, k in cells} - {0})
    labels = dict.fromkeys(label for label, k in cells if k)
    columns = [*map(shots_text, shots)] or ['accuracy']
    lines = [
        f'| method | {" | ".join(columns)} |',
        '|---|' + '--:|' * len(columns),
    ]
    if zero_shot:
        values = f' {zero_shot.mean:.2f} |' * len(columns)
        lines.append(f'| {zero_shot.label} |' + values)
    for label in labels:
        row = [_accuracy(cells.get((label, k)), about) for k in shots]
        lines.append(f'| {label} | ' + ' | '.join(row) + ' |')
    parts = [f'# {about["title"]}', _describe(records, about), '\n'.join(lines)]
    parts += _notes([*cells.values()], records, about)
    if shots:
        rows = [
            cells[label, shots[-1]] for label in labels if (label, shots[-1]) in cells
        ]
        zero_shot = zero_shot or rows.pop(0)  # prototypes, for want of text
        parts += [f'## At {shots_text(shots[-1])}', *_most_shots(rows, zero_shot)]
    chosen = choose(records)
    parts.append(f'Classifier to use: `{chosen.file}`. {chosen.why}')
    return '\n\n'.join(parts) + '\n'


def _describe(records: list[dict], about: dict) -> str:
    """Describes data and protocol of a run in a few sentences."""
    config, prompts = about['config'], about['prompts']
    facts = [
        f'{len(about["class_names"])} classes, {records[0]["test"]["pictures"]} test '
        f'images, seeds {", ".join(map(str, config["seeds"]))}'
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
    notes, config = list(about['notes']), about['config']
    selections = {r['selection'] for r in records if r['shots']}
    if config['selection'] != 'fixed' and 'fixed' in selections:
        notes.append(
            'f: nothing was selected. The method has a fixed setting, or there was '
            'nothing to select by.'
        )
    if 'val' in selections:
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
    options = [
        f'{METHODS[name].title} {key}={value}'
        for name, values in config['overrides'].items()
        for key, value in values.items()
    ]
    if options:
        notes.append(f'Set, not selected: {", ".join(options)}.')
    if any(cell.is_oracle for cell in cells):
        notes.append('Oracle: hyper-parameters chosen on the test split; not a result.')
    software = dict.fromkeys(r.get('made_with', 'an older version') for r in records)
    return [*notes, f'Made with {"; and with ".join(software)}.']


def _most_shots(rows: list[Cell], zero_shot: Cell) -> list[str]:
    """Returns the table of methods with the same shots, and a sentence on it."""
    title = METHODS[REFERENCE].title
    over = 'prototypes' if zero_shot.shots else 'zero-shot'
    reference = next((cell for cell in rows if cell.label == title), None)
    lines = [
        f'| method | gain over {over} | minus CLIP-Adapter, paired (p, Holm) | ECE '
        '| fit, s | with selection, s | parameters |',
        '|---|--:|--:|--:|--:|--:|--:|',
        f'| {zero_shot.label} | - | - | {zero_shot.ece:.1f} | - | - | 0 |',
    ]
    p_values = holm([_p_value(cell, reference) for cell in rows])
    for cell, p in zip(rows, p_values, strict=True):
        gain, gaps, paired = cell.mean - zero_shot.mean, cell.gaps(reference), '-'
        if gaps:
            paired = f'{np.mean(gaps):+.2f}{_plus_minus(half_interval(gaps))}'
            paired += '' if np.isnan(p) else f' ({p:.2f})'
        lines.append(
            f'| {cell.label} | {gain:+.2f}{_plus_minus(cell.interval)} | {paired} | '
            f'{cell.ece:.1f} | {cell.seconds("fit"):.2f} | '
            f'{cell.seconds("select"):.2f} | {cell.records[0]["parameters"]:,} |'
        )
    results = [cell for cell in rows if not cell.is_oracle]
    behind = [
        cell.label
        for cell in results
        if cell.interval is None or cell.mean - zero_shot.mean <= cell.interval
    ]
    at, sentences = shots_text(rows[0].shots), []
    if behind:
        few = any(len(cell.records) < 3 for cell in rows)
        why = ' (three seeds or more are needed to tell)' if few else ''
        sentences = [
            f'Not above {over} by more than the confidence interval at {at}{why}: '
            f'{", ".join(behind)}.'
        ]
    elif results:
        sentences = [
            f'All methods are above {over} by more than the confidence interval at '
            f'{at}.'
        ]
    return ['\n'.join(lines), *sentences]


def _plus_minus(half: float | None) -> str:
    return '' if half is None else f' ± {half:.2f}'


def _accuracy(cell: Cell | None, about: dict) -> str:
    """Formats a cell of the first table."""
    if cell is None:
        return '-'
    fixed = any(r['selection'] == 'fixed' for r in cell.records)
    mark = ' f' if fixed and about['config']['selection'] != 'fixed' else ''
    return f'{cell.mean:.2f}{_plus_minus(cell.interval)}{mark}'


def _p_value(cell: Cell, reference: Cell | None) -> float:
    """Returns the p-value of a paired t-test, NaN if there is none."""
    gaps = [] if cell.is_oracle else cell.gaps(reference)
    if len(gaps) < 3 or np.std(gaps) == 0:
        return float('nan')
    return float(stats.ttest_1samp(gaps, 0).pvalue)


def plot(records: list[dict], about: dict) -> bytes:
    """Plots the accuracy over shots with confidence intervals, as a PNG file."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    cells = collect(records).values()
    figure = Figure((7.2, 4.6), dpi=150, layout='constrained')
    axes = figure.subplots()
    for cell in (cell for cell in cells if cell.shots == 0):
        axes.axhline(cell.mean, color='0.35', ls='--', lw=1.2, label=cell.label)
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
            ls=':' if line[0].is_oracle else '-',
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
    axes.set_xlabel('training images of each class')
    axes.set_ylabel('test accuracy, %')
    axes.set_title(about['title'])
    axes.grid(color='0.9')
    axes.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def write_report(work_dir: str | Path, records: list[dict]) -> str:
    """Writes ``results.md`` and ``accuracy.png`` of a run. Returns the table."""
    work_dir = Path(work_dir)
    about = json.loads((work_dir / 'run.json').read_text(encoding='utf-8'))
    text = table(records, about)
    write_atomic(work_dir / 'results.md', text)
    write_atomic(work_dir / 'accuracy.png', plot(records, about))
    return text

"""Table and plot of a few-shot run."""

import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsnet_mm.files import write_atomic

from .base_to_new import new_classes_table
from .choice import REFERENCE, choose, shots_text
from .evaluation import unpack
from .intervals import Difference, difference, holm
from .methods import METHODS
from .methods.base import describe_crops


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
    def mean(self) -> float:
        """Mean test accuracy, in percent."""
        return float(np.mean([r['test']['accuracy'] for r in self.records]))

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

    @property
    def overlap(self) -> float:
        """Share of the training images that draws have in common, 1 for one draw."""
        shares = (r.get('overlap', float(not r['redrawn'])) for r in self.records)
        return max(shares) if len(self.records) > 1 else 1.0

    def minus(self, other: 'Cell | None') -> Difference | None:
        """Returns the difference from a method on the same draws and test images.

        There is none from itself, and no interval if it is not stored which images are
        right.
        """
        if other is None or other is self:
            return None
        tests, others = (
            {r['seed']: r['test'] for r in cell.records} for cell in (self, other)
        )
        if not other.shots:  # zero-shot CLIP, the same for all draws
            others = dict.fromkeys(tests, *others.values())
        pairs = [(tests[seed], others[seed]) for seed in tests.keys() & others.keys()]
        if not pairs:
            return None
        counts = {t.get('correct') and t['pictures'] for pair in pairs for t in pair}
        if len(counts) > 1 or None in counts:
            return Difference(
                np.mean([a['accuracy'] - b['accuracy'] for a, b in pairs])
            )
        (count,) = counts
        right = np.array([[unpack(t['correct'], count) for t in p] for p in pairs])
        return difference(right[:, 0] - right[:, 1], self.overlap)


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

    The tables have mean accuracies, with a mark where nothing was selected; gains over
    the baseline with 95 % confidence intervals (:func:`.intervals.difference`), and
    what they show; and for the largest number of shots the difference from CLIP-Adapter
    with p-values corrected by Holm, calibration, time and parameters. They fit 80
    columns. The last sentence names the classifier to use.
    """
    cells = collect(records)
    zero_shot = next((cell for cell in cells.values() if cell.shots == 0), None)
    shots = sorted({k for _, k in cells} - {0})
    labels = dict.fromkeys(label for label, k in cells if k)
    rows = []
    if zero_shot:
        rows = [[zero_shot.label] + [f'{zero_shot.mean:.2f}'] * max(len(shots), 1)]
    for label in labels:
        row = [_accuracy(cells.get((label, k)), about) for k in shots]
        rows.append([label, *row])
    header = ['method', *(map(shots_text, shots) if shots else ['accuracy'])]
    parts = [f'# {about["title"]}', _describe(records, about), _markdown(header, rows)]
    parts += _notes([*cells.values()], records, about)
    if shots:
        parts += [f'## Gain over {_baselines(cells)[0]}', *_gains(cells)]
        last = [cell for cell in cells.values() if cell.shots == shots[-1]]
        parts += [f'## At {shots_text(shots[-1])}', *_most_shots(last, zero_shot)]
    if about['config'].get('base_to_new'):
        most = [cell for cell in cells.values() if cell.shots in (0, *shots[-1:])]
        parts.append(new_classes_table(most))
    chosen = choose(records)
    parts.append(f'Classifier to use: `{chosen.file}`. {chosen.why}')
    return '\n\n'.join(parts) + '\n'


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """Formats a table whose first column is text."""
    lines = [header, ['---'] + ['--:'] * (len(header) - 1), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _describe(records: list[dict], about: dict) -> str:
    """Describes data and protocol of a run in a few sentences."""
    config, prompts = about['config'], about['prompts']
    facts = [
        f'{len(about["class_names"])} classes, {records[0]["test"]["pictures"]} test '
        f'images, seeds {_numbers(config["seeds"])}'
    ]
    if config['features'] is None:
        facts.append(f'preprocessing `{config["preprocessing"]}`')
    if len(prompts) == 1:
        facts.append(f'prompt `{prompts[0]}`')
    elif prompts:
        facts.append(f'{len(prompts)} prompts from `{prompts[0]}` on')
    facts.append(f'hyper-parameters by `{config["selection"]}`')
    return '; '.join(facts) + '. Test accuracy in %, mean over seeds.'


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
    options = [
        f'{METHODS[name].title} {key}={value}'
        for name, values in config['overrides'].items()
        for key, value in values.items()
    ]
    if options:
        notes.append(f'Set, not selected: {", ".join(options)}.')
    if any(cell.is_oracle for cell in cells):
        notes.append('Oracle: hyper-parameters chosen on the test split; not a result.')
    notes.append(_openings(records))
    if config['features'] is None and config['views']:
        own = describe_crops([*config['methods'], *config['oracle']])
        given = config['crop_scale']
        area = f'{given[0]:g} to {given[1]:g} for all methods' if given else own
        notes.append(f'Area of the random crops: {area}.')
    software = dict.fromkeys(r.get('made_with', 'an older version') for r in records)
    return [*notes, f'Made with {"; and with ".join(software)}.']


def _openings(records: list[dict]) -> str:
    """Says how often the test split was opened, and what was fitted after that."""
    if any('opening' not in r['test'] for r in records):
        return 'An older version did not count openings of the test split: see run.log.'
    count = max(r['test']['opening'] for r in records)
    times = 'once' if count == 1 else f'{count} times'
    results = [
        r
        for r in records
        if r['shots'] and r['selection'] != 'oracle' and not r.get('transductive')
    ]
    of = Counter(METHODS[r['method']].title for r in results)
    late = Counter(METHODS[r['method']].title for r in results if r['openings_before'])
    if not late:
        return f'The test split was opened {times}, after all fits.'
    added = ', '.join(f'{k} ({n} of {of[k]} classifiers)' for k, n in late.items())
    return (
        f'The test split was opened {times}. Fitted later, when the first test results '
        f'were known: {added}.'
    )


def _baselines(
    cells: dict[tuple[str, int], Cell],
) -> tuple[str, dict[int, Cell | None]]:
    """Returns what methods are compared with, and its cells by shots.

    That is zero-shot, or for want of text the prototypes of the same draws.
    """
    zero_shot = next((cell for cell in cells.values() if cell.shots == 0), None)
    title = METHODS['prototypes'].title
    found = {k: zero_shot or cells.get((title, k)) for _, k in cells}
    if zero_shot is None:
        return 'prototypes', found
    is_text = zero_shot.label == METHODS['zero_shot'].title
    return 'zero-shot' if is_text else f'the {zero_shot.label.lower()}', found


def _gains(cells: dict[tuple[str, int], Cell]) -> list[str]:
    """Returns tables of gains over the baseline, and what they show."""
    over, baselines = _baselines(cells)
    gains = {
        (c.label, c.shots): gain
        for c in cells.values()
        if c.shots and (gain := c.minus(baselines[c.shots]))
    }
    fitted = [cell for cell in cells.values() if (cell.label, cell.shots) in gains]
    shots = sorted({c.shots for c in fitted})
    parts = []
    for i in range(0, len(shots), 3):  # three intervals in 80 columns
        part = shots[i : i + 3]
        rows = [
            [label, *(str(gains.get((label, k), '-')) for k in part)]
            for label in dict.fromkeys(c.label for c in fitted)
        ]
        parts.append(_markdown(['method', *map(shots_text, part)], rows))
    parts.append('In points, with 95 % intervals for new draws and new test images.')
    if old := dict.fromkeys(k[0] for k, gain in gains.items() if math.isnan(gain.half)):
        parts.append(
            f'No interval: {", ".join(old)}. Which images are right is not known (an '
            f'older version, or unreadable images). Run again in a new folder.'
        )
    shared = {c.shots: 100 * c.overlap for c in fitted if 0.05 <= c.overlap < 1}
    if shared:
        each = (f'{share:.0f} % at {shots_text(k)}' for k, share in shared.items())
        parts.append(
            f'Two draws share images: {", ".join(each)}. Intervals are wider for it.'
        )
    if fixed := sorted({c.shots for c in fitted if c.overlap == 1}):
        parts.append(
            f'At {", ".join(map(shots_text, fixed))} there is one set of training '
            f'images: intervals are for new test images alone, and there is no verdict '
            f'on the methods.'
        )
    signs = {1: f'Above {over}', -1: f'Below {over}', 0: 'Undecided'}
    lines = []
    for k in (k for k in shots if k not in fixed):
        said: dict[str, list[str]] = {text: [] for text in signs.values()}
        for cell in (c for c in fitted if c.shots == k and not c.is_oracle):
            said[signs[gains[cell.label, k].sign]].append(cell.label)
        if found := [f'{text}: {"; ".join(x)}.' for text, x in said.items() if x]:
            lines.append(f'- {shots_text(k)}. {" ".join(found)}')
    return [*parts, '\n'.join(lines)] if lines else parts


def _most_shots(cells: list[Cell], zero_shot: Cell | None) -> list[str]:
    """Returns the tables of methods with the same shots."""
    title = METHODS[REFERENCE].title
    reference = next((cell for cell in cells if cell.label == title), None)
    gaps = [cell.minus(reference) for cell in cells]
    compared = zip(cells, gaps, strict=True)
    p_values = holm([g.p if g and not c.is_oracle else math.nan for c, g in compared])
    against = [
        [cell.label, str(gap or '-'), '-' if math.isnan(p) else f'{p:.2f}']
        for cell, gap, p in zip(cells, gaps, p_values, strict=True)
    ]
    cost = []
    if zero_shot:
        cost.append([zero_shot.label, f'{zero_shot.ece:.1f}', '-', '-', '0'])
    for cell in cells:
        seconds = [f'{cell.seconds(what):.2f}' for what in ('fit', 'select')]
        count = f'{cell.records[0]["parameters"]:,}'
        cost.append([cell.label, f'{cell.ece:.1f}', *seconds, count])
    header = ['method', 'ECE', 'fit, s', 'with selection, s', 'parameters']
    tables = [_markdown(header, cost)]
    if reference is not None:
        tables.insert(0, _markdown(['method', f'minus {title}', 'p (Holm)'], against))
    return tables


def _numbers(values: Iterable[int]) -> str:
    return ', '.join(map(str, sorted(set(values))))


def _accuracy(cell: Cell | None, about: dict) -> str:
    """Formats a cell of the first table."""
    if cell is None:
        return '-'
    fixed = any(r['selection'] == 'fixed' for r in cell.records)
    mark = ' f' if fixed and about['config']['selection'] != 'fixed' else ''
    return f'{cell.mean:.2f}{mark}'


def _half(gain: Difference | None) -> float:
    """Returns half of an interval, 0 if there is none."""
    return 0.0 if gain is None or math.isnan(gain.half) else gain.half


def plot(records: list[dict], about: dict) -> bytes:
    """Plots the accuracy over shots, as a PNG file.

    The bars are the 95 % confidence intervals of the difference from the baseline.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grouped = collect(records)
    over, baselines = _baselines(grouped)
    cells = grouped.values()
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
            [_half(c.minus(baselines[c.shots])) for c in line],
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
    axes.set_ylabel(f'test accuracy, % (bars: 95 % of the gain over {over})')
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

"""Predictions of a classifier for images: on the screen, as JSON, as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from dsnet_mm.progress import progress_bar

from .deployment import DeployedClassifier


def predict(
    classifier: DeployedClassifier,
    images: Sequence[str | Path],
    top: int = 3,
    batch_size: int = 64,
    quiet: bool = False,
    reject: bool = False,
    coverage: float | None = None,
) -> tuple[list[dict], list[str]]:
    """Classifies files of images, in batches.

    Returns:
        For each image a dict of ``image``, its file, and ``classes``, the ``top`` most
        probable ones: dicts of ``class`` and ``probability``. With ``reject`` also
        ``none_of_these``, whether it is of no class, and with ``coverage`` ``set``,
        the names of its prediction set (see :class:`.calibration.Calibration`). And a
        sentence for each image that cannot be read.

    Raises:
        ValueError: If ``top`` or ``batch_size`` is below 1, or the classifier is not
            calibrated for ``reject`` or ``coverage``.
    """
    for name, value in (('top', top), ('batch_size', batch_size)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    names, calibration = classifier.class_names, classifier.calibration
    nothing = torch.empty(0, len(names))  # raises before anything is classified
    if reject:
        calibration.rejects(nothing)
    if coverage is not None:
        calibration.sets(nothing, coverage)
    predictions, problems = [], []
    with progress_bar(len(images), 'classifying', 'images', quiet) as bar:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            prepared = []
            for image in batch:
                try:
                    prepared.append((str(image), classifier.prepare(image)))
                except (OSError, ValueError) as error:
                    problems.append(f'skipped: {error}')
            if prepared:
                found = classifier.probabilities([x for _, x in prepared])
                best = found.topk(min(top, len(names)))
                for i, (image, _) in enumerate(prepared):
                    classes = [
                        {'class': names[label], 'probability': round(value, 6)}
                        for value, label in zip(
                            best.values[i].tolist(),
                            best.indices[i].tolist(),
                            strict=True,
                        )
                    ]
                    entry = {'image': image, 'classes': classes}
                    if reject:
                        entry['none_of_these'] = bool(calibration.rejects(found[i]))
                    if coverage is not None:
                        inside = calibration.sets(found[i], coverage)
                        order = found[i].argsort(descending=True).tolist()
                        entry['set'] = [names[k] for k in order if inside[k]]
                    predictions.append(entry)
            bar.update(len(batch))
    return predictions, problems


def _rows(predictions: Sequence[dict], scale: int, digits: int) -> list[list[str]]:
    """Returns image, class, probability, class and so on of each prediction."""
    rows = []
    for p in predictions:
        pairs = (
            (c['class'], f'{scale * c["probability"]:.{digits}f}') for c in p['classes']
        )
        rows.append([p['image'], *(cell for pair in pairs for cell in pair)])
    return rows


def _more(predictions: Sequence[dict]) -> dict[str, list[str]]:
    """Returns the columns that rejection and sets add."""
    columns = {}
    if 'none_of_these' in predictions[0]:
        words = ('no', 'yes')
        columns['none_of_these'] = [words[p['none_of_these']] for p in predictions]
    if 'set' in predictions[0]:
        columns['set'] = [' | '.join(p['set']) for p in predictions]
    return columns


def as_table(predictions: Sequence[dict]) -> Table:
    """Formats predictions for the screen."""
    table = Table('image')
    table.columns[0].overflow = 'fold'
    for rank in range(len(predictions[0]['classes'])):
        table.add_column(f'{rank + 1}.' if rank else 'class', overflow='fold')
        table.add_column('%', justify='right')
    more = _more(predictions)
    for name in more:
        table.add_column(name.replace('_', ' '), overflow='fold')
    rows = _rows(predictions, 100, 1)
    for row, *cells in zip(rows, *more.values(), strict=True):
        table.add_row(*map(escape, (*row, *cells)))
    return table


def as_json(predictions: Sequence[dict], problems: Sequence[str]) -> str:
    """Formats predictions as JSON: a list of images, and the skipped ones."""
    content = {'predictions': predictions, 'skipped': list(problems)}
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def as_csv(predictions: Sequence[dict]) -> str:
    """Formats predictions as CSV: image, class_1, probability_1, class_2 ...

    The columns ``none_of_these`` and ``set`` follow, if they were asked for.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, len(predictions[0]['classes']) + 1)
    head = [cell for rank in ranks for cell in (f'class_{rank}', f'probability_{rank}')]
    more, rows = _more(predictions), _rows(predictions, 1, 6)
    writer.writerow(['image', *head, *more])
    for row, *cells in zip(rows, *more.values(), strict=True):
        writer.writerow([*row, *cells])
    return text.getvalue()

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
                best = found.topk(min(top, len(names))).indices
                for i, (image, _) in enumerate(prepared):
                    classes = [
                        {'class': names[k], 'probability': round(found[i, k].item(), 6)}
                        for k in best[i].tolist()
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
    """Returns image, class, probability and so on, and what :func:`_more` adds."""
    rows = []
    for p in predictions:
        pairs = (
            (c['class'], f'{scale * c["probability"]:.{digits}f}') for c in p['classes']
        )
        cells = (cell for pair in pairs for cell in pair)
        rows.append([p['image'], *cells, *_more(p).values()])
    return rows


def _more(prediction: dict) -> dict[str, str]:
    """Returns the cells of rejection and of the prediction set by column."""
    found = {}
    if 'none_of_these' in prediction:
        found['none_of_these'] = 'yes' if prediction['none_of_these'] else 'no'
    if 'set' in prediction:
        found['set'] = ' | '.join(prediction['set'])
    return found


def as_table(predictions: Sequence[dict]) -> Table:
    """Formats predictions for the screen."""
    table = Table('image')
    table.columns[0].overflow = 'fold'
    for rank in range(len(predictions[0]['classes'])):
        table.add_column(f'{rank + 1}.' if rank else 'class', overflow='fold')
        table.add_column('%', justify='right')
    for name in _more(predictions[0]):
        table.add_column(name.replace('_', ' '), overflow='fold')
    for row in _rows(predictions, 100, 1):
        table.add_row(*map(escape, row))
    return table


def as_json(predictions: Sequence[dict], problems: Sequence[str]) -> str:
    """Formats predictions as JSON: a list of images, and the skipped ones."""
    content = {'predictions': predictions, 'skipped': list(problems)}
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def as_csv(predictions: Sequence[dict]) -> str:
    """Formats predictions as CSV: image, class_1, probability_1, class_2 ..., set."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, len(predictions[0]['classes']) + 1)
    head = [cell for rank in ranks for cell in (f'class_{rank}', f'probability_{rank}')]
    writer.writerow(['image', *head, *_more(predictions[0])])
    writer.writerows(_rows(predictions, 1, 6))
    return text.getvalue()

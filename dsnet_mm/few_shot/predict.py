"""Predictions of a classifier for images: on the screen, as JSON, as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

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
) -> tuple[list[dict], list[str]]:
    """Classifies files of images, in batches.

    Returns:
        For each image a dict of ``image``, its file, and ``classes``, the ``top`` most
        probable ones: dicts of ``class`` and ``probability``. And a sentence for each
        image that cannot be read.

    Raises:
        ValueError: If ``top`` or ``batch_size`` is below 1.
    """
    for name, value in (('top', top), ('batch_size', batch_size)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    names = classifier.class_names
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
                for (image, _), values, labels in zip(
                    prepared, best.values.tolist(), best.indices.tolist(), strict=True
                ):
                    classes = [
                        {'class': names[label], 'probability': round(value, 6)}
                        for value, label in zip(values, labels, strict=True)
                    ]
                    predictions.append({'image': image, 'classes': classes})
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


def as_table(predictions: Sequence[dict]) -> Table:
    """Formats predictions for the screen."""
    table = Table('image')
    table.columns[0].overflow = 'fold'
    for rank in range(len(predictions[0]['classes'])):
        table.add_column(f'{rank + 1}.' if rank else 'class', overflow='fold')
        table.add_column('%', justify='right')
    for row in _rows(predictions, 100, 1):
        table.add_row(*map(escape, row))
    return table


def as_json(predictions: Sequence[dict], problems: Sequence[str]) -> str:
    """Formats predictions as JSON: a list of images, and the skipped ones."""
    content = {'predictions': predictions, 'skipped': list(problems)}
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def as_csv(predictions: Sequence[dict]) -> str:
    """Formats predictions as CSV: image, class_1, probability_1, class_2 ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, len(predictions[0]['classes']) + 1)
    head = [cell for rank in ranks for cell in (f'class_{rank}', f'probability_{rank}')]
    writer.writerow(['image', *head])
    writer.writerows(_rows(predictions, 1, 6))
    return text.getvalue()

"""Predictions of a classifier for images: on the screen, as JSON, as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from dsnet_mm.progress import progress_bar

from .deployment import DeployedClassifier


@dataclass(frozen=True)
class Prediction:
    """Most probable classes of an image.

    Attributes:
        image: File of the image.
        classes: Class names, the most probable first.
        probabilities: Their probabilities.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    classifier: DeployedClassifier,
    images: Sequence[str | Path],
    top: int = 3,
    batch_size: int = 64,
    quiet: bool = False,
) -> tuple[list[Prediction], list[str]]:
    """Classifies files of images, in batches.

    Args:
        classifier: What ``load_classifier`` returned.
        images: The files.
        top: Number of classes of a prediction.
        batch_size: Images in memory at once.
        quiet: Whether to hide the bar.

    Returns:
        The predictions, and a sentence for each image that cannot be read.

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
            prepared = {}
            for image in batch:
                try:
                    prepared[str(image)] = classifier.prepare(image)
                except (ValueError, FileNotFoundError) as error:
                    problems.append(f'skipped: {error}')
            if prepared:
                best = classifier.probabilities([*prepared.values()])
                best = best.topk(min(top, len(names)))
                for image, values, labels in zip(
                    prepared, best.values.tolist(), best.indices.tolist(), strict=True
                ):
                    classes = tuple(names[label] for label in labels)
                    predictions.append(Prediction(image, classes, tuple(values)))
            bar.update(len(batch))
    return predictions, problems


def as_table(predictions: Sequence[Prediction]) -> Table:
    """Formats predictions for the screen."""
    table = Table('image')
    for rank in range(len(predictions[0].classes)):
        table.add_column('class' if rank == 0 else f'{rank + 1}.', overflow='fold')
        table.add_column('%', justify='right')
    table.columns[0].overflow = 'fold'
    for p in predictions:
        cells = zip(p.classes, p.probabilities, strict=True)
        pairs = ((name, f'{100 * value:.1f}') for name, value in cells)
        row = (p.image, *(cell for pair in pairs for cell in pair))
        table.add_row(*map(escape, row))
    return table


def as_json(predictions: Sequence[Prediction], problems: Sequence[str]) -> str:
    """Formats predictions as JSON: a list of images, and the skipped ones."""
    content = {
        'predictions': [
            {
                'image': p.image,
                'classes': [
                    {'class': name, 'probability': round(value, 6)}
                    for name, value in zip(p.classes, p.probabilities, strict=True)
                ],
            }
            for p in predictions
        ],
        'skipped': list(problems),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Formats predictions as CSV: image, class_1, probability_1, class_2 ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, len(predictions[0].classes) + 1)
    head = [cell for rank in ranks for cell in (f'class_{rank}', f'probability_{rank}')]
    writer.writerow(['image', *head])
    for p in predictions:
        cells = zip(p.classes, p.probabilities, strict=True)
        pairs = ((name, f'{value:.6f}') for name, value in cells)
        writer.writerow([p.image, *(cell for pair in pairs for cell in pair)])
    return text.getvalue()

"""Predictions of a classifier for pictures: on the screen, as JSON, as CSV."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar
from dsnet_mm.tasks.readers import count_other_files, is_picture

from .deployment import DeployedClassifier


@dataclass(frozen=True)
class Prediction:
    """Most probable classes of a picture.

    Attributes:
        picture: File of the picture.
        classes: Class names, the most probable first.
        probabilities: Their probabilities.
    """

    picture: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def find_pictures(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Lists pictures, and those in and below folders.

    Args:
        paths: Files and folders.

    Returns:
        The pictures, and a sentence for each folder with files that are no pictures.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If there is no picture.
    """
    found: list[Path] = []
    notes = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob('*') if p.is_file() and is_picture(p))
            if others := count_other_files(path):
                notes.append(f'not read in {path}: {others}.')
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f'there is no picture or folder {path}.')
    if not found:
        raise ValueError(
            ' '.join([f'no picture in {", ".join(map(str, paths))}.', *notes])
        )
    return found, notes


def predict(
    classifier: DeployedClassifier,
    pictures: Sequence[str | Path],
    top: int = 3,
    batch_size: int = 64,
    quiet: bool = False,
) -> tuple[list[Prediction], list[str]]:
    """Classifies files of pictures, in batches.

    Args:
        classifier: What ``load_classifier`` returned.
        pictures: The files.
        top: Number of classes of a prediction.
        batch_size: Pictures in memory at once.
        quiet: Whether to hide the bar.

    Returns:
        The predictions, and a sentence for each picture that cannot be read.

    Raises:
        ValueError: If ``top`` or ``batch_size`` is below 1.
    """
    for name, value in (('top', top), ('batch_size', batch_size)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}.')
    names = classifier.class_names
    predictions, problems = [], []
    with progress_bar(len(pictures), 'classifying', 'pictures', quiet) as bar:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            prepared = {}
            for picture in batch:
                try:
                    prepared[str(picture)] = classifier.prepare(picture)
                except (ValueError, FileNotFoundError) as error:
                    problems.append(f'skipped: {error}')
            if prepared:
                best = classifier.probabilities([*prepared.values()])
                best = best.topk(min(top, len(names)))
                for picture, values, labels in zip(
                    prepared, best.values.tolist(), best.indices.tolist(), strict=True
                ):
                    classes = tuple(names[label] for label in labels)
                    predictions.append(Prediction(picture, classes, tuple(values)))
            bar.update(len(batch))
    return predictions, problems


def as_table(predictions: Sequence[Prediction]) -> Table:
    """Formats predictions for the screen."""
    table = Table('picture')
    for rank in range(len(predictions[0].classes)):
        table.add_column('class' if rank == 0 else f'{rank + 1}.', overflow='fold')
        table.add_column('%', justify='right')
    table.columns[0].overflow = 'fold'
    for p in predictions:
        cells = zip(p.classes, p.probabilities, strict=True)
        pairs = ((name, f'{100 * value:.1f}') for name, value in cells)
        table.add_row(p.picture, *(cell for pair in pairs for cell in pair))
    return table


def as_json(predictions: Sequence[Prediction], problems: Sequence[str]) -> str:
    """Formats predictions as JSON: a list of pictures, and the skipped ones."""
    content = {
        'predictions': [
            {
                'picture': p.picture,
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
    """Formats predictions as CSV: picture, class_1, probability_1, class_2 ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, len(predictions[0].classes) + 1)
    head = [cell for rank in ranks for cell in (f'class_{rank}', f'probability_{rank}')]
    writer.writerow(['picture', *head])
    for p in predictions:
        cells = zip(p.classes, p.probabilities, strict=True)
        pairs = ((name, f'{value:.6f}') for name, value in cells)
        writer.writerow([p.picture, *(cell for pair in pairs for cell in pair)])
    return text.getvalue()


def write_new(path: str | Path, content: str) -> None:
    """Writes a file that does not exist yet.

    Raises:
        FileExistsError: If it exists.
    """
    if Path(path).exists():
        raise FileExistsError(f'{path} exists; choose another name.')
    write_atomic(path, content)

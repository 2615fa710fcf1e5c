"""Testing a classifier, or all methods of a run, on other data sets."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from scipy import stats
from torch import Tensor

from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.features import FeatureCache
from dsnet_mm.files import write_atomic

from .choice import shots_text
from .deployment import DeployedClassifier, load_classifier
from .evaluation import Score, evaluate
from .methods import METHODS
from .work_dir import read_json


@dataclass(frozen=True)
class Transfer:
    """Result of a classifier on a data set.

    Attributes:
        dataset: Name of the data set.
        score: Accuracy, calibration and loss.
        class_names: Names of the classes of the data set.
        confusion: Number of images by true and predicted class (K, K).
        skipped: Number of images that cannot be read.
    """

    dataset: str
    score: Score
    class_names: tuple[str, ...]
    confusion: Tensor
    skipped: int

    @property
    def images(self) -> int:
        """Number of images that were classified."""
        return int(self.confusion.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy in percent (Wilson).

        It is for these classes and this classifier, over images.
        """
        right = int(self.confusion.trace())
        found = stats.binomtest(right, self.images).proportion_ci(method='wilson')
        return 100 * found.low, 100 * found.high


def transfer(
    classifier: str | Path | DeployedClassifier,
    dataset: str | Path,
    data_root: str | Path = 'data',
    cache_dir: str | Path = 'work_dirs/few_shot_features',
) -> Transfer:
    """Tests a classifier on the test images of another data set.

    All images of a folder or file without its own split are test images. Images
    that cannot be read are named and left out.

    The classes of the data set must be among those of the classifier, as in the shifted
    test sets of ImageNet. The logits of other classes are not used.

    Args:
        classifier: File of :func:`save_classifier`, or what :func:`load_classifier`
            returned.
        dataset: See :func:`dsnet_mm.datasets.load_task`.
        data_root: Folder of the public data sets.
        cache_dir: Folder of the features.

    Raises:
        ValueError: If the classifier does not know a class.
        FileNotFoundError: If a file is missing.
    """
    task = load_task(dataset, data_root, test_only=True)
    if not isinstance(classifier, DeployedClassifier):
        classifier = load_classifier(classifier)
    known, count = classifier.class_names, len(task.class_names)
    if unknown := sorted(set(task.class_names) - set(known)):
        raise ValueError(
            f'{dataset}: the classifier does not know {len(unknown)} of the {count} '
            f'classes, such as {unknown[0]!r}; it knows '
            f'{", ".join(map(repr, known[:5]))}{" ..." if len(known) > 5 else ""}.'
        )
    # ImageNet has two pairs of classes with the same name, so names are used only where
    # the lists differ.
    columns = list(range(count))
    if task.class_names != known:
        columns = [known.index(name) for name in task.class_names]
    cache = FeatureCache(
        cache_dir,
        classifier.encoder,
        preprocessing=classifier.preprocessing,
        on_bad_image='skip',
    )
    items = task.split['test']
    data = cache.images(items)
    predicted = []

    def classify(features: Tensor) -> Tensor:
        logits = classifier.classifier(features.to(classifier.device))[:, columns].cpu()
        logits = logits / classifier.calibration.temperature
        predicted.append(logits.argmax(1))
        return logits

    score = evaluate(classify, data)
    pairs = data.labels * count + torch.cat(predicted)
    confusion = torch.bincount(pairs, minlength=count**2).view(count, count)
    skipped = len(items) - len(data)
    return Transfer(task.name, score, task.class_names, confusion, skipped)


def table(result: Transfer) -> str:
    """Formats a result as Markdown: the accuracy, and a row for each class."""
    low, high = result.interval
    skipped = f' Not counted, because they cannot be read: {result.skipped}.'
    lines = [
        f'# {result.dataset}',
        '',
        f'{result.images} images of {len(result.class_names)} classes.'
        f'{skipped if result.skipped else ""}',
        '',
        f'Accuracy {result.score.accuracy:.2f} % (95 % interval over images '
        f'{low:.1f} to {high:.1f}), expected calibration error '
        f'{result.score.ece:.2f} %.',
        '',
        '| class | images | right | accuracy, % | most often taken for |',
        '|---|--:|--:|--:|---|',
    ]
    # A | would end the cell.
    names = [name.replace('|', r'\|') for name in result.class_names]
    for label, name in enumerate(names):
        wrong = result.confusion[label].clone()
        total, right, wrong[label] = int(wrong.sum()), int(wrong[label]), 0
        other = int(wrong.argmax())
        taken = f'{names[other]} ({wrong[other]})' if wrong.any() else '-'
        share = f'{100 * right / total:.1f}' if total else '-'
        lines.append(f'| {name} | {total} | {right} | {share} | {taken} |')
    return '\n'.join(lines) + '\n'


def plot_confusion(result: Transfer) -> bytes:
    """Draws the confusion matrix as a PNG file. Rows are true classes."""
    from matplotlib.figure import Figure

    names, counts = result.class_names, result.confusion
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    named = len(names) <= 60
    side = min(3.0 + 0.34 * len(names), 16) if named else 10
    figure = Figure((side + 1.5, side), dpi=150 if side < 12 else 110)
    figure.set_layout_engine('constrained')
    axes = figure.subplots()
    image = axes.imshow(100 * shares, 'Blues', vmin=0, vmax=100, interpolation='none')
    figure.colorbar(image, ax=axes, label='% of the true class', shrink=0.8)
    if named:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 30:
        for true, guessed in counts.nonzero().tolist():
            number = str(int(counts[true, guessed]))
            colour = 'white' if shares[true, guessed] > 0.5 else 'black'
            style = dict(ha='center', va='center', color=colour, fontsize=8)
            axes.text(guessed, true, number, **style)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    axes.set_title(
        f'{result.dataset}: {result.score.accuracy:.1f} % of {result.images} images '
        f'right'
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def write_transfer(
    folder: str | Path, classifier_file: str | Path, result: Transfer
) -> str:
    """Writes ``test.md``, ``test.json`` and ``confusion.png``. Returns the table.

    Raises:
        FileExistsError: If the folder has the test of another classifier.
    """
    folder, text = Path(folder), table(result)
    source = str(Path(classifier_file).resolve())
    tested = {'classifier': source, 'dataset': result.dataset}
    _check_folder(folder, tested)
    content = {
        **tested,
        'pictures': result.images,
        'skipped': result.skipped,
        **asdict(result.score),
        'accuracy_interval': list(result.interval),
        'class_names': list(result.class_names),
        'confusion': result.confusion.tolist(),
    }
    write_atomic(folder / 'test.json', json.dumps(content, indent=2))
    write_atomic(folder / 'test.md', text)
    write_atomic(folder / 'confusion.png', plot_confusion(result))
    return text


def transfer_run(
    run_folder: str | Path,
    datasets: Sequence[str],
    folder: str | Path,
    load: Callable[[Path], DeployedClassifier] = load_classifier,
    data_root: str | Path = 'data',
    cache_dir: str | Path = 'work_dirs/few_shot_features',
) -> str:
    """Tests all methods of a run on other data sets. Returns the table.

    Zero-shot CLIP and all classifiers with the most shots are tested, without oracles
    and transductive methods. Writes ``test.md`` and ``test.json``. ``load`` loads a
    classifier file. For the other arguments and errors see :func:`transfer`.

    Raises:
        FileExistsError: If ``folder`` has another test.
        FileNotFoundError: If ``run_folder`` is no run.
    """
    run_folder, folder = Path(run_folder).resolve(), Path(folder)
    records = [read_json(path) for path in sorted(run_folder.glob('runs/*.json'))]
    records = [r for r in records if r['test'] and r['selection'] != 'oracle']
    if not records:
        raise FileNotFoundError(f'{run_folder} is not the folder of a finished run.')
    most = max(r['shots'] for r in records)
    records.sort(key=lambda r: r['shots'] > 0)  # zero-shot first
    rows: dict[str, list[dict[str, float]]] = {}
    tested = {'run': str(run_folder), 'datasets': list(datasets)}
    _check_folder(folder, tested)
    for record in records:
        if record['shots'] not in (0, most) or record.get('transductive'):
            continue
        classifier = load(run_folder / f'classifiers/{record["name"]}.safetensors')
        found = {
            name: transfer(classifier, name, data_root, cache_dir).score.accuracy
            for name in datasets
        }
        row = {'test split': record['test']['accuracy'], **found}
        row['mean of the others'] = mean(found.values())
        title = record.get('title', METHODS[record['method']].title)
        rows.setdefault(title, []).append(row)
    lines = [
        f'# {run_folder.name}, {shots_text(most)}\n\nAccuracy in %, mean over seeds. '
        f'Oracles and methods that see unlabelled test images are left out.\n',
        f'| method | {" | ".join(row)} |',
        '|---|' + '--:|' * len(row),
    ]
    for title, found in rows.items():
        cells = [f'{mean(one[column] for one in found):.2f}' for column in row]
        lines.append(f'| {title} | {" | ".join(cells)} |')
    text = '\n'.join(lines) + '\n'
    write_atomic(folder / 'test.json', json.dumps({**tested, 'rows': rows}, indent=2))
    write_atomic(folder / 'test.md', text)
    return text


def _check_folder(folder: Path, tested: dict) -> None:
    """Raises a FileExistsError if a folder has something else than this test."""
    if (about := folder / 'test.json').is_file():
        found = read_json(about)
        if any(found.get(key) != value for key, value in tested.items()):
            raise FileExistsError(
                f'{folder} contains the test of another classifier, run or data set; '
                f'choose another folder with --out.'
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f'{folder} is not empty and not a test; choose another folder with --out.'
        )

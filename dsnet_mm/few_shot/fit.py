"""A classifier of all images, whose classes may have unequal numbers of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsnet_mm.datasets.features import Features
from dsnet_mm.files import check_new

from .config import FewShotConfig
from .deployment import save_classifier
from .methods import METHODS
from .sources import FeatureSource, ImageSource, Source, encode_parts
from .work_dir import describe_software

FOLDS = 4
"""Parts of the images in a cross-validation."""


@dataclass(frozen=True)
class Fitted:
    """What a classifier was fitted to.

    Attributes:
        counts: Number of images by class name.
        left: Number of images of the part test, which are left for a test.
        accuracy: Accuracy of the method and of zero-shot CLIP in a cross-validation, in
            percent, each over images and as the mean over classes. None if it would
            take long, or no class has two images.
    """

    counts: dict[str, int]
    left: int
    accuracy: tuple[tuple[float, float], tuple[float, float]] | None


def fit_to(
    source: Source, train: Features, method: str, options: Mapping, seed: int
) -> nn.Module:
    """Fits a method so that all classes count equally.

    Images of smaller classes are repeated, as often as needed for the number of the
    largest one. That is a weight of the images for every method, also for those in
    closed form.
    """
    shots = max(1, len(train) // len(source.class_names))
    data = source.data(train.take(balanced(train.labels)), shots, seed)
    return METHODS[method].fit(data, **options)


def balanced(labels: Tensor) -> Tensor:
    """Returns rows in which each class is as frequent as the largest one.

    If the classes have equal numbers, these are all rows in order.
    """
    most = int(labels.bincount().max())
    classes = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    rows = [own.repeat(-(-most // len(own)))[:most] for own in classes]
    return torch.cat(rows).sort().values


def fit(
    config: FewShotConfig, out: str | Path, method: str, quiet: bool = False
) -> Fitted:
    """Fits a method to all images of a data set, except those of its part test.

    Args:
        config: Data set, encoder and ``overrides``. Shots and seeds are not used.
        out: Classifier file to write.
        method: One of ``METHODS``, with its fixed settings.
        quiet: Whether to hide the progress bars.

    Returns:
        What it is fitted to.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If a file is missing.
        ValueError: If the data set or an image is wrong.
    """
    check_new(out)
    if config.features:
        source: Source = FeatureSource(config)
        left = len(source.file.test)
        source.prepare()
    else:
        source = ImageSource(config, quiet, whole=True)
        left = len(source.task.split['test'])
        source.prepare()
        parts = {k: source.task.split[k] for k in ('train', 'val')}
        encode_parts(source.task, source.cache, parts, config.views, True)
    train = source.all_labelled(test=False)
    counts = train.labels.bincount(minlength=len(source.class_names)).tolist()
    if empty := [n for n, k in zip(source.class_names, counts, strict=True) if not k]:
        raise ValueError(f'there is no image of {", ".join(map(repr, empty))}.')
    options = {**METHODS[method].defaults, **config.overrides.get(method, {})}
    record = {
        'name': Path(out).stem,
        'method': method,
        'selection': 'fixed',
        'options': options,
        'shots': max(1, len(train) // len(counts)),
        'seed': config.seeds[0],
        'pictures': len(train),
        'made_with': describe_software(),
    }
    accuracy = None
    if not METHODS[method].needs_encoder and max(counts) > 1:
        plain = source.all_labelled(test=False, plain=True)
        accuracy = cross_validate(source, train, plain, method, options, record['seed'])
    classifier = fit_to(source, train, method, options, record['seed'])
    about = source.made_by, source.class_names, source.preprocessing, record
    save_classifier(out, classifier, *about)
    return Fitted(dict(zip(source.class_names, counts, strict=True)), left, accuracy)


def cross_validate(
    source: Source,
    train: Features,
    plain: Features,
    method: str,
    options: Mapping,
    seed: int,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Computes ``Fitted.accuracy``.

    Each class is cut into ``FOLDS`` parts in the order of its images, so that images
    taken one after the other stay together. The only image of a class is never held
    out.
    """
    labels, names = train.labels, (method, 'zero_shot')
    fold = torch.full_like(labels, -1)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        if len(own) > 1:
            fold[own] = torch.arange(len(own)) * FOLDS // len(own)
    right = torch.zeros(len(names), len(labels))
    for part in range(FOLDS):
        rest, held = (x.nonzero()[:, 0] for x in (fold != part, fold == part))
        for row, name in enumerate(names if len(held) else ()):
            own = options if name == method else {}
            classifier = fit_to(source, train.take(rest), name, own, seed)
            with torch.no_grad():
                found = classifier(plain.features[0, held]).argmax(1)
            right[row, held] = (found == labels[held]).float()
    tested = fold >= 0
    by_class = [
        right[:, tested & (labels == k)].mean(1) for k in labels[tested].unique()
    ]
    means = right[:, tested].mean(1), torch.stack(by_class).mean(0)
    of_method, of_zero_shot = (100 * torch.stack(means, 1)).tolist()
    return tuple(of_method), tuple(of_zero_shot)

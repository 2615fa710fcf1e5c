"""A classifier of all images, whose classes may have unequal numbers of them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dsnet_mm.datasets.features import Features
from dsnet_mm.files import check_new

from .config import FewShotConfig
from .deployment import save_classifier
from .methods import METHODS
from .sources import FeatureSource, ImageSource, Source, encode_parts
from .work_dir import describe_software


def fit_to(
    source: Source, train: Features, out: Path, about: Mapping[str, object]
) -> None:
    """Fits a method so that all classes count equally, and writes the classifier.

    ``about`` has ``method``, ``options``, ``selection`` and ``seed``. Images of smaller
    classes are repeated up to the number of the largest one. That is a weight of the
    images for every method, also in closed form.
    """
    keys = ('method', 'selection', 'options', 'seed')
    shots = max(1, len(train) // len(source.class_names))
    record = {key: about[key] for key in keys} | {
        'name': out.stem,
        'shots': shots,
        'pictures': len(train),
        'made_with': describe_software(),
    }
    data = source.data(train.take(balanced(train.labels)), shots, about['seed'])
    classifier = METHODS[about['method']].fit(data, **about['options'])
    made = source.made_by, source.class_names, source.preprocessing
    save_classifier(out, classifier, *made, record)


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
) -> dict[str, int]:
    """Fits a method with its defaults to all images, except those of a part test.

    Args:
        config: Data set, encoder and ``overrides``. Shots and seeds are not used.
        out: Classifier file to write.
        method: One of ``METHODS``.
        quiet: Whether to hide the progress bars.

    Returns:
        Number of images by class name.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If a file is missing.
        ValueError: If the data set or an image is wrong.
    """
    check_new(out)
    source: Source = FeatureSource(config) if config.features else None
    source = source or ImageSource(config, quiet, whole=True)
    source.prepare()
    if not config.features:
        parts = {k: source.task.split[k] for k in ('train', 'val')}
        encode_parts(source.task, source.cache, parts, config.views, False)
    train, names = source.all_labelled(test=False), source.class_names
    counts = train.labels.bincount(minlength=len(names)).tolist()
    if 0 in counts:
        raise ValueError(f'no image of {names[counts.index(0)]!r} can be read.')
    options = {**METHODS[method].defaults, **config.overrides.get(method, {})}
    about = dict(method=method, options=options, selection='fixed', seed=1)
    fit_to(source, train, Path(out), about)
    return dict(zip(names, counts, strict=True))

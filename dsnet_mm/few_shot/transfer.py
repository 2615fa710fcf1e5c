"""Test of a classifier on another data set."""

from pathlib import Path

from dsnet_mm.datasets.features import FeatureCache
from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.tasks import load_task

from .deployment import load_classifier
from .evaluation import Score, evaluate


def transfer(
    classifier_file: str | Path,
    dataset: str | Path,
    data_root: str | Path = 'data',
    cache_dir: str | Path = 'work_dirs/few_shot_features',
    encoder: OpenCLIPEncoder | None = None,
) -> Score:
    """Test a classifier on the test split of another data set.

    The classes of the data set must be among those of the classifier. Logits of the
    other classes are left out. The shifted test sets of ImageNet are such data sets.

    Args:
        classifier_file: File of :func:`save_classifier`.
        dataset: See :func:`dsnet_mm.tasks.load_task`.
        data_root: Folder of the public data sets.
        cache_dir: Folder of the features.
        encoder: See :func:`load_classifier`.

    Returns:
        The score.

    Raises:
        ValueError: If the classifier does not know a class.
        FileNotFoundError: If a file is missing.
    """
    deployed = load_classifier(classifier_file, encoder)
    task = load_task(dataset, data_root)
    unknown = sorted(set(task.class_names) - set(deployed.class_names))
    if unknown:
        raise ValueError(
            f'the classifier does not know {len(unknown)} of the classes of '
            f'{task.name}, such as {unknown[0]!r}.'
        )
    if task.class_names == deployed.class_names:
        columns = list(range(len(task.class_names)))
    else:
        columns = [deployed.class_names.index(name) for name in task.class_names]
    cache = FeatureCache(
        cache_dir, deployed.encoder, preprocessing=deployed.preprocessing
    )
    return evaluate(
        lambda f: deployed.classifier(f)[:, columns], cache.images(task.split['test'])
    )

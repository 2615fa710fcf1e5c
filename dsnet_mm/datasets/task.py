"""A data set ready for few-shot classification."""

import logging
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet_mm.clip.prompts import check_class_names, resolve_prompts

from .catalogue import PUBLIC_DATASETS
from .images import IMAGE_SUFFIXES, count_other_files
from .parquet import find_parquet, read_parquet
from .readers import read_csv, read_folder, read_public
from .splits import Split, split_within_classes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShotTask:
    """A data set ready for few-shot classification.

    Attributes:
        name: Name of the data set, or of its folder or file.
        split: Items with full paths.
        class_names: Names by label, with spaces instead of underscores.
        prompts: Prompts. Each has one ``{}`` for the class name.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]


def load_task(
    dataset: str | Path,
    data_root: str | Path = 'data',
    prompts: str | Path | Sequence[str] | None = None,
    test_only: bool = False,
    whole: bool = False,
) -> FewShotTask:
    """Reads a data set by name, folder or file. Images are not opened.

    Args:
        dataset: One of

            - a name of ``PUBLIC_DATASETS``, read in CoOp's layout below ``data_root``;
            - a folder with one folder of images a class, directly or below
              ``train``, ``test`` and, if there is one, ``val``;
            - a folder of parquet files, or one, with the columns ``image`` and
              ``label``, as the ``datasets`` library writes them;
            - a CSV file with the columns ``path`` and ``class`` and, if there is one,
              ``split``. Paths are relative to the file.

            A folder or file without its own split is split 50/20/30 within each
            class, the same way in each call.
        data_root: Folder of the public data sets.
        prompts: See :func:`resolve_prompts`. None takes the prompt of the papers, or
            ``'photo'`` for a folder or file.
        test_only: Whether only the test images are needed. Those of a folder or file
            without its own split are then all of its images.
        whole: Whether the training images of a folder or file without its own split
            are all of its images. There are no others then.

    Returns:
        The task.

    Raises:
        FileNotFoundError: If the data set, or one of its files, is missing.
        ValueError: If the layout or the class names of the data set are wrong.
    """
    path = Path(dataset)
    if str(dataset) in PUBLIC_DATASETS:
        name = str(dataset)
        split = read_public(name, Path(data_root))
        prompts = name if prompts is None else prompts
    elif parquet := find_parquet(path):
        name = path.resolve().name if path.is_dir() else path.stem
        split = read_parquet(parquet, name)
    elif os.path.isdir(path):
        name, split = path.resolve().name, read_folder(path)
        if others := count_other_files(path):
            logger.warning(
                'files of %s that are not read: %s; images are %s.',
                *(path, others, ', '.join(IMAGE_SUFFIXES)),
            )
    elif path.suffix.lower() == '.csv' and os.path.isfile(path):
        name, split = path.stem, read_csv(path)
    else:
        problem = 'is no data set' if path.exists() else 'does not exist'
        raise FileNotFoundError(
            f'{dataset} {problem}; name a folder, a CSV or parquet file, or one of '
            f'{", ".join(PUBLIC_DATASETS)}.'
        )
    try:
        return _build_task(name, split, prompts, test_only, whole)
    except ValueError as error:
        raise ValueError(f'{dataset}: {error}') from error


def _build_task(
    name: str,
    split: Split,
    prompts: str | Path | Sequence[str] | None,
    test_only: bool,
    whole: bool,
) -> FewShotTask:
    if 'all' in split:
        items = split['all']
        split = {'train': [], 'val': [], 'test': items}
        if whole:
            split = {'train': items, 'val': [], 'test': []}
        elif not test_only:
            split = split_within_classes(items)
    names: dict[int, str] = {}
    for path, label, cls in (item for items in split.values() for item in items):
        if names.setdefault(label, cls.replace('_', ' ')) != cls.replace('_', ' '):
            raise ValueError(
                f'label {label} is {names[label]!r}; of {path!r}, {cls!r}.'
            )
    if not split['test'] and not whole:
        raise ValueError('there are no test images.')
    if sorted(names) != [*range(len(names))]:
        found = reprlib.repr(sorted(names))
        raise ValueError(f'labels must be 0, 1, 2 and so on, found {found}.')
    class_names = tuple(names[label] for label in range(len(names)))
    if name not in PUBLIC_DATASETS:  # ImageNet has duplicate names
        check_class_names(class_names)
    if test_only:
        split = {'train': [], 'val': [], 'test': split['test']}
    elif len(names) < 2:
        raise ValueError(f'at least two classes are needed, found {class_names[0]!r}.')
    if split['train']:
        trained = {item[1] for item in split['train']}
        empty = [repr(cls) for i, cls in enumerate(class_names) if i not in trained]
        if empty:
            raise ValueError(f'there is no training image of {", ".join(empty)}.')
    prompts = resolve_prompts('photo' if prompts is None else prompts)
    return FewShotTask(name, split, class_names, prompts)

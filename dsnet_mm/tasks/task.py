"""A data set ready for few-shot classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .catalogue import PUBLIC_DATASETS
from .prompts import check_class_names, resolve_prompts
from .readers import read_csv, read_folder, read_public
from .splits import Split


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
) -> FewShotTask:
    """Read a data set by name, folder or file. Pictures are not opened.

    Args:
        dataset: One of

            - a name of ``PUBLIC_DATASETS``, read in CoOp's layout below ``data_root``;
            - a folder with one folder of pictures a class, directly or below
              ``train``, ``test`` and, if there is one, ``val``;
            - a CSV file with the columns ``path`` and ``class`` and, if there is one,
              ``split``. Paths are relative to the file.

            A folder or file without its own split is split 50/20/30 within each
            class, the same way in each call.
        data_root: Folder of the public data sets.
        prompts: See :func:`resolve_prompts`. None takes the prompt of the papers, or
            ``'photo'`` for a folder or file.

    Returns:
        The task.

    Raises:
        FileNotFoundError: If the data set, or one of its files, is missing.
        ValueError: If the data set does not have one of these layouts.
    """
    path = Path(dataset)
    if str(dataset) in PUBLIC_DATASETS:
        name = str(dataset)
        split = read_public(name, Path(data_root))
        prompts = name if prompts is None else prompts
    elif path.is_dir():
        name, split = path.resolve().name, read_folder(path)
    elif path.suffix == '.csv' and path.is_file():
        name, split = path.stem, read_csv(path)
    else:
        raise FileNotFoundError(
            f'{str(dataset)!r} is neither a data set ({", ".join(PUBLIC_DATASETS)}) '
            f'nor an existing folder or CSV file.'
        )
    names: dict[int, str] = {}
    for items in split.values():
        for item in items:
            names.setdefault(item[1], item[2].replace('_', ' '))
    if not split['test']:
        raise ValueError(f'{name} has no test pictures.')
    missing = sorted(set(range(max(names) + 1)) - set(names))
    if missing:
        raise ValueError(f'{name} has no picture of the classes {missing}.')
    class_names = tuple(names[label] for label in range(len(names)))
    if name not in PUBLIC_DATASETS:  # ImageNet has two names twice
        check_class_names(class_names)
    if split['train']:
        trained = {item[1] for item in split['train']}
        empty = [cls for label, cls in enumerate(class_names) if label not in trained]
        if empty:
            raise ValueError(
                f'{name} has no training picture of {", ".join(map(repr, empty))}.'
            )
    return FewShotTask(
        name,
        split,
        class_names,
        resolve_prompts('photo' if prompts is None else prompts),
    )

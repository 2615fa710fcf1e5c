"""The check of a data set before it is used."""

from pathlib import Path

from dsnet_mm.tasks import PUBLIC_DATASETS, load_task

from .pictures import open_picture


def diagnose(
    dataset: str | Path, data_root: str | Path = 'data', decode: bool = False
) -> list[str]:
    """Look for what is wrong with a data set.

    Args:
        dataset: Name, folder or file, see :func:`dsnet_mm.tasks.load_task`.
        data_root: Folder of the public data sets.
        decode: Whether to open every picture, which finds damaged ones.

    Returns:
        One sentence for each problem: a missing file, with its source and its place;
        a count that differs from the papers; missing, empty or damaged pictures.
    """
    try:
        task = load_task(dataset, data_root)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    problems = []
    info = PUBLIC_DATASETS.get(str(dataset))
    if info is not None:
        if len(task.class_names) != info.classes:
            problems.append(
                f'{info.title} has {len(task.class_names)} classes here and '
                f'{info.classes} in the papers.'
            )
        for part, count in zip(('train', 'val', 'test'), info.counts, strict=True):
            if len(task.split[part]) != count:
                problems.append(
                    f'{info.title} has {len(task.split[part])} {part} pictures here '
                    f'and {count} in the papers.'
                )
    bad: dict[str, list[str]] = {'missing': [], 'empty': [], 'damaged': []}
    for path in {item[0] for items in task.split.values() for item in items}:
        file = Path(path)
        if not file.is_file():
            bad['missing'].append(path)
        elif file.stat().st_size == 0:
            bad['empty'].append(path)
        elif decode and not _can_be_read(file):
            bad['damaged'].append(path)
    for what, paths in bad.items():
        if paths:
            rest = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
            problems.append(
                f'{len(paths)} pictures are {what}: {", ".join(sorted(paths)[:3])}'
                f'{rest}.' + (f' They come from {info.source}.' if info else '')
            )
    return problems


def _can_be_read(path: Path) -> bool:
    try:
        open_picture(path)
    except ValueError:
        return False
    return True

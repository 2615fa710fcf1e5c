"""Reader of parquet files with images, as the ``datasets`` library writes them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from dsnet_mm.progress import progress_bar

from .images import IMAGE_SUFFIXES
from .readers import PART_NAMES, number_classes
from .splits import Split, read_split

UNPACKED = Path('work_dirs/few_shot_images')
"""Folder of the unpacked images, below the current folder."""

_PART = re.compile(rf'(?:^|[-_. /])({"|".join(PART_NAMES)})(?=$|[-_. /])')


def find_parquet(path: Path) -> list[Path]:
    """Returns the parquet files that are, or are in or below, a path."""
    if os.path.isdir(path):
        return sorted(path.glob('*.parquet')) + sorted(path.glob('*/*.parquet'))
    is_one = path.suffix.lower() == '.parquet' and os.path.isfile(path)
    return [path] if is_one else []


def read_parquet(files: Sequence[Path], name: str) -> Split:
    """Reads parquet files with the columns ``image`` and ``label``.

    The part of a file is the word train, validation or test in the name of the file or
    its folder. The images are unpacked into ``UNPACKED``, once.

    Args:
        files: The files.
        name: Name of the data set.

    Returns:
        The split, or ``'all'`` if there is only one part.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If a file is no such table, there are no rows, or there are several
            parts, but not both train and test.
    """
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
    folder = UNPACKED / f'{name}_{digest}'
    if not folder.is_dir():
        temporary = folder.with_name(f'.{folder.name}.{uuid4().hex[:8]}')
        try:
            _unpack(files, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    split = {
        part: [(str(folder / path), label, cls) for path, label, cls in items]
        for part, items in read_split(folder / 'split.json').items()
    }
    parts = [part for part, items in split.items() if items]
    if len(parts) == 1:
        return {'all': split[parts[0]]}
    if not {'train', 'test'} <= set(parts):
        raise ValueError(
            f'{files[0]} and the files beside it are of {" and ".join(parts)}; name '
            f'train and test, or put all into one part to have them split.'
        )
    return split


def _unpack(files: Sequence[Path], folder: Path) -> None:
    """Writes the images, and the split in the format of ``split_zhou_*.json``."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"reading {files[0]} needs pyarrow: pip install 'dsnet_mm[parquet]'."
        ) from error
    rows: list[tuple[str, str, str]] = []  # part, path, class name
    names: Sequence[str] = ()
    with progress_bar(len(files), 'unpacking', 'files') as bar:
        for number, file in enumerate(files):
            words = _PART.findall(f'{file.parent.name}/{file.name}'.lower())
            part = PART_NAMES[words[-1]] if words else 'train'
            (folder / part).mkdir(parents=True, exist_ok=True)
            try:
                table = parquet.ParquetFile(file)
                columns = table.schema_arrow.names
                if not {'image', 'label'} <= set(columns):
                    raise ValueError(
                        f'it must have the columns image and label, found '
                        f'{", ".join(columns)}.'
                    )
                names = _label_names(table.schema_arrow) or names
                batches = table.iter_batches(64, columns=['image', 'label'])
                found = (row for batch in batches for row in batch.to_pylist())
                for count, row in enumerate(found):
                    image, cls = row['image'], row['label']
                    content = image.get('bytes') if isinstance(image, dict) else image
                    if not isinstance(content, bytes):
                        raise ValueError(
                            f'row {count} of the column image holds no bytes of an '
                            f'image; save the data set with its images.'
                        )
                    if isinstance(cls, int) and 0 <= cls < len(names):
                        cls = names[cls]
                    if not isinstance(cls, str):
                        raise ValueError(
                            f'it has the label {cls!r} in row {count}, and '
                            f'{len(names) or "no"} names of labels; labels must be '
                            f'numbers or names: save the data set with a ClassLabel '
                            f'column, or with the names as label.'
                        )
                    named = image.get('path') if isinstance(image, dict) else None
                    suffix = Path(str(named or '')).suffix.lower()
                    path = f'{part}/{number:04d}_{count:07d}'
                    path += suffix if suffix in IMAGE_SUFFIXES else ''
                    (folder / path).write_bytes(content)
                    rows.append((part, path, cls))
            except Exception as error:  # pyarrow's readers raise errors of any type
                reason = ' '.join(str(error).split())
                raise ValueError(f'{file} cannot be read: {reason}') from error
            bar.update()
    if not rows:
        raise ValueError(f'{files[0]} and the files beside it have no rows.')
    split = json.dumps(number_classes(rows, names))
    (folder / 'split.json').write_text(split, encoding='utf-8')


def _label_names(schema) -> list[str] | None:
    """Returns the class names that the ``datasets`` library stores in a schema."""
    text = (schema.metadata or {}).get(b'huggingface', b'{}')
    with suppress(KeyError, TypeError, ValueError):  # of another library or version
        names = json.loads(text)['info']['features']['label']['names']
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return None

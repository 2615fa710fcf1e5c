"""Annotation files in COCO's format."""

import json
import reprlib
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap

from dsnet_mm.files import read_json

_ID, _NUMBER = int | float | str, int | float
FIELDS = {
    'images': {'id': _ID, 'file_name': str, 'width': _NUMBER, 'height': _NUMBER},
    'annotations': {'id': _ID, 'image_id': _ID, 'category_id': _ID},
    'categories': {'id': _ID, 'name': str},
}
"""What mmdet needs in the entries of each list, besides boxes and masks."""


def read_coco(ann_file: str) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads an annotation file.

    Args:
        ann_file: The file.

    Returns:
        The entries of each list that have all ``FIELDS``, and the places of the others,
        such as ``"images[3]: width of {'id': 4}"``.

    Raises:
        ValueError: If the file is not JSON, or lacks one of the lists.
    """
    content = read_json(ann_file)
    good: dict[str, list[dict]] = {name: [] for name in FIELDS}
    bad = []
    for name, fields in FIELDS.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f'{ann_file} has no list {name}, as COCO files have.')
        for i, entry in enumerate(entries):
            values = entry if isinstance(entry, dict) else {}
            wrong = [
                f for f, kind in fields.items() if not isinstance(values.get(f), kind)
            ]
            if wrong:
                bad.append(f'{name}[{i}]: {", ".join(wrong)} of {reprlib.repr(entry)}')
            else:
                good[name].append(entry)
    return good, bad


def check_class_order(ann_file: str, classes: Sequence[str]) -> None:
    """Checks that labels have the names that a configuration gives them.

    mmdet numbers classes in the order of the annotation file, and names them in that of
    the configuration. Of the file only the categories are parsed if they are right.

    Args:
        ann_file: The annotation file.
        classes: Names by label, ``metainfo.classes`` of the configuration.

    Raises:
        ValueError: If a label has another name in the file, or no class is in it.
    """
    for read in (_scan_categories, _read_categories):
        used = [name for name in read(ann_file) if name in classes]
        if used and used == [*classes[: len(used)]]:
            return
    given, found = dict(enumerate(classes)), dict(enumerate(used))
    label = next((i for i in found if found[i] != given.get(i)), 0)
    raise ValueError(
        f'label {label} is {given.get(label)!r} in metainfo.classes, and '
        f'{found.get(label)!r} in {ann_file}; mmdet counts classes in the order of the '
        f'file, so name only categories of the file, in its order.'
    )


def _scan_categories(ann_file: str) -> list[str]:
    """Returns the names of what looks like the categories, without the rest."""
    try:
        with (
            open(ann_file, 'rb') as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as m,
        ):
            start = m.rfind(b'"categories"')
            text = m[start : start + 2**24].decode(errors='replace').partition(':')[2]
        entries, _ = json.JSONDecoder().raw_decode(text.lstrip())
        return [entry['name'] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_categories(ann_file: str) -> list[str]:
    return [entry['name'] for entry in read_coco(ann_file)[0]['categories']]

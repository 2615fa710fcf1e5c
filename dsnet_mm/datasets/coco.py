"""Annotation files in COCO's format."""

import json
import reprlib
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap

from dsnet_mm.files import read_json

_ID = (int, float, str)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    'images': {
        'id': _ID,
        'file_name': (str,),
        'width': (int, float),
        'height': (int, float),
    },
    'annotations': {'id': _ID, 'image_id': _ID, 'category_id': _ID},
    'categories': {'id': _ID, 'name': (str,)},
}
"""The lists of an annotation file, and the fields that mmdet needs in their entries.
Boxes and masks are not among them."""


def read_coco(ann_file: str) -> tuple[dict[str, list[dict]], list[str]]:
    """Reads an annotation file.

    Args:
        ann_file: The file.

    Returns:
        The entries of each list that have all ``FIELDS``, and the places of those that
        have not, such as ``"images[3]: width of {'id': 4}"``.

    Raises:
        ValueError: If the file is not JSON, or lacks one of the lists.
    """
    content = read_json(ann_file)
    good: dict[str, list[dict]] = {}
    bad = []
    for name, fields in FIELDS.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f'{ann_file} has no list {name}, as COCO files have.')
        good[name] = []
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
        names = read(ann_file)
        used = [name for name in names if name in classes]
        if used and used == [*classes[: len(used)]]:
            return
    if not used:
        raise ValueError(
            f'none of the classes {reprlib.repr([*classes])} is a category of '
            f'{ann_file}, which has {reprlib.repr(names)}; set metainfo.classes.'
        )
    given = dict(enumerate(classes))
    label = next(i for i, name in enumerate(used) if name != given.get(i))
    raise ValueError(
        f'the class of label {label} is {used[label]!r} in {ann_file}, and '
        f'{given.get(label)!r} in metainfo.classes of the configuration; mmdet counts '
        f'in the order of the file, so write the classes in this order, and only those '
        f'that the file has.'
    )


def _scan_categories(ann_file: str) -> list[str]:
    """Returns the names of what looks like the categories, without the rest."""
    try:
        with (
            open(ann_file, 'rb') as file,
            mmap(file.fileno(), 0, access=ACCESS_READ) as content,
        ):
            start = content.rfind(b'"categories"')
            text = content[start : start + 2**24].decode(errors='replace')
        text = text.partition(':')[2].lstrip()
        return [entry['name'] for entry in json.JSONDecoder().raw_decode(text)[0]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _read_categories(ann_file: str) -> list[str]:
    return [entry['name'] for entry in read_coco(ann_file)[0]['categories']]

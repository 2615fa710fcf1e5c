"""Results of a run over many images: written as they come, joined at the end."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsnet_mm.files import naming, write_atomic


def version_of(path: Path) -> list[int] | None:
    """Returns size and time of change of a file, None if there are none."""
    try:
        return [path.stat().st_size, path.stat().st_mtime_ns]
    except OSError:
        return None


class Results:
    """A file of JSON lines: what the results depend on, then a line for each image.

    A line that was cut off is ignored, so a run that was killed has lost the images in
    work. Of several lines of an image the last one counts.

    Args:
        file: File to write, or to continue.
        run: What the results depend on, by name.

    Raises:
        ValueError: If the file belongs to another run, or is damaged.
    """

    def __init__(self, file: Path, run: dict[str, Any]) -> None:
        if not file.exists():
            write_atomic(file, json.dumps(run) + '\n')
        self.file = file
        with file.open('rb') as lines:
            try:
                known = dict(json.loads(lines.readline()))
            except (ValueError, TypeError):
                raise ValueError(f'{file} is damaged; choose another folder') from None
            if other := [key for key in run if known.get(key) != run[key]]:
                raise ValueError(
                    f'{file} belongs to a run with other {", ".join(other)}; take the '
                    f'same again, or choose another folder'
                )
        self._read()

    def _read(self) -> None:
        """Finds the line of each image, and cuts off a half one at the end."""
        # The place of the line, and the version of the image.
        self._found: dict[str, tuple[int, Any]] = {}
        at = 0
        with self.file.open('rb') as lines:
            for line in iter(lines.readline, b''):
                if not line.endswith(b'\n'):
                    os.truncate(self.file, at)
                    break
                with suppress(ValueError, TypeError, KeyError):  # the first is the run
                    record = json.loads(line)
                    self._found[record['file_name']] = at, record['version']
                at += len(line)

    def has(self, name: str, path: Path) -> bool:
        """Tells whether an image has a result, and has not changed since."""
        return name in self._found and self._found[name][1] == version_of(path)

    def add(self, record: dict[str, Any]) -> None:
        """Appends the result of an image.

        Args:
            record: ``file_name``, ``width``, ``height``, the ``version`` of the file
                before it was read, and ``found``: its entries in COCO's result format.

        Raises:
            OSError: If it cannot be written. The message names the file.
        """
        with naming(self.file), self.file.open('ab') as lines:
            lines.write(json.dumps(record).encode() + b'\n')

    def join(
        self,
        out: Path,
        names: Sequence[str],
        class_names: Sequence[str],
        failed: dict[str, str],
    ) -> list[tuple[str, int]]:
        """Writes ``predictions.json`` and ``images.json``, atomically.

        Args:
            out: Folder to write them into.
            names: All images, in order.
            class_names: Names of the classes. Without them the numbers are written.
            failed: What is wrong with the images that have no result.

        Returns:
            The classes that were found, the most frequent first, and their numbers of
            objects, or of images of a classifier.
        """
        images, counts, last = [], Counter(), 0
        # Again, as another process may have written too.
        self._read()
        for name in {*names} - {*self._found, *failed}:
            failed[name] = 'its result was lost; --resume makes it again'

        def texts() -> Iterator[str]:
            nonlocal last
            yield '['
            with self.file.open('rb') as lines:
                for name in names:
                    if name in failed:
                        continue
                    lines.seek(self._found[name][0])
                    record = json.loads(lines.readline())
                    sizes = {key: record[key] for key in ('width', 'height')}
                    images.append(dict(id=len(images) + 1, file_name=name, **sizes))
                    for rank, entry in enumerate(record['found']):
                        label = entry['category_id'] - 1
                        last = max(last, label)
                        yield ', ' if counts else ''
                        yield json.dumps(entry | dict(image_id=len(images)))
                        # A classifier has entries of its best classes, without boxes.
                        counts[label] += rank == 0 or 'bbox' in entry
            yield ']'

        write_atomic(out / 'predictions.json', texts())
        # A checkpoint without names of classes, such as converted weights, has numbers.
        class_names = class_names or [str(i) for i in range(last + 1)]
        content = dict(
            images=images,
            annotations=[],
            categories=[dict(id=i, name=x) for i, x in enumerate(class_names, 1)],
            failed=[dict(file_name=k, error=v) for k, v in failed.items()],
        )
        write_atomic(out / 'images.json', json.dumps(content))
        return [(class_names[label], n) for label, n in counts.most_common() if n]

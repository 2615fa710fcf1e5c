"""Folders that are written in full or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the place of ``out`` if nothing fails.

    Args:
        out: Folder to write. It keeps its content if the block raises.

    Yields:
        The temporary folder, beside ``out``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = uuid4().hex[:8]
    fresh = out.with_name(f'.{out.name}.{tag}.new')
    stale = out.with_name(f'.{out.name}.{tag}.old')
    fresh.mkdir()
    try:
        yield fresh
        if out.exists():
            os.replace(out, stale)
        os.replace(fresh, out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        if stale.exists() and not out.exists():
            os.replace(stale, out)
        raise
    shutil.rmtree(stale, ignore_errors=True)

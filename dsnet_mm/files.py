"""Atomic writing of files and folders, and checks that a file exists or does not."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PART = '.part'
"""End of the hidden name of a file that is not written to its end."""


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file atomically. Its folder is created if necessary.

    Args:
        path: File to write. An existing file is replaced.
        content: Content of the file. Text is encoded as UTF-8.

    Raises:
        FileExistsError: If ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(
            f'{path} is a folder, and a file is to be written there; remove it.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{uuid4().hex[:8]}')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_new(path: str | Path) -> None:
    """Refuses to overwrite a file.

    Raises:
        FileExistsError: If it exists.
    """
    if Path(path).exists():
        raise FileExistsError(f'{path} exists; choose another name.')


def check_file(path: str, what: str, advice: str) -> None:
    """Checks that a file exists. URLs are not checked.

    Args:
        path: Path of the file, or a URL.
        what: Description of the file, for the error message.
        advice: What to do if it is missing, for the error message.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if '://' not in path and not os.path.isfile(path):
        raise FileNotFoundError(f'there is no {what} {path}; {advice}')


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


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file that takes the place of ``path`` once it is on the disk.

    Args:
        path: File to write. It keeps its content if the block raises, or writes
            nothing.

    Yields:
        The temporary file, beside ``path``.

    Raises:
        OSError: If it cannot be written, such as on a full disk. It names ``path``.
    """
    path = Path(path)
    part = path.with_name(f'.{uuid4().hex[:12]}{PART}')
    try:
        yield part
        if part.exists():
            with part.open('rb+') as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()


def remove_parts(folder: Path) -> None:
    """Removes what killed processes left of files, in and below a folder."""
    for path in folder.rglob(f'.*{PART}'):
        path.unlink()

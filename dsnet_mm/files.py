"""Atomic writing of files and folders, and checks that a file exists or does not."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PART = '.part'
"""End of the hidden name of a file that :func:`write_atomic` has not finished."""


def write_atomic(path: str | Path, content: bytes | str | Iterator[str]) -> None:
    """Writes a file atomically. Its folder is created if necessary.

    Args:
        path: File to write. An existing file is replaced.
        content: Content of the file, or the pieces of a long text. Text is encoded as
            UTF-8. Bytes of file names that are not UTF-8, which Python holds as
            surrogates, become ``\\udcXX``. In JSON that is the same name.

    Raises:
        FileExistsError: If ``path`` is a folder.
        OSError: If it cannot be written, for example because the disk is full. The
            message names ``path``, which keeps its content.
    """
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(
            f'{path} is a folder, and a file is to be written there; remove it.'
        )
    # Short: the name of the file may be as long as the file system allows.
    temporary = path.with_name(f'.{uuid4().hex[:12]}{PART}')
    pieces = content if isinstance(content, Iterator) else [content]
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open('wb') as file:
                for piece in pieces:
                    if isinstance(piece, str):
                        piece = piece.encode(errors='backslashreplace')
                    file.write(piece)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a file in the errors of writing it, which say only what is wrong."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_parts(folder: Path) -> None:
    """Removes what killed processes left of files, in and below a folder."""
    for path in folder.rglob(f'.*{PART}'):
        path.unlink()


def print_any_name() -> None:
    """Lets the standard output take names of files that are not UTF-8, escaped."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')


def check_new(path: str | Path) -> None:
    """Refuses to overwrite a file, and a folder that takes no file.

    Raises:
        FileExistsError: If it exists.
        PermissionError: If its folder is read-only.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f'{path} exists; choose another name.')
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise PermissionError(f'{folder} is read-only; choose another folder.')


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
    fresh = out.with_name(f'.{tag}.new')
    stale = out.with_name(f'.{tag}.old')
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

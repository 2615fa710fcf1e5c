"""Reading of text, atomic writing, and checks of files."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

PART = '.part'
"""End of the hidden name of a file that is not written to its end."""


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
    pieces = content if isinstance(content, Iterator) else [content]
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path, on_disk=False) as part, part.open('wb') as file:
        for piece in pieces:
            if isinstance(piece, str):
                piece = piece.encode(errors='backslashreplace')
            file.write(piece)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a file in the errors of writing it, which say only what is wrong."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing_file(path: str | Path, on_disk: bool = True) -> Iterator[Path]:
    """Gives a temporary file that takes the place of ``path`` if nothing fails.

    Args:
        path: File to write. It keeps its content if the block raises, or writes
            nothing.
        on_disk: Whether the content is on the disk before. This takes a few
            milliseconds, and makes the file outlive a crash of the machine.

    Yields:
        The temporary file, beside ``path``.

    Raises:
        OSError: If it cannot be written, such as on a full disk. It names ``path``.
    """
    path = Path(path)
    # Short: the name of the file may be as long as the file system allows.
    part = path.with_name(f'.{uuid4().hex[:12]}{PART}')
    with naming(path):
        try:
            yield part
            if part.exists():
                if on_disk:
                    with part.open('rb+') as file:
                        os.fsync(file.fileno())
                os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink()


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


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of the content of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_card(path: str | Path) -> None:
    """Checks weights whose card, a file of the same name that ends with .md, is there.

    Weights without a card, or with one that names no SHA-256, are not checked.

    Args:
        path: File of weights.

    Raises:
        ValueError: If the card names the SHA-256 of another file.
    """
    card = Path(path).with_suffix('.md')
    if not card.is_file():
        return
    named = re.search(r'SHA-256: `(\w+)`', card.read_text(errors='replace'))
    if named and named[1] != (found := sha256(path)):
        raise ValueError(
            f'{path} has the SHA-256 {found}, but its card {card} names {named[1]}; '
            f'it is damaged or another file, so copy it again or remove the card'
        )


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


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: If it is not in UTF-8.
    """
    try:
        return Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise ValueError(
            f'{path} is not in UTF-8 (line {line}); save it as UTF-8.'
        ) from error


def read_json(path: str | Path) -> Any:
    """Reads a JSON file in UTF-8.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        return json.loads(Path(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON in UTF-8 ({error}).') from error

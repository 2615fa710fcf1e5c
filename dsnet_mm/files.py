"""Atomic writing of files and folders, and checks of files."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


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

"""Files are written in full or not at all, and asked for by a clear sentence."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file, and its folder, so that it is there in full or not at all.

    Args:
        path: The file. One that exists is replaced.
        content: What it shall hold; text is encoded as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{uuid4().hex[:8]}')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_file(path: str, what: str, advice: str) -> None:
    """Checks that a file exists. Addresses with ``://`` are not checked.

    Args:
        path: The file.
        what: What it is, for the message.
        advice: What to do when it is missing, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if '://' not in path and not os.path.isfile(path):
        raise FileNotFoundError(f'there is no {what} {path}; {advice}')

"""Files that are written in full or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file, and its folder, so that it is there in full or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{uuid4().hex[:8]}')
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()

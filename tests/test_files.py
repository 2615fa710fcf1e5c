"""Atomic writing."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsnet_mm.files import check_new, remove_parts, write_atomic


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / 'a.json'
    write_atomic(file, 'old')
    with full_disk(1000), pytest.raises(OSError, match=r'a\.json'):
        write_atomic(file, 'x' * 2000)
    assert file.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a.json']


def test_any_name_and_any_text(tmp_path: Path) -> None:
    long = tmp_path / ('x' * 251 + '.txt')
    write_atomic(long, iter(['a', 'b']))
    assert long.read_text() == 'ab'
    name = os.fsdecode(b'\xff.png')
    write_atomic(tmp_path / 'a.json', json.dumps([name], ensure_ascii=False))
    assert json.loads((tmp_path / 'a.json').read_text(encoding='utf-8')) == [name]


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(os, 'replace', lambda *paths: None)
        context.setattr(Path, 'unlink', lambda path: None)
        write_atomic(tmp_path / 'below' / 'a.txt', 'a')
    assert len(os.listdir(tmp_path / 'below')) == 1
    remove_parts(tmp_path)
    assert os.listdir(tmp_path / 'below') == []


def test_a_read_only_folder_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_new(tmp_path / 'new' / 'a.json')
    # The tests may run as root, who can write into any folder.
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        check_new(tmp_path / 'new' / 'a.json')

"""Fixtures of the few-shot tests."""

import pytest

from tests.conftest import tool as load_tool


@pytest.fixture
def tool(monkeypatch):
    """Calls tools/few_shot.py with arguments."""

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['few_shot.py', *map(str, arguments)])
        load_tool('few_shot.py').main()

    return call

from collections.abc import Iterator

import pytest
from mmengine.logging import MMLogger


@pytest.fixture(scope='module', autouse=True)
def _no_closed_logs() -> Iterator[None]:
    """A server that starts closes all logs, and MMEngine would write to them."""
    yield
    MMLogger._instance_dict.clear()

"""Which implementation runs."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dsnet_mm.ops import select_path, use_path


def test_a_path_is_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSNET_MM_OPS', 'sdpa')
    with use_path('reference'), ThreadPoolExecutor(1) as pool:
        assert select_path('cpu')[0] == 'reference'
        with use_path('sdpa'):
            assert select_path('cuda')[0] == 'sdpa'
        assert select_path('cpu')[0] == 'reference'
        assert pool.submit(select_path, 'cpu').result()[0] == 'sdpa'
    assert select_path('cpu')[0] == 'sdpa'
    for name in ('other', ''):
        with pytest.raises(ValueError, match='reference'), use_path(name):
            pass
    assert select_path('cpu')[0] == 'sdpa'

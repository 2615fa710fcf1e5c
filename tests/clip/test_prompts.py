"""Prompts by name, file and list. test_weights.py has encodings."""

import pytest

from dsnet_mm.clip.prompts import resolve_prompts


def test_prompts_by_name_file_and_list(tmp_path):
    assert resolve_prompts('dtd') == ('{} texture.',)
    assert len(resolve_prompts('imagenet_7')) == 7
    assert len(resolve_prompts('imagenet_80')) == 80
    file = tmp_path / 'prompts.txt'
    file.write_text('a {}.\n\nthe {}.\n')
    assert resolve_prompts(file) == ('a {}.', 'the {}.')
    for bad in (['a photo'], 'a photo', ['{} {}'], []):
        with pytest.raises(ValueError, match='prompt'):
            resolve_prompts(bad)

"""Arguments that the tools have in common."""

import argparse

import pytest

from dsnet_mm.engine.launch import OldFlag


def test_the_old_name_of_a_flag_sets_it_and_warns(capsys: pytest.CaptureFixture):
    parser = argparse.ArgumentParser()
    parser.add_argument('--no-images', action='store_true')
    parser.add_argument('--no-pictures', action=OldFlag, new='--no-images')
    assert not parser.parse_args([]).no_images
    assert parser.parse_args(['--no-pictures']).no_images
    assert '--no-images' in capsys.readouterr().err
    assert '--no-pictures' not in parser.format_help()

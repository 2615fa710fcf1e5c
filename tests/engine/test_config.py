"""The configurations of DS-Net: their names, and what they inherit."""

import re
from pathlib import Path

import pytest

import dsnet_mm
from tests.conftest import REPO

CONFIGS = REPO / 'configs' / 'dsnet'
RULE = re.compile(
    r'dsnet(-(tiny|small|base|demo))?(_\d+xb\d+)?_[a-z0-9]+'
    r'|(mask_rcnn|retinanet)_dsnet(_(t|s|b|demo))?(_fpn)?(_3x|_long)?_[a-z0-9]+'
    r'|mask_rcnn_(r50|timm)_dsfpn_[a-z0-9]+'
)


def test_names_follow_one_rule() -> None:
    names = [path.stem for path in CONFIGS.glob('*.py')]
    assert len(names) > 20
    assert not [name for name in names if not RULE.fullmatch(name)]


def test_they_inherit_nothing_from_the_evidence() -> None:
    """A user's detector does not change with an experiment."""
    for path in CONFIGS.rglob('*.py'):
        assert 'evidence' not in path.read_text(), path


def test_a_name_is_found() -> None:
    path = dsnet_mm.find_config('mask_rcnn_dsnet_s_coco')
    assert Path(path) == CONFIGS / 'mask_rcnn_dsnet_s_coco.py'
    assert dsnet_mm.find_config(path) == path
    with pytest.raises(FileNotFoundError, match=r'such as .*dsnet-demo_scenes'):
        dsnet_mm.find_config('dsnet-demo_scene')
    with pytest.raises(FileNotFoundError, match='dsnet_s_1x'):
        dsnet_mm.find_config('dsnet_s_1x_coco')

"""The installed package: use from an empty folder, missing packages, the report."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MINE = {
    'mmdet': """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        _delete_=True, type='dsnet_mm.DSNet', arch='tiny', out_indices=(0, 1, 2, 3)),
    neck=dict(type='dsnet_mm.DSFPN', in_channels=[64, 128, 320, 512]))
""",
    'mmpretrain': """
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='dsnet_mm.DSNet', arch='tiny'),
    head=dict(in_channels=512))
""",
}
BUILD = """
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile('mine.py')
init_default_scope(cfg.default_scope)
model = MODELS.build(cfg.model).eval()
print(len(model.extract_feat(torch.zeros(1, 3, 64, 64))))
"""
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent}:
            raise ModuleNotFoundError(f'No module named {{name}}', name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-c', code], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize('package', MINE)
def test_models_are_found_from_an_empty_folder(package, tmp_path):
    """By the names with ``dsnet_mm.``, without an import of this package."""
    pytest.importorskip(package)
    (tmp_path / 'mine.py').write_text(MINE[package])
    done = run(BUILD, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) == (5 if package == 'mmdet' else 1)


def test_import_is_quiet(tmp_path):
    done = run(
        'import sys, dsnet_mm\n'
        'assert not {"torch", "mmengine", "mmcv", "mmdet"} & set(sys.modules)',
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_models_need_neither_mmdet_nor_mmpretrain_nor_open_clip(tmp_path):
    absent = {'mmdet', 'mmpretrain', 'open_clip'}
    code = (
        WITHOUT.format(absent=absent)
        + """
import torch
from dsnet_mm.models import DSFPN, DSNet
net = DSNet('tiny', out_indices=(0, 1, 2, 3)).eval()
neck = DSFPN([64, 128, 320, 512], 64, num_outs=5).eval()
assert len(neck(net(torch.zeros(1, 3, 64, 64)))) == 5
assert not torch.cuda.is_initialized()
"""
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_report(tmp_path):
    from dsnet_mm.__main__ import co_attention_path, find_problems, ops_build

    done = subprocess.run(
        [sys.executable, '-m', 'dsnet_mm'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ, COLUMNS='400'),
    )
    assert re.search(r'^OpenMMLab family: (onedl|official)', done.stdout, re.M)
    lines = done.stdout.splitlines()
    assert f'dsnet_mm ops: {ops_build()}' in lines
    path = co_attention_path('cpu')
    assert any(line == f'dsnet_mm co-attention on cpu: {path}' for line in lines)
    problems = find_problems()
    assert done.returncode == bool(problems)
    assert ('No problem was found.' in lines) == (not problems)


def test_report_names_the_commands_that_solve_a_problem(monkeypatch):
    from dsnet_mm import __main__, environment
    from dsnet_mm.environment import Installed

    installed = dict(
        mmengine=Installed(('mmengine', 'onedl-mmengine'), '0.10.12'),
        mmcv=Installed(('mmcv',), '1.7.0'),
    )
    for module in (environment, __main__):
        monkeypatch.setattr(module, 'find_installed', installed.get)
    problems = ' '.join(__main__.find_problems())
    for fact in (
        'pip uninstall mmengine onedl-mmengine',
        r'mmcv \(>=2\.0\.0, <2\.4\).*1\.7\.0',
        'pip install --no-build-isolation onedl-mmcv==2.3.6',
    ):
        assert re.search(fact, problems), fact


def test_report_of_a_missing_optional_package(monkeypatch, capsys):
    """It has the command that installs the package, and no problem."""
    from dsnet_mm import __main__, environment

    find = environment.find_installed
    monkeypatch.setattr(
        environment, 'find_installed', lambda name: name != 'mmdet' and find(name)
    )
    monkeypatch.setattr(
        __main__, 'find_installed', lambda name: name != 'mmdet' and find(name)
    )
    monkeypatch.setenv('COLUMNS', '200')
    __main__.main()
    out = capsys.readouterr().out
    (line,) = (x for x in out.splitlines() if 'onedl-mmdetection==3.5.1' in x)
    assert 'pip install --no-build-isolation' in line and 'Problem' not in line


@pytest.mark.skipif(shutil.which('git') is None, reason='git is missing')
def test_commit_is_not_that_of_another_repository(monkeypatch, tmp_path):
    """As of a package in an environment that is in the repository of its user."""
    from dsnet_mm import environment

    (tmp_path / 'site').mkdir()
    (tmp_path / 'site' / 'environment.py').touch()
    author = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    for args in (['init', '-q'], ['commit', '-qm', 'x', '--allow-empty']):
        subprocess.run(['git', *author, *args], cwd=tmp_path, check=True)
    file = tmp_path / 'site' / 'environment.py'
    monkeypatch.setattr(environment, '__file__', str(file))
    assert environment.commit() == 'unknown'
    subprocess.run(['git', 'add', '.'], cwd=tmp_path, check=True)
    assert re.fullmatch(r'[0-9a-f]{10}\+', environment.commit())
    subprocess.run(['git', *author, 'commit', '-qm', 'x'], cwd=tmp_path, check=True)
    for name in ('docs', 'results'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'page.md').touch()
    subprocess.run(['git', 'add', '.'], cwd=tmp_path, check=True)
    assert re.fullmatch(r'[0-9a-f]{10}', environment.commit())


def test_machine_has_the_threads_of_torch(monkeypatch):
    """``OMP_NUM_THREADS`` may be a list."""
    from dsnet_mm import environment

    monkeypatch.setenv('OMP_NUM_THREADS', '3,2')
    assert environment.machine()['threads'] == torch.get_num_threads()


def test_pinned_versions_are_those_of_pyproject():
    from dsnet_mm.environment import DISTRIBUTIONS, PINNED

    pyproject = (Path(__file__).parents[2] / 'pyproject.toml').read_text()
    for name, pinned in PINNED.items():
        assert f'"{DISTRIBUTIONS[name][0]}=={pinned}"' in pyproject


def test_error_without_mmcv_names_the_command(tmp_path):
    done = run(
        'from dsnet_mm import environment\n'
        'environment.DISTRIBUTIONS["mmcv"] = ("onedl-mmcv-absent",)\n'
        'import dsnet_mm.models',
        tmp_path,
    )
    assert re.search(
        r'mmcv \(>=2\.0\.0, <2\.4\).*pip install --no-build-isolation', done.stderr
    )

"""A training stops, or goes on, at losses that are no numbers and at bad images."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.datasets.loading import LoadImageFromFile, UnreadableImageError
from dsnet_mm.engine.hooks import FiniteLossHook, NonFiniteLossError
from tests.conftest import FOLDERS, tool

# An untrained weight that is NaN from the second iteration on.
POISON = """
_base_ = 'classifier.py'
custom_hooks = [dict(type='PoisonHook')]
custom_imports = dict(imports=['poison'])
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
"""
HOOK = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class PoisonHook(Hook):
    priority = 'HIGHEST'
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            runner.model.head.fc.bias.data[0] = float('nan')
"""


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of data and configurations that a test may damage."""
    root = tmp_path / 'copy'
    shutil.copytree(folder, root)
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    return root


def test_nan_stops_the_training(copy: Path, capsys: pytest.CaptureFixture) -> None:
    (copy / 'poisoned.py').write_text(POISON)
    (copy / 'poison.py').write_text(HOOK)
    with pytest.raises(SystemExit) as exit_:
        tool('train.py').main(
            ['poisoned.py', '--work-dir=out', '--cfg-options', FOLDERS]
        )
    assert exit_.value.code == 1
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if 'training stopped' in line
    ]
    # The weight is NaN after iteration 2, and the checkpoint of it too.
    assert 'iteration 3: loss is nan; images of the batch: ' in line
    assert line.count('sets/folders/train/disc/') == 4
    assert not torch.isfinite(
        read_checkpoint('out/iter_2.pth')['state_dict']['head.fc.bias']
    ).all()
    assert f'the last good checkpoint is {copy}/out/iter_1.pth; ' in line
    assert not os.path.exists('out/iter_3.pth')


def test_overflow_in_mixed_precision_goes_on() -> None:
    """The scale is so large that the gradients are infinite; the step is left out."""
    layer = nn.Linear(2, 1)
    before = layer.weight.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler('cpu', init_scale=3e38)
    loss = 10 * layer(torch.ones(1, 2)).square().sum() + 1
    scaler.scale(loss).backward()
    assert not layer.weight.grad.isfinite().all()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    runner = SimpleNamespace(iter=0, work_dir='none')
    hook = FiniteLossHook()
    hook.after_train_iter(
        runner, 0, {}, dict(loss=loss, grad_norm=torch.tensor(torch.inf))
    )
    with pytest.raises(
        NonFiniteLossError, match=r'iteration 1: loss_cls is inf; .*none'
    ):
        hook.after_train_iter(runner, 0, {}, dict(loss=loss, loss_cls=float('inf')))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_stops_the_training_with_its_name(
    workers: int, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    image = copy / 'sets/folders/train/disc/2.png'
    image.write_text('no image')
    args = ['classifier.py', '--work-dir=out', '--no-validate']
    options = ['--cfg-options', FOLDERS, f'train_dataloader.num_workers={workers}']
    with pytest.raises(SystemExit) as exit_:
        tool('train.py').main([*args, *options])
    assert exit_.value.code == 1
    assert (
        'training stopped: sets/folders/train/disc/2.png cannot be read as an image; '
    ) in capsys.readouterr().err


def test_a_missing_image(tmp_path: Path) -> None:
    missing = dict(img_path='none.png')
    with pytest.raises(UnreadableImageError, match=r'none\.png cannot be read'):
        LoadImageFromFile().transform(missing)
    skipped = tmp_path / 'skipped.txt'
    load = LoadImageFromFile(skipped=str(skipped))
    assert load.transform(missing) is load.transform(missing) is None
    assert skipped.read_text() == 'none.png\n' * 2


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_skipped_and_counted(
    workers: int, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ('square/1.png', 'disc/2.png'):
        (copy / 'sets/folders/train' / name).write_text('no image')
    tool('train.py').main(
        [
            'classifier.py',
            '--work-dir=out',
            '--no-validate',
            '--skip-unreadable',
            '--cfg-options',
            FOLDERS,
            f'train_dataloader.num_workers={workers}',
        ]
    )
    names = Path('out/unreadable.txt').read_text().splitlines()
    assert {Path(name).name for name in names} == {'1.png', '2.png'}
    # Two epochs; a sample at random in the place of one may be unreadable too.
    assert len(names) >= 4
    assert (
        f'2 images could not be read and were skipped {len(names)} times; '
        'out/unreadable.txt names them.'
    ) in capsys.readouterr().out

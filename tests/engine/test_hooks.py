"""A training stops, or goes on, at losses that are no numbers and at bad images."""

import shutil
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.datasets.loading import LoadImageFromFile, UnreadableImageError
from dsnet_mm.engine.hooks import FiniteLossHook, NonFiniteLossError
from tests.conftest import FOLDERS, REPO, tool

# A weight that is NaN after the second iteration, which has a finite loss.
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


@pytest.mark.parametrize(
    ('interval', 'facts'),
    [
        # The loss of the next iteration is NaN, before a checkpoint is written.
        (4, ['iteration 3:', 'loss is nan', 'is not there yet']),
        (1, ['iteration 2:', 'head.fc.bias', '{copy}/out/iter_1.pth']),
    ],
)
def test_nan_stops_the_training(
    interval: int, facts: list[str], copy: Path, capsys: pytest.CaptureFixture
) -> None:
    """And is not saved."""
    (copy / 'poisoned.py').write_text(POISON)
    (copy / 'poison.py').write_text(HOOK)
    options = [FOLDERS, f'default_hooks.checkpoint.interval={interval}']
    with pytest.raises(SystemExit, match='1'):
        tool('train.py').main(
            ['poisoned.py', '--work-dir=out', '--cfg-options', *options]
        )
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if 'training stopped' in line]
    for fact in (*facts, 'another --work-dir', 'load_from='):
        assert fact.format(copy=copy) in line
    if interval == 4:
        assert line.count('sets/folders/train/disc/') == 4
    assert {path.name for path in Path('out').glob('*.pth')} <= {'iter_1.pth'}


def test_averaged_weights_are_evaluated_and_saved(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hook of the ImageNet recipe: in validation and in tools/test.py."""
    config = 'configs/dsnet/dsnet-tiny_8xb128_in1k.py'
    hooks = Config.fromfile(REPO / config).custom_hooks
    (hook,) = (dict(hook, momentum=0.5) for hook in hooks)
    (copy / 'ema.py').write_text(
        f"_base_ = 'classifier.py'\ncustom_hooks = [{hook}]\ntrain_cfg = "
        'dict(max_epochs=1)\n'
    )
    seen = []

    def step(model: nn.Module, data: dict, original: Callable) -> list:
        seen.append(model.head.fc.weight.clone())
        return original(model, data)

    for name in ('val_step', 'test_step'):
        original = partial(step, original=getattr(BaseModel, name))
        monkeypatch.setattr(BaseModel, name, partialmethod(original))
    tool('train.py').main(['ema.py', '--work-dir=out', '--cfg-options', FOLDERS])
    path = 'out/epoch_1.pth'
    tool('test.py').main(['ema.py', path, '--work-dir=out', '--cfg-options', FOLDERS])
    checkpoint, key = read_checkpoint(path), 'head.fc.weight'
    averaged = checkpoint['state_dict'][key]
    assert len(seen) == 4 and all(torch.equal(weight, averaged) for weight in seen)
    raw = checkpoint['ema_state_dict'][f'module.{key}']
    assert not torch.equal(averaged, raw)


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
    outputs = dict(loss=loss, grad_norm=torch.tensor(torch.inf))
    hook.after_train_iter(runner, 0, {}, outputs)
    with pytest.raises(NonFiniteLossError, match=r'iteration 1.*loss_cls is inf'):
        hook.after_train_iter(runner, 0, {}, dict(loss=loss, loss_cls=float('inf')))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_stops_the_training_with_its_name(
    workers: int, copy: Path, capsys: pytest.CaptureFixture
) -> None:
    (copy / 'sets/folders/train/disc/2.png').write_text('no image')
    args = ['classifier.py', '--work-dir=out', '--no-validate', '--cfg-options']
    with pytest.raises(SystemExit, match='1'):
        tool('train.py').main(
            [*args, FOLDERS, f'train_dataloader.num_workers={workers}']
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert 'training stopped: sets/folders/train/disc/2.png' in line


def test_a_missing_image(tmp_path: Path) -> None:
    missing = dict(img_path='none.png')
    with pytest.raises(UnreadableImageError, match=r'none\.png cannot be read'):
        LoadImageFromFile().transform(missing)
    skipped = tmp_path / 'skipped.txt'
    load = LoadImageFromFile(skipped=str(skipped))
    assert load.transform(missing) is load.transform(missing) is None
    assert skipped.read_text() == 'none.png\n' * 2


def test_unreadable_images_are_skipped_and_counted(
    copy: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ('square/1.png', 'disc/2.png'):
        (copy / 'sets/folders/train' / name).write_text('no image')
    args = ['classifier.py', '--work-dir=out', '--no-validate', '--skip-unreadable']
    options = [FOLDERS, 'train_dataloader.num_workers=2']
    tool('train.py').main([*args, '--cfg-options', *options])
    names = Path('out/unreadable.txt').read_text().splitlines()
    assert {Path(name).name for name in names} == {'1.png', '2.png'}
    # Two epochs; a sample at random in the place of one may be unreadable too.
    assert len(names) >= 4
    line = capsys.readouterr().out.splitlines()[-2]
    for fact in ('2 images', f'{len(names)} times', 'out/unreadable.txt'):
        assert fact in line

"""A training that is killed and resumed ends as one that was never interrupted."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.conftest import FOLDERS, tool

# All that is random: order, flips and crops by NumPy, drop path and dropout by PyTorch.
RANDOM = """
_base_ = 'classifier.py'
train_dataloader = dict(
    batch_size=2, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5),
            dict(type='RandomCrop', crop_size=32), dict(type='PackInputs'),
        ],
    ),
)
model = dict(
    backbone=dict(drop_path_rate=0.5, attn_drop_rate=0.3),
    train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05)
)
custom_hooks = [dict(type='StopHook')]
"""
BY_EPOCH = """
train_cfg = dict(by_epoch=True, max_epochs=3)
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True, T_max=3)
"""
# Validation is not at the iterations at which checkpoints are written.
BY_ITER = """
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=11, val_interval=2)
train_dataloader.update(
    sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True)
)
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, T_max=11)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5))
"""
# The order is that of epochs, of four iterations here.
BY_ITER_IN_EPOCHS = BY_ITER.replace('InfiniteSampler', 'DefaultSampler')


needs_skip = pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason='the data loader of this MMEngine cannot skip batches',
)


class Stopped(Exception):
    pass


@HOOKS.register_module(force=True)
class StopHook(Hook):
    """Ends the training at once before an iteration."""

    def __init__(self, before: int = -1) -> None:
        self.before = before

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.before:
            raise Stopped


@pytest.fixture(scope='module')
def configs(folder: Path) -> None:
    for name, text in (
        ('epoch', BY_EPOCH),
        ('iter', BY_ITER),
        ('iter_in_epochs', BY_ITER_IN_EPOCHS),
    ):
        (folder / f'by_{name}.py').write_text(RANDOM + text)


@pytest.fixture(scope='module', autouse=True)
def _one_thread() -> Iterator[None]:
    """The order of sums depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, configs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def train(name: str, work_dir: Path, *args: str) -> None:
    """Calls train.py with flags, and with options of the form KEY=VALUE."""
    options = [FOLDERS, *(arg for arg in args if '=' in arg)]
    flags = [f'--work-dir={work_dir}', *(arg for arg in args if '=' not in arg)]
    tool('train.py').main([f'{name}.py', *flags, '--cfg-options', *options])


def weights(work_dir: Path, name: str) -> dict[str, torch.Tensor]:
    path = work_dir / ('epoch_3.pth' if name == 'by_epoch' else 'iter_11.pth')
    return torch.load(path, weights_only=False)['state_dict']


@pytest.fixture(scope='module')
def uninterrupted(
    _one_thread: None,
    folder: Path,
    configs: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Working directories of trainings without workers, with seed 3."""
    root = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ('by_epoch', 'by_iter'):
            train(name, root / name, 'randomness.seed=3')
    return {name: root / name for name in ('by_epoch', 'by_iter')}


@pytest.mark.parametrize(
    ('name', 'workers'),
    [
        ('by_epoch', 0),
        ('by_epoch', 2),
        pytest.param('by_iter', 2, marks=needs_skip),
    ],
)
def test_resumed_weights_are_equal(
    name: str, workers: int, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    """The resumed run is given another seed, and takes that of the checkpoint."""
    loader = f'train_dataloader.num_workers={workers}'
    with pytest.raises(Stopped):
        train(name, tmp_path, loader, 'randomness.seed=3', 'custom_hooks.0.before=7')
    assert (tmp_path / 'last_checkpoint').read_text().endswith(('_1.pth', '_5.pth'))
    train(name, tmp_path, '--resume', loader, 'randomness.seed=None')
    expected = weights(uninterrupted[name], name)
    for key, value in weights(tmp_path, name).items():
        assert torch.equal(value, expected[key]), key


@needs_skip
def test_a_loop_by_iteration_resumes_in_a_later_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that do not persist are started again for each epoch that is skipped."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    name, options = 'by_iter_in_epochs', ['train_dataloader.num_workers=2']
    options += ['train_dataloader.persistent_workers=False']
    train(name, tmp_path / 'whole', 'randomness.seed=3')
    with pytest.raises(Stopped):
        train(
            name,
            tmp_path / 'stopped',
            *(*options, 'randomness.seed=3', 'custom_hooks.0.before=7'),
        )
    train(name, tmp_path / 'stopped', '--resume', *options)
    expected = weights(tmp_path / 'whole', name)
    for key, value in weights(tmp_path / 'stopped', name).items():
        assert torch.equal(value, expected[key]), key


def test_another_seed_trains_other_weights(
    uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    train('by_epoch', tmp_path, 'randomness.seed=4', 'train_cfg.max_epochs=1')
    first, other = (
        torch.load(folder / 'epoch_1.pth', weights_only=False)['state_dict']
        for folder in (uninterrupted['by_epoch'], tmp_path)
    )
    assert any(not torch.equal(first[key], other[key]) for key in first)


# --- Damaged checkpoints --------------------------------------------------------


def test_a_damaged_checkpoint_gives_way_to_an_older_one(
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    work_dir = tmp_path / 'run'
    shutil.copytree(uninterrupted['by_epoch'], work_dir)
    for name in ('epoch_2.pth', 'epoch_3.pth'):
        path = work_dir / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_3.pth'))
    # Weights without the state of a training are no checkpoint to resume from.
    torch.save(dict(state_dict={}), work_dir / 'best.pth')

    damaged = str(work_dir / 'epoch_3.pth')
    with pytest.raises(SystemExit):
        train('by_epoch', work_dir, f'--resume={damaged}')
    assert damaged in capsys.readouterr().err
    with pytest.warns(UserWarning, match=rf'{damaged} .*epoch_1\.pth'):
        train('by_epoch', work_dir, '--resume')
    expected = weights(uninterrupted['by_epoch'], 'by_epoch')
    for key, value in weights(work_dir, 'by_epoch').items():
        assert torch.equal(value, expected[key]), key


def test_only_damaged_checkpoints_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'epoch_1.pth').write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    with pytest.raises(SystemExit):
        train('by_epoch', tmp_path, '--resume')
    assert 'epoch_1.pth cannot be read as a checkpoint' in capsys.readouterr().err

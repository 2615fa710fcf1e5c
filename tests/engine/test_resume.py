"""A training that is killed and resumed ends as one that was never interrupted."""

import io
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from errno import ENOSPC
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from dsnet_mm.engine.hooks import CheckpointHook
from dsnet_mm.engine.resume import (
    examine,
    find_checkpoint_to_resume,
    only_training,
    read_training_state,
)
from dsnet_mm.weights import DamagedCheckpointError
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
    """Ends the training at once before an iteration, or sends a signal to a process."""

    def __init__(self, before: int = -1, send: int = 0, to: str = 'self') -> None:
        self.before, self.send, self.to = before, send, to

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter != self.before:
            return
        if not self.send:
            raise Stopped
        loader = runner.train_loop.dataloader
        workers = [w.pid for w in loader._iterator._workers] if loader._iterator else []
        Path(runner.work_dir, 'workers').write_text(' '.join(map(str, workers)))
        os.kill(os.getpid() if self.to == 'self' else workers[-1], self.send)


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
    path = work_dir / ('iter_11.pth' if name == 'by_iter' else 'epoch_3.pth')
    return torch.load(path, weights_only=False)['state_dict']


def assert_equal(measured: dict, expected: dict) -> None:
    for key, value in measured.items():
        assert torch.equal(value, expected[key]), key


def forked(function: Callable[[], None]) -> int:
    """Calls a function in a forked process. Returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return pid


def killed_while_it_writes(number: int, train: Callable[[], None]) -> None:
    """Trains in a forked process, which kills itself in the middle of a checkpoint.

    Args:
        number: Number of the checkpoint, from 1.
        train: Trains.
    """

    def end() -> None:
        os.kill(os.getpid(), SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        break_writing(patch, number, end)
        assert os.WTERMSIG(os.waitpid(forked(train), 0)[1]) == SIGKILL


def break_writing(
    patch: pytest.MonkeyPatch, number: int, end: Callable[[], None]
) -> None:
    """Ends the writing of a checkpoint after its first half."""
    original, written = io.open, []

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> 'Half':
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(memoryview(data)[: len(data) // 2])
            self.file.flush()
            end()

    def opened(file: Any, mode: str = 'r', *args: Any, **kwargs: Any) -> Any:
        opened = original(file, mode, *args, **kwargs)
        if 'w' in mode and str(file).endswith(('.pth', '.part')):
            written.append(file)
            if len(written) == number:
                return Half(opened)
        return opened

    patch.setattr('builtins.open', opened)
    patch.setattr('io.open', opened)


def lives(pid: int) -> bool:
    """Tells whether a process runs, and is not only waiting for its parent."""
    try:
        return (
            Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
        )
    except OSError:
        return False


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
    assert_equal(weights(tmp_path, name), weights(uninterrupted[name], name))


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
    stopped, whole = (weights(tmp_path / f, 'by_iter') for f in ('stopped', 'whole'))
    assert_equal(stopped, whole)


def test_another_seed_trains_other_weights(
    uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    train('by_epoch', tmp_path, 'randomness.seed=4', 'train_cfg.max_epochs=1')
    first, other = (
        torch.load(folder / 'epoch_1.pth', weights_only=False)['state_dict']
        for folder in (uninterrupted['by_epoch'], tmp_path)
    )
    assert any(not torch.equal(first[key], other[key]) for key in first)


# --- Killed while a checkpoint is written ----------------------------------------


def test_killed_in_the_first_checkpoint(
    uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    again = partial(train, 'by_epoch', tmp_path, 'randomness.seed=3')
    killed_while_it_writes(1, again)
    again('--resume')
    assert_equal(
        weights(tmp_path, 'by_epoch'), weights(uninterrupted['by_epoch'], 'by_epoch')
    )
    assert not list(tmp_path.glob('.*.part'))


@pytest.mark.parametrize('option', ['filename_tmpl=last.pth', 'max_keep_ckpts=1'])
def test_killed_while_the_only_checkpoint_is_replaced(
    option: str, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    again = partial(
        train,
        'by_epoch',
        tmp_path,
        'randomness.seed=3',
        f'default_hooks.checkpoint.{option}',
    )
    killed_while_it_writes(2, again)
    (kept,) = tmp_path.glob('*.pth')
    assert read_training_state(str(kept))['meta']['epoch'] == 1
    again('--resume')
    (kept,) = tmp_path.glob('*.pth')
    expected = weights(uninterrupted['by_epoch'], 'by_epoch')
    assert_equal(read_training_state(str(kept))['state_dict'], expected)


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def end() -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        break_writing(patch, 2, end)
        with pytest.raises(SystemExit, match='1'):
            train('by_epoch', tmp_path, 'randomness.seed=3')
    line = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(ENOSPC) in line and str(tmp_path / 'epoch_2.pth') in line
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert not list(tmp_path.glob('.*.part'))


# --- Damaged checkpoints ------------------------------------------------------------


@pytest.fixture
def run(uninterrupted: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a working directory, whose last_checkpoint names the original's."""
    return shutil.copytree(uninterrupted['by_epoch'], tmp_path / 'run')


def set_nan(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['state_dict']['head.fc.bias'][0] = float('nan')
    torch.save(checkpoint, path)


def test_damaged_checkpoints_give_way_to_an_older_one(
    uninterrupted: dict[str, Path], run: Path, capsys: pytest.CaptureFixture
) -> None:
    """One is cut, and one has weights that are NaN. Both are renamed."""
    damaged, nan = run / 'epoch_3.pth', run / 'epoch_2.pth'
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    set_nan(nan)
    # Weights without the state of a training are no checkpoint to resume from.
    torch.save(dict(state_dict={}), run / 'best.pth')
    for path in (damaged, nan):
        with pytest.raises(SystemExit):
            train('by_epoch', run, f'--resume={path}')
        assert str(path) in capsys.readouterr().err
    facts = rf'{damaged} .*{nan} .*head\.fc\.bias.*{run}/epoch_1\.pth'
    with pytest.warns(UserWarning, match=facts):
        train('by_epoch', run, '--resume')
    assert_equal(
        weights(run, 'by_epoch'), weights(uninterrupted['by_epoch'], 'by_epoch')
    )
    names = [path.name for path in run.glob('epoch_*.pth.*.damaged')]
    assert len(names) == 2 and (run / 'best.pth').exists()


@pytest.mark.parametrize('resume', [['--resume'], []])
def test_with_only_damaged_checkpoints_training_starts_anew(
    resume: list[str], tmp_path: Path
) -> None:
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'damaged')
    (tmp_path / 'last_checkpoint').write_text(str(path))
    with pytest.warns(UserWarning, match=rf'{path} .*starts anew'):
        train('by_epoch', tmp_path, *resume, 'train_cfg.max_epochs=1')
    assert find_checkpoint_to_resume(tmp_path) == str(path)
    (damaged,) = tmp_path.glob('epoch_1.pth.*.damaged')
    assert damaged.read_bytes() == b'damaged'


def test_a_copy_resumes_its_own_checkpoint(run: Path) -> None:
    assert find_checkpoint_to_resume(run) == str(run / 'epoch_3.pth')
    (run / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth\n')
    assert find_checkpoint_to_resume(run) == str(run / 'epoch_2.pth')
    (run / 'last_checkpoint').unlink()
    assert find_checkpoint_to_resume(run) == str(run / 'epoch_3.pth')


def test_a_copy_leaves_the_best_checkpoint_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint names it by its path, and a better one takes its place."""
    better = dict(greater=lambda new, old: True)
    monkeypatch.setattr(CheckpointHook.__base__, 'rule_map', better)
    options = ['default_hooks.checkpoint.save_best=accuracy/top1', '--resume']
    first, second = tmp_path / 'first', tmp_path / 'second'
    train('by_epoch', first, *options, 'train_cfg.max_epochs=1')
    shutil.copytree(first, second)
    train('by_epoch', second, *options, 'train_cfg.max_epochs=2')
    for folder, epoch in ((first, 1), (second, 2)):
        (best,) = folder.glob('best_*.pth')
        assert best.stem.endswith(f'_{epoch}')


@pytest.mark.parametrize('pointer', [b'', b'\xff\xfe', b'/a/none.pth', b'x' * 999])
def test_a_damaged_pointer_gives_way_to_the_newest(pointer: bytes, run: Path) -> None:
    (run / 'last_checkpoint').write_bytes(pointer)
    if pointer:
        with pytest.warns(UserWarning, match='last_checkpoint'):
            found = find_checkpoint_to_resume(run)
    else:
        found = find_checkpoint_to_resume(run)
    assert found == str(run / 'epoch_3.pth')


def test_every_damage_is_passed_over(tmp_path: Path) -> None:
    """Wrong bytes in a pickle raise errors of many kinds."""
    state = dict(
        meta=dict(epoch=1, iter=4),
        message_hub=dict(scores=np.ones(3)),
        optimizer={},
        state_dict={f'layer.{i}': torch.ones(2) for i in range(4)},
    )
    good, bad = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save(state, good)
    torch.save(state, bad, _use_new_zipfile_serialization=False)
    content, rng = bad.read_bytes(), np.random.default_rng(0)
    (tmp_path / 'last_checkpoint').write_text('bad.pth')
    kinds = set()
    for _ in range(200):
        changed = bytearray(content)
        for place in rng.integers(len(content), size=8):
            changed[place] = rng.integers(256)
        bad.write_bytes(changed)
        found, wrong = examine(tmp_path)
        assert found in (str(bad), str(good))
        kinds |= {type(error) for error in wrong.values()}
    assert DamagedCheckpointError in kinds


@pytest.mark.parametrize('missing', ['meta', 'message_hub', 'optimizer'])
def test_a_checkpoint_without_a_part_is_refused(
    missing: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / 'epoch_2.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[missing]
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match='2'):
        train('by_epoch', run, f'--resume={path}')
    error = ' '.join(capsys.readouterr().err.split())
    for fact in (str(path), missing, 'another --work-dir', f'load_from={path}'):
        assert fact in error


# --- Signals and workers ------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'workers', 'before', 'number'),
    [
        ('by_epoch', 2, 5, SIGTERM),
        ('by_epoch', 0, 7, SIGUSR1),  # in the last iteration of an epoch
        pytest.param('by_iter', 0, 6, SIGTERM, marks=needs_skip),
    ],
)
def test_a_signal_saves_a_checkpoint_and_stops(
    name: str,
    workers: int,
    before: int,
    number: int,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    loader = f'train_dataloader.num_workers={workers}'
    options = [f'custom_hooks.0.before={before}', f'custom_hooks.0.send={number}']
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit, match='143'):
        train(name, tmp_path, loader, 'randomness.seed=3', *options)
    assert signal.getsignal(number) is handler
    line = capsys.readouterr().out.splitlines()[-1]
    stopped = tmp_path / 'stopped.pth'
    for fact in (signal.Signals(number).name, str(stopped), '--resume'):
        assert fact in line
    assert read_training_state(str(stopped))['meta']['iter'] == before + 1
    train(name, tmp_path, '--resume', loader)
    assert_equal(weights(tmp_path, name), weights(uninterrupted[name], name))
    assert not stopped.exists()


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='reads /proc')
def test_workers_die_with_the_training(tmp_path: Path) -> None:
    options = ['custom_hooks.0.before=1', f'custom_hooks.0.send={SIGKILL}']
    options += ['train_dataloader.num_workers=2']
    pid = forked(partial(train, 'by_epoch', tmp_path, *options))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == SIGKILL
    workers = [int(pid) for pid in (tmp_path / 'workers').read_text().split()]
    assert len(workers) == 2
    # PyTorch's workers look for their parent every five seconds.
    end = time.monotonic() + 2
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(lives, workers))


@pytest.mark.parametrize(
    ('number', 'fact'), [(SIGKILL, 'DataLoader worker'), (SIGSTOP, 'timed out after 1')]
)
def test_a_worker_that_ends_or_hangs_ends_the_training(
    number: int, fact: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ['custom_hooks.0.before=2', f'custom_hooks.0.send={number}']
    options += ['custom_hooks.0.to=worker', 'train_dataloader.num_workers=1']
    with pytest.raises(SystemExit, match=r'^1$'):
        train('by_epoch', tmp_path, *options, 'train_dataloader.timeout=1')
    line = capsys.readouterr().err.splitlines()[-1]
    for part in (fact, 'train_dataloader.num_workers', '--resume'):
        assert part in line


def test_the_end_of_another_process_is_told() -> None:
    gloo = '[/third_party/gloo/gloo/a.cc:78] Timed out waiting 40000ms for recv'
    sentence = tool('train.py').describe(RuntimeError(gloo))
    for fact in ('another process', gloo, 'env_cfg.dist_cfg.timeout', '--resume'):
        assert fact in sentence
    assert tool('train.py').describe(RuntimeError('another error')) is None


# --- One training in a folder -------------------------------------------------------


def test_one_training_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    reading, writing = os.pipe()

    def keep() -> None:
        with only_training(tmp_path):
            os.write(writing, b'locked')
            time.sleep(60)

    pid = forked(keep)
    try:
        os.read(reading, 6)
        with pytest.raises(SystemExit, match='2'):
            train('by_epoch', tmp_path, '--resume')
        error = ' '.join(capsys.readouterr().err.split())
        for fact in (str(tmp_path), str(pid), socket.gethostname(), '--work-dir'):
            assert fact in error
    finally:
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
    with only_training(tmp_path):
        pass  # a crash leaves no lock

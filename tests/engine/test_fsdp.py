"""Training with FSDP: two processes on the CPU do what one does."""

import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from mmengine.device import get_device
from mmengine.registry import HOOKS
from torch.multiprocessing import ProcessExitedException, start_processes

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.engine.resume import read_training_state
from tests.conftest import FOLDERS, tool
from tests.engine.test_resume import StopHook

pytestmark = pytest.mark.skipif(
    get_device() != 'cpu', reason='the processes are forked, which CUDA does not allow'
)

# Weight decay for all parameters but those of one dimension, gradients that are
# clipped, and a learning rate that changes: what MMEngine's strategy gets wrong.
CONFIG = """
_base_ = 'classifier.py'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-2, weight_decay=0.5),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=1e-3),
)
train_cfg = dict(max_epochs=3)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, T_max=3)]
"""


def _train(rank: int, port: int, flags: list[str], args: list[str]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    args = [*args, 'env_cfg.dist_cfg.backend=gloo', 'train_dataloader.batch_size=2']
    args += ['model.backbone.with_cp=True']  # it must not change anything
    tool('train.py').main(['fsdp.py', '--launcher=pytorch', *flags, *args])


def train_in_two_processes(*args: str, flags: tuple[str, ...] = ('--fsdp',)) -> None:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    options = [FOLDERS, *(arg for arg in args if arg[0] != '-')]
    args = [*(arg for arg in args if arg[0] == '-'), '--cfg-options', *options]
    start_processes(_train, (port, flags, args), nprocs=2, start_method='fork')


@pytest.fixture(scope='module', autouse=True)
def _in_folder(folder: Path) -> Iterator[None]:
    """In the folder, with one thread: a forked process cannot use those of others."""
    (folder / 'fsdp.py').write_text(CONFIG)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def one() -> Path:
    """Working directory of a training in one process, without FSDP."""
    tool('train.py').main(['fsdp.py', '--work-dir=one', '--cfg-options', FOLDERS])
    return Path('one')


@pytest.fixture(scope='module')
def two() -> Path:
    """Working directory of the same training in two processes, with FSDP."""
    train_in_two_processes('--work-dir=two')
    return Path('two')


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(str(path))['state_dict']


def test_two_processes_train_as_one(one: Path, two: Path) -> None:
    expected, start = weights(one / 'epoch_3.pth'), weights(one / 'epoch_1.pth')
    measured = weights(two / 'epoch_3.pth')
    assert measured.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(measured[key], value, rtol=0, atol=1e-5, msg=key)
    assert max((expected[key] - start[key]).abs().max() for key in start) > 1e-2


def test_resumed_weights_are_equal(two: Path) -> None:
    train_in_two_processes('--work-dir=resumed', f'--resume={two}/epoch_2.pth')
    expected = read_checkpoint(f'{two}/epoch_3.pth')
    measured = read_checkpoint('resumed/epoch_3.pth')
    for key, value in expected['state_dict'].items():
        assert torch.equal(measured['state_dict'][key], value), key
    rates = [
        state['optimizer']['base_param_settings']['lr']
        for state in (measured, expected)
    ]
    assert rates[0] == rates[1] < 1e-2


class OneRankHook(StopHook):
    """Sends the signal to the second process only."""

    def before_train_iter(self, runner, *args: Any, **kwargs: Any) -> None:
        if runner.rank == 1:
            super().before_train_iter(runner, *args, **kwargs)


@pytest.mark.parametrize('flags', [('--fsdp',), ()], ids=['FSDP', 'DDP'])
def test_a_signal_to_one_process_stops_both(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    HOOKS.register_module(module=OneRankHook, force=True)
    hook = f"custom_hooks=[dict(type='OneRankHook',before=2,send={SIGTERM})]"
    Path('fsdp.py').write_text(f'{CONFIG}\n{hook}\n')
    options = ['train_cfg.max_epochs=20', f'--work-dir={tmp_path}']
    with pytest.raises(ProcessExitedException) as raised:
        train_in_two_processes(*options, flags=flags)
    Path('fsdp.py').write_text(CONFIG)
    assert raised.value.exit_code == 143
    checkpoint = read_training_state(str(tmp_path / 'stopped.pth'))
    # Two iterations in each epoch; they agree in every tenth.
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (4, 10)


def test_checkpoint_predicts_the_same_in_one_process(one: Path, two: Path) -> None:
    scores = []
    for folder in (one, two):
        out = f'{folder}.pkl'
        args = ['fsdp.py', f'{folder}/epoch_3.pth', f'--out={out}']
        tool('test.py').main([*args, '--cfg-options', FOLDERS])
        samples = pickle.loads(Path(out).read_bytes())
        scores.append(torch.stack([sample['pred_score'] for sample in samples]))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5)
    assert scores[0].std(0).min() > 1e-4


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--fsdp'], 'splits the model over the processes of a distributed run'),
        (['--fsdp', '--launcher=pytorch', '--ema'], 'an EMAHook averages whole ones'),
        (['--resume=two/epoch_2.pth'], 'comes from a training with --fsdp'),
    ],
    ids=['one process', 'EMA', 'resume'],
)
def test_what_fsdp_cannot_do(
    args: list[str], message: str, two: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tool('train.py').main(
            ['fsdp.py', *args, '--work-dir=none', '--cfg-options', FOLDERS]
        )
    assert message in ' '.join(capsys.readouterr().err.split())

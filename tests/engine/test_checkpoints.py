"""Checkpoints are read without running what is in them."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet_mm.checkpoint import (
    check_match,
    load_checkpoint,
    read_checkpoint,
    restricted_loading,
    write_safetensors,
)
from dsnet_mm.models import DSNet
from tests.conftest import COCO, FOLDERS, tool

# Where the pickles below leave a file once one of them has run.
MARK = Path('ran')
ARCH = dict(embed_dims=(16, 16, 32, 32), depths=(1,) * 4, num_heads=(1,) * 4)


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if MARK.exists():
        MARK.rmdir()


@pytest.fixture
def harmful(tmp_path: Path) -> Path:
    """A checkpoint that leaves a file when it is loaded."""
    path = tmp_path / 'harmful.pth'
    run = Runs(os.mkdir, str(MARK))
    torch.save(dict(state_dict={}, meta={}, message_hub={}, optimizer=run), path)
    return path


@pytest.mark.parametrize(
    'command',
    [
        f'test.py classifier.py HARMFUL --cfg-options {FOLDERS}',
        f'train.py classifier.py --resume HARMFUL --cfg-options {FOLDERS}',
        f'train.py classifier.py --work-dir FOLDER --resume --cfg-options {FOLDERS}',
        f'train.py classifier.py --cfg-options {FOLDERS} load_from=HARMFUL',
        f'train.py classifier.py --cfg-options {FOLDERS} '
        'model.backbone.init_cfg.type=Pretrained '
        'model.backbone.init_cfg.checkpoint=HARMFUL',
        f'train.py classifier.py --cfg-options {FOLDERS} '
        'model.head.init_cfg.type=Pretrained model.head.init_cfg.checkpoint=HARMFUL',
        'analysis_tools/plot_predictions.py retinanet.py HARMFUL a.png '
        f'--cfg-options {COCO}',
    ],
)
def test_no_tool_runs_what_is_in_a_checkpoint(
    command: str, harmful: Path, capsys: pytest.CaptureFixture
) -> None:
    (harmful.parent / 'last_checkpoint').write_text(str(harmful))
    command = command.replace('FOLDER', str(harmful.parent))
    name, *args = command.replace('HARMFUL', str(harmful)).split()
    with pytest.raises(SystemExit):
        tool(name).main(args)
    assert not MARK.exists()
    error = capsys.readouterr().err
    for fact in (str(harmful), 'posix.mkdir', '--trust-checkpoint'):
        assert fact in error


def test_no_program_runs_it(harmful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either format, by its address, and by init_cfg."""
    old = harmful.with_name('old.pth')
    content = Runs(os.mkdir, str(MARK))
    torch.save(content, old, _use_new_zipfile_serialization=False)
    # torch.hub keeps what it has downloaded, and reads it from there.
    monkeypatch.setenv('TORCH_HOME', str(harmful.parent))
    cache = harmful.parent / 'hub' / 'checkpoints'
    cache.mkdir(parents=True)
    shutil.copy(harmful, cache / 'far.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(harmful))
    for load in (
        lambda: read_checkpoint(str(harmful)),
        lambda: read_checkpoint(str(old)),
        lambda: read_checkpoint('https://example.org/far.pth'),
        DSNet(ARCH, init_cfg=init_cfg).init_weights,
    ):
        with pytest.raises(ValueError, match=r'names posix\.mkdir'):
            load()
    assert not MARK.exists()


def test_trust_is_explicit(harmful: Path, capsys: pytest.CaptureFixture) -> None:
    args = ['classifier.py', str(harmful), '--cfg-options', FOLDERS]
    with pytest.raises(SystemExit):
        tool('test.py').main(['--trust-checkpoint', *args])
    assert MARK.is_dir()
    assert 'does not fit the model' in capsys.readouterr().err
    MARK.rmdir()
    with restricted_loading(trust=True):
        read_checkpoint(str(harmful))
    assert MARK.is_dir()
    MARK.rmdir()
    with pytest.raises(ValueError, match='not safe'):
        read_checkpoint(str(harmful))
    assert not MARK.exists()


def test_getattr_is_refused(tmp_path: Path) -> None:
    """A pickle gets from it to ``exec``; MMEngine's own allow-list has it."""
    path = tmp_path / 'a.pth'
    for content in (
        Runs(getattr, Runs(getattr, getattr, '__self__'), 'exec'),
        Runs(getattr, getattr, '__self__'),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match='names getattr'):
            read_checkpoint(str(path))


def test_text_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """``Runner.resume`` loads ``meta['config']`` as a configuration in Python."""
    path = tmp_path / 'a.pth'
    text = f'import os\nos.mkdir({str(MARK)!r})'
    torch.save(dict(state_dict={}, meta=dict(config=text, epoch=1)), path)
    assert read_checkpoint(str(path))['meta'] == dict(epoch=1)


def test_what_mmengine_writes_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """EMA, AdamW, schedules, scores, and a training that goes on from them."""
    args = ['classifier.py', f'--work-dir={tmp_path}', '--ema', '--resume']
    args += [
        *('--cfg-options', FOLDERS),
        'optim_wrapper.optimizer._delete_=True',
        'optim_wrapper.optimizer.type=AdamW',
        'optim_wrapper.optimizer.lr=0.001',
        'param_scheduler.type=ConstantLR',
        'default_hooks.checkpoint.save_best=auto',
    ]
    train = tool('train.py')
    train.main([*args, 'train_cfg.max_epochs=1'])
    checkpoint = read_checkpoint(str(tmp_path / 'epoch_1.pth'))
    assert {'ema_state_dict', 'optimizer', 'param_schedulers'} <= checkpoint.keys()
    history = checkpoint['message_hub']['log_scalars']['train/loss']
    assert history.current() > 0
    assert 'best_score' in checkpoint['message_hub']['runtime_info']
    train.main([*args, 'train_cfg.max_epochs=2'])
    assert 'resumed epoch: 1' in capsys.readouterr().out


def checkpoint_of(net: torch.nn.Module, **changes: Any) -> dict[str, Any]:
    state = dict(net.state_dict()) | changes.pop('weights', {})
    return dict(state_dict=state, meta=dict(epoch=1)) | changes


KEY = 'stages.0.0.proj_in.weight'


@pytest.mark.parametrize(
    ('changes', 'fact'),
    [
        *(
            (dict(state_dict=value), 'state_dict')
            for value in (None, [], torch.ones(1))
        ),
        (dict(state_dict={KEY: 3}), KEY),
        (dict(state_dict={3: torch.ones(1)}), 'state_dict'),
        (dict(meta='text'), 'meta'),
        (dict(meta=dict(dataset_meta='text')), 'dataset_meta'),
        (dict(meta=dict(dataset_meta=dict(classes='text'))), 'class names'),
        (dict(weights={KEY: torch.full((16, 16, 1, 1), torch.nan)}), KEY),
        (dict(weights={KEY: torch.full((16, 16, 1, 1), -torch.inf)}), KEY),
        *(
            (
                dict(weights={KEY: torch.ones(16, 16, 1, 1, dtype=kind)}),
                f'{kind}.*{KEY}',
            )
            for kind in (torch.int64, torch.bool, torch.complex64)
        ),
    ],
)
def test_what_is_no_state_dict_of_the_model_is_refused(
    changes: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    """By what loads it, starts from it, and initialises a backbone by it."""
    net = DSNet(ARCH, norm_cfg=dict(type='GN', num_groups=4))
    path = tmp_path / 'a.pth'
    torch.save(checkpoint_of(net), path)
    load_checkpoint(net, str(path))
    torch.save(checkpoint_of(net, **changes), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    for load in (
        lambda: load_checkpoint(net, str(path)),
        lambda: check_match(net, str(path)),
        DSNet(
            ARCH, norm_cfg=dict(type='GN', num_groups=4), init_cfg=init_cfg
        ).init_weights,
    ):
        with pytest.raises(ValueError, match=rf'a\.pth.*{fact}') as error:
            load()
        assert '\n' not in str(error.value)


def test_weights_that_are_no_numbers_are_not_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict={'head.fc.bias': torch.tensor([torch.nan])}), path)
    with pytest.raises(SystemExit, match='2'):
        tool('test.py').main(['classifier.py', str(path), '--cfg-options', FOLDERS])
    error = capsys.readouterr().err
    assert str(path) in error and 'not finite (in head.fc.bias)' in error


def test_loading_elsewhere_is_left_alone(tmp_path: Path) -> None:
    load = torch.load
    allowed = set(torch.serialization.get_safe_globals())
    path = tmp_path / 'a.pth'
    torch.save({}, path)
    read_checkpoint(str(path))
    assert torch.load is load
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize('content', [b'', b'no checkpoint', pickle.dumps({})])
def test_damage_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='damaged'):
        read_checkpoint(str(path))


def test_safetensors_take_the_place_of_a_checkpoint(tmp_path: Path) -> None:
    """They are tested, trained from, and give a backbone its weights."""
    test, train = tool('test.py'), tool('train.py')
    out = ['--work-dir', str(tmp_path / 'run'), '--cfg-options', FOLDERS]
    train.main(['classifier.py', *out, 'train_cfg.max_epochs=1'])
    trained = read_checkpoint(str(tmp_path / 'run' / 'epoch_1.pth'))['state_dict']
    weights = tmp_path / 'weights.safetensors'
    write_safetensors(weights, trained, dict(seed='0', config='raise SystemExit'))

    read = read_checkpoint(str(weights))
    assert read['meta'] == dict(seed='0')
    for key, value in trained.items():
        assert read['state_dict'][key].dtype == value.dtype
        error = (read['state_dict'][key] - value).abs().max()
        assert error <= 2**-11 * value.abs().max() + 1e-7, key

    test.main(['classifier.py', str(weights), *out])
    assert len(list(tmp_path.glob('run/*/metrics.json'))) == 1
    start = ['--work-dir', str(tmp_path / 'next'), '--cfg-options', FOLDERS]
    train.main(['classifier.py', *start, f'load_from={weights}'])
    init_cfg = dict(type='Pretrained', checkpoint=str(weights), prefix='backbone.')
    options = dict(norm_cfg=dict(type='GN', num_groups=4), init_cfg=init_cfg)
    net = DSNet(ARCH, **options)
    net.init_weights()
    key = 'stages.0.0.proj_in.weight'
    assert torch.equal(net.state_dict()[key], read['state_dict'][f'backbone.{key}'])


def test_weights_of_another_model_are_no_start(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Without an error MMEngine trains from random weights."""
    net = DSNet(ARCH, norm_cfg=dict(type='GN', num_groups=4))
    alone, parts = tmp_path / 'backbone.pth', tmp_path / 'parts.pth'
    torch.save(net.state_dict(), alone)
    torch.save({f'module.backbone.{k}': v for k, v in net.state_dict().items()}, parts)
    args = ['classifier.py', f'--work-dir={tmp_path}/run', '--cfg-options', FOLDERS]
    with pytest.raises(SystemExit, match='2'):
        tool('train.py').main([*args, f'load_from={alone}'])
    error = capsys.readouterr().err
    assert str(alone) in error and 'model.backbone.init_cfg' in error
    assert not list(tmp_path.glob('run/*.pth'))
    tool('train.py').main([*args, f'load_from={parts}', 'train_cfg.max_epochs=1'])


def test_weights_are_checked(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    with pytest.raises(ValueError, match='1 tensors are not finite'):
        write_safetensors(path, dict(a=torch.tensor([1e6])), {})
    assert not path.exists()
    path.write_bytes(b'no weights')
    with pytest.raises(ValueError, match='damaged'):
        read_checkpoint(str(path))

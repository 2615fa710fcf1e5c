"""The command-line tools, on data sets of a few small images."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS
from torch import nn

from dsnet_mm.checkpoint import load_checkpoint
from dsnet_mm.engine.config import check_data, load_config, set_data_root
from dsnet_mm.engine.launch import (
    TIMEOUT,
    add_config_arguments,
    add_run_arguments,
    set_run,
)
from dsnet_mm.models import DSNet
from tests.conftest import COCO, FOLDERS, TOOLS, tool


@pytest.fixture(autouse=True, scope='module')
def _in_folder(folder: Path) -> Iterator[None]:
    # Threads only get in each other's way in nets as small as these.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    torch.set_num_threads(threads)


def call(name: str, *args: str) -> str:
    """Calls a tool in this process and returns what it printed."""
    with redirect_stdout(StringIO()) as printed:
        tool(name).main(list(args))
    return printed.getvalue()


def run(name: str, *args: str) -> str:
    """Runs a shell script as users do and returns what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    done = subprocess.run(
        ['bash', str(TOOLS / name), *args],
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=path, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(name: str, *args: str, capsys: pytest.CaptureFixture) -> str:
    """Calls a tool that refuses its arguments and returns the error."""
    with pytest.raises(SystemExit, match='2'):
        call(name, *args)
    return ' '.join(capsys.readouterr().err.split())


def written(printed: str) -> dict:
    """The metrics in the file that the last line of test.py names."""
    match = re.fullmatch(r'Metrics are in (.+)\.', printed.strip().splitlines()[-1])
    return json.loads(Path(match[1]).read_text())


@pytest.fixture(scope='module')
def detector(_in_folder: None) -> Path:
    """Checkpoint of a RetinaNet that train.py trained."""
    printed = call('train.py', 'retinanet.py', '--cfg-options', COCO)
    logs = sorted(Path('work_dirs/retinanet').glob('*_*'))
    last = f'Checkpoints are in work_dirs/retinanet, logs in {logs[0]}.'
    assert printed.splitlines()[-1] == last
    return Path('work_dirs/retinanet/epoch_2.pth')


@pytest.fixture(scope='module')
def classifier(_in_folder: None) -> Path:
    """Checkpoint of a classifier that train.py trained in one process."""
    data = ['--cfg-options', f'{FOLDERS}/']
    printed = call('train.py', 'classifier.py', '--work-dir=one', '--resume', *data)
    assert 'nothing to resume from' in printed
    return Path('one/epoch_2.pth')


@pytest.fixture(scope='module')
def tested(detector: Path, classifier: Path) -> Callable[..., SimpleNamespace]:
    """Calls test.py once for each set of flags.

    It returns the metrics, the scores of each image, and how often a batch norm ran.
    """
    data = {'retinanet': (COCO, detector), 'classifier': (FOLDERS, classifier)}

    @cache
    def test(name: str, *flags: str) -> SimpleNamespace:
        options, checkpoint = data[name]
        out = Path(f'{name}{"".join(flags)}.pkl')
        args = [f'{name}.py', str(checkpoint), f'--out={out}', *flags]
        forward, norms = nn.BatchNorm2d.forward, []
        with pytest.MonkeyPatch.context() as patch:
            count = lambda norm, x: norms.append(0) or forward(norm, x)  # noqa: E731
            patch.setattr(nn.BatchNorm2d, 'forward', count)
            metrics = written(call('test.py', *args, '--cfg-options', options))
        samples = pickle.loads(out.read_bytes())
        scores = [
            s['pred_instances']['scores'] if name == 'retinanet' else s['pred_score']
            for s in samples
        ]
        return SimpleNamespace(metrics=metrics, scores=scores, norms=len(norms))

    return test


# --- Training and testing -------------------------------------------------------


def test_detector_trains_resumes_and_tests(detector: Path) -> None:
    state = torch.load(detector, weights_only=False)
    assert 'ema_state_dict' in state
    # The last validation before this checkpoint was that of the first epoch.
    validated = state['message_hub']['log_scalars']['val/coco/bbox_mAP'].current()
    data = ['--cfg-options', f'{COCO}/']
    first = str(detector.with_name('epoch_1.pth'))
    metrics = written(call('test.py', 'retinanet.py', first, *data))
    assert metrics['coco/bbox_mAP'] == pytest.approx(validated, abs=1e-3)
    assert metrics['coco/bbox_mAP'] > 0
    options = [*data, 'train_cfg.max_epochs=3']
    log = call('train.py', 'retinanet.py', '--resume', '--no-validate', *options)
    third = torch.load(detector.with_name('epoch_3.pth'), weights_only=False)
    assert third['meta']['epoch'] == 3
    assert 'resumed epoch: 2, iter: 4' in log
    assert 'Epoch(val)' not in log


@pytest.mark.parametrize('name', ['retinanet', 'classifier'])
def test_outputs_and_flips(name: str, tested: Callable) -> None:
    images, num = {
        'retinanet': (['1.png', '2.png'], 2),
        'classifier': (['0.png_0.png', '1.png_0.png'], 4),
    }[name]
    plain, flipped = tested(name, f'--show-dir=drawn_{name}'), tested(name, '--tta')
    assert len(plain.scores) == num
    assert sorted(path.name for path in Path(f'drawn_{name}').iterdir()) == images
    assert flipped.metrics.keys() == plain.metrics.keys()
    for one, mean in zip(plain.scores, flipped.scores, strict=True):
        assert one.tolist() != mean.tolist()


@pytest.mark.parametrize('flag', ['--show-dir=drawn_retinanet', '--tta'])
def test_fused_model_predicts_the_same(flag: str, tested: Callable) -> None:
    """With the weights of the EMAHook, which differ from the last ones."""
    plain, fused = tested('retinanet', flag), tested('retinanet', flag, '--fuse')
    assert fused.norms < plain.norms / 2
    assert fused.metrics == pytest.approx(plain.metrics, abs=1e-3)
    for one, other in zip(plain.scores, fused.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_fuse_hook_replaces_a_wrapped_model_by_a_fused_copy() -> None:
    wrapped = nn.DataParallel(DSNet(arch='tiny'))
    before = list(wrapped.state_dict())
    runner = argparse.Namespace(model=wrapped)
    HOOKS.build(dict(type='dsnet_mm.FuseHook')).before_test_epoch(runner)
    assert type(runner.model) is DSNet
    assert not runner.model.training
    assert list(runner.model.state_dict()) != list(wrapped.module.state_dict())
    assert list(wrapped.state_dict()) == before
    assert wrapped.training


def test_two_processes_train_and_test_as_one(
    classifier: Path, tested: Callable
) -> None:
    options = ['--cfg-options', FOLDERS, 'env_cfg.dist_cfg.backend=gloo']
    work_dir = ['--work-dir', 'two processes']
    batch = 'train_dataloader.batch_size=2'
    run('dist_train.sh', 'classifier.py', '2', *work_dir, *options, batch)
    one, start, two = (
        torch.load(path, weights_only=False)['state_dict']
        for path in (classifier, 'one/epoch_1.pth', 'two processes/epoch_2.pth')
    )
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=key)
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3
    printed = run('dist_test.sh', 'classifier.py', str(classifier), '2', *options)
    plain = tested('classifier', '--show-dir=drawn_classifier')
    assert written(printed) == plain.metrics


@pytest.mark.skipif(sys.platform != 'linux', reason='calls the GNU C library')
def test_distributed_processes_end_without_destructors(tmp_path: Path) -> None:
    """They aborted a process now and then; here one is made to."""
    code = f"""
import atexit, ctypes
import torch.distributed as dist
from dsnet_mm.engine.launch import end_run
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, 'handled')
store = dist.FileStore({str(tmp_path / 'store')!r}, 1)
dist.init_process_group('gloo', store=store, rank=0, world_size=1)
end_run()
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr


# --- Shell ----------------------------------------------------------------------

LAUNCHER = dict(
    slurm=(
        dict(GPUS='4', SRUN_ARGS='--time 5 --quiet'),
        '[--gres][gpu:4][--ntasks][4][--ntasks-per-node][4]',
        '[--time][5][--quiet]',
    ),
    dist=(
        dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='first', PORT='7'),
        '[--nnodes][2][--node-rank][1][--master-addr][first][--master-port][7]',
        '[--nproc-per-node][8]',
    ),
)


@pytest.mark.parametrize(
    ('name', 'args', 'usage'),
    [
        ('dist_train', ['a b.py', '8'], 'CONFIG GPUS [options of train.py]'),
        (
            'dist_test',
            ['a b.py', 'c d', '8'],
            'CONFIG CHECKPOINT GPUS [options of test.py]',
        ),
        (
            'slurm_train',
            ['gpu', 'job', 'a b.py', 'c d'],
            'PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]',
        ),
        (
            'slurm_test',
            ['gpu', 'job', 'a b.py', 'c d'],
            'PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]',
        ),
    ],
)
def test_scripts_keep_arguments_whole(
    name: str, args: list[str], usage: str, tmp_path: Path
) -> None:
    """And without arguments they say how they are used."""
    script, launcher = TOOLS / f'{name}.sh', name.partition('_')[0]
    done = subprocess.run(['bash', script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f' {script} {usage}\n')

    fake = tmp_path / ('srun' if launcher == 'slurm' else 'torchrun')
    fake.write_text('#!/bin/sh\nfor arg; do printf "[%s]" "$arg"; done\n')
    fake.chmod(0o755)
    variables, *expected = LAUNCHER[launcher]
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    env = {**os.environ, 'PATH': path, **variables}
    command = ['bash', script, *args, '--flag']
    printed = subprocess.run(command, capture_output=True, text=True, env=env).stdout
    for part in (*expected, '[a b.py]', '[c d]' * ('c d' in args)):
        assert part in printed
    assert ('[--signal][USR1@120]' in printed) == (name == 'slurm_train')
    kind = 'slurm' if launcher == 'slurm' else 'pytorch'
    assert printed.endswith(f'[--launcher][{kind}][--flag]')


# --- Errors ---------------------------------------------------------------------

PRETRAINED = 'model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg'
NO_BLOCKS = 'model.backbone._delete_=True model.backbone.type=LeNet5'
VAL = 'val_dataloader.dataset.data_prefix.img=other'
# A command, -> and the facts that its error has.
ERRORS = f"""
train.py none.py -> none.py
train.py retinanet.py -> data/coco/; .*instances_train2017.json and
train.py retinanet.py --cfg-options data_root=sets -> sets/annotations/
train.py retinanet.py --cfg-options {COCO} {VAL} -> val_dataloader.* sets/coco/other
train.py retinanet.py --cfg-options {COCO} val_evaluator.ann_file=a.json -> a.json
train.py classifier.py -> data/none.*CustomDataset reads train
train.py classifier.py --cfg-options lr -> KEY=VALUE.*'lr'
train.py classifier.py --cfg-options default_scope=other -> default_scope='other'
train.py classifier.py --cfg-options {FOLDERS} load_from=a.pth -> checkpoint a.pth
train.py classifier.py --cfg-options {FOLDERS} {PRETRAINED}.checkpoint=a.pth -> init_cfg
train.py classifier.py --resume a.pth --cfg-options {FOLDERS} -> checkpoint a.pth
train.py classifier.py --work-dir taken.pkl --cfg-options {FOLDERS} -> taken.pkl
train.py classifier.py --cfg-options {FOLDERS} model.type=None1 -> None1.*registry
train.py classifier.py --auto-scale-lr -> auto_scale_lr.base_batch_size=N
train.py classifier.py --launcher pytorch --cfg-options {FOLDERS} -> backend=gloo
train.py classifier.py --amp -> --amp.*GPU
test.py classifier.py a.pth -> checkpoint a.pth
test.py classifier.py damaged.pth -> data/none
test.py classifier.py damaged.pth --cfg-options {FOLDERS} -> damaged.pth
test.py classifier.py damaged.pth --out a.json -> .pkl.*a.json
test.py classifier.py a.pth --out taken.pkl -> taken.pkl
test.py classifier.py a.pth --tta --show-dir a -> --show-dir.*--tta
test.py classifier.py damaged.pth --fuse --cfg-options {FOLDERS} {NO_BLOCKS} -> DS-block
analysis_tools/benchmark.py --device cuda -> GPU
analysis_tools/get_flops.py nothing.py -> nothing.py
analysis_tools/plot_predictions.py classifier.py a.pth a.png -> no detector
analysis_tools/plot_predictions.py retinanet.py a.pth taken.png -> taken.png
"""


@pytest.mark.parametrize('line', ERRORS.strip().splitlines())
def test_errors_are_a_sentence(
    line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dsnet_mm.engine.launch.get_device', lambda: 'cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('taken.pkl', 'taken.png'):
        Path(name).touch()
    command, facts = line.split(' -> ')
    assert re.search(facts, refused(*command.split(), capsys=capsys))


def test_checkpoints_are_not_trained_over(
    classifier: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error(*args: str, name: str = 'train.py') -> str:
        options = ['--cfg-options', FOLDERS]
        return refused(name, 'classifier.py', *args, *options, capsys=capsys)

    assert '--resume' in error('--work-dir=one')
    weights = tmp_path / 'weights.pth'
    torch.save(torch.load(classifier, weights_only=False)['state_dict'], weights)
    assert f'load_from={weights}' in error(f'--resume={weights}')
    assert '--resume' in error(f'--work-dir={tmp_path}')
    # One of another model is refused.
    facts = r'head\.fc\.weight.* bbox_head\.\S+'
    assert re.search(facts, error(str(detector), name='test.py'))


# --- Configurations and checkpoints -----------------------------------------------


@pytest.mark.parametrize('root', ['data/coco/tiny', './data/coco/tiny/', 'a b,c/'])
def test_data_root_moves_data_sets_and_evaluators(root: str) -> None:
    own = {'val_dataloader.dataset.data_root': 'data/coco/'}  # merged after it
    cfg = load_config('retinanet.py', {'data_root': root, **own})
    stem = root.rstrip('/')
    for split in ('train', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root.rstrip('/') == stem
    assert cfg.val_dataloader.dataset.data_root == 'data/coco/'
    ann_file = f'{stem}/annotations/instances_val2017.json'
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == ann_file
    assert cfg.data_root == f'{stem}/'


def test_data_root_reaches_wrapped_data_sets_and_needs_one_to_replace() -> None:
    inner = dict(type='CocoDataset', data_root='old', ann_file='old/a.json')
    dataset = dict(type='ConcatDataset', datasets=[inner, dict(inner, ann_file='b')])
    cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
    set_data_root(cfg, 'new')
    first, second = cfg.train_dataloader.dataset.datasets
    assert (first.data_root, first.ann_file) == ('new', 'new/a.json')
    assert (second.data_root, second.ann_file) == ('new', 'b')
    for roots in (('a', 'b'), (None, None)):
        loaders = {
            f'{split}_dataloader': dict(dataset=dict(type='D', data_root=root))
            for split, root in zip(('train', 'val'), roots, strict=True)
        }
        with pytest.raises(ValueError, match=r'dataset\.data_root=new'):
            set_data_root(Config(loaders), 'new')


def test_data_from_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    for dataset in (
        dict(type='CIFAR10', data_root='none'),
        dict(type='CocoDataset', data_root='s3://none/', ann_file='a.json'),
        dict(type='CocoDataset', data_root='none', backend_args=dict(backend='x')),
    ):
        check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])
    # ImageNet reads the folder of its split.
    dataset = dict(type='ImageNet', data_root=str(tmp_path), split='train')
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/train'):
        check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_checkpoint_is_loaded_if_it_fits(prefix: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    path = str(tmp_path / 'a.pth')
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {prefix + k: v + 1 for k, v in before.items() if 'num_batches' not in k}
    torch.save(dict(state_dict=state, meta=dict(epoch=7)), path)
    assert load_checkpoint(net, path)['meta'] == dict(epoch=7)
    assert torch.equal(net[0].weight, before['0.weight'] + 1)
    bias = f'{prefix}0.bias'
    for changed, facts in (
        ({k: v for k, v in state.items() if k != bias}, r'\b1 .*missing.* 0\.bias'),
        (state | {f'{prefix}2.bias': torch.zeros(1)}, r'\b1 .* 2\.bias'),
        (state | {bias: torch.zeros(9)}, r'\b1 .* 0\.bias.*\[9\]'),
    ):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=facts):
            load_checkpoint(net, path)


# --- Options of train.py ----------------------------------------------------------


def test_processes_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    monkeypatch.setenv('LOCAL_RANK', '0')  # so that it is put back
    monkeypatch.delenv('LOCAL_RANK')
    monkeypatch.setattr('dsnet_mm.engine.launch.get_device', lambda: 'cpu')
    monkeypatch.setattr(
        torch.distributed,
        'init_process_group',
        lambda backend, timeout: backends.append((backend, timeout.seconds)),
    )
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(['a/net.py', '--launcher=pytorch', '--local-rank=1'])
    wrapper = dict(find_unused_parameters=True)
    env_cfg = dict(dist_cfg=dict(backend='gloo'))
    loaders = dict(
        train_dataloader=dict(num_workers=2),
        val_dataloader=dict(num_workers=0),
        test_dataloader=dict(num_workers=1, timeout=5),
    )
    cfg = Config(dict(model_wrapper_cfg=wrapper, env_cfg=env_cfg, **loaders))
    set_run(cfg, args)
    assert cfg.train_dataloader.timeout == cfg.env_cfg.dist_cfg.timeout == TIMEOUT
    assert 'timeout' not in cfg.val_dataloader and cfg.test_dataloader.timeout == 5
    assert cfg.work_dir == os.path.join('work_dirs', 'net')
    assert cfg.launcher == 'pytorch'
    assert os.environ['LOCAL_RANK'] == '1'
    assert backends == [('gloo', TIMEOUT)]
    assert cfg.model_wrapper_cfg.device_ids is None
    assert cfg.model_wrapper_cfg.find_unused_parameters


def test_amp_scaled_rate_and_ema(monkeypatch: pytest.MonkeyPatch) -> None:
    train = tool('train.py')
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    cfg = load_config('mask_rcnn.py', {})
    train.set_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    train.set_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)
    train.set_ema(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
    with pytest.raises(ValueError, match='--ema'):
        train.set_ema(cfg)


# --- Analysis -----------------------------------------------------------------------


def test_masks_are_drawn_and_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plot = tool('analysis_tools/plot_predictions.py')
    plot.init_default_scope('mmdet')
    model = plot.MODELS.build(load_config('mask_rcnn.py', {}).model)
    checkpoint, out = tmp_path / 'a.pth', tmp_path / 'new' / 'a.png'
    torch.save(model.state_dict(), checkpoint)
    args = ['mask_rcnn.py', str(checkpoint)]
    data = ['--cfg-options', COCO]
    plot.main([*args, str(out), '--num=9', '--score-thr=0', *data])
    sheet = cv2.imread(str(out))
    cell, gap = plot.CELL, plot.GAP
    assert sheet.shape == (plot.TITLE + 2 * (cell + gap), 2 * cell + gap, 3)
    truth, prediction = sheet[plot.TITLE :, :cell], sheet[plot.TITLE :, -cell:]
    assert (truth[: cell // 2] != prediction[: cell // 2]).any()
    # The first image shows a disc; its box has the second colour of tab10.
    assert (np.abs(truth[:cell].astype(int) - (14, 127, 255)) < 2).all(axis=2).any()
    assert os.listdir(out.parent) == ['a.png']
    work_dir = f'--work-dir={tmp_path}'
    assert 'masks' in refused('test.py', *args, '--tta', work_dir, *data, capsys=capsys)

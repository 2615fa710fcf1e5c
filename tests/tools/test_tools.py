"""The command-line tools, on data sets of a few small images."""

import argparse
import csv
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
from dsnet_mm.engine.launch import add_config_arguments, add_run_arguments, set_run
from dsnet_mm.models import DSNet
from dsnet_mm.ops import native
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
        tool(name).main(list(args))
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


class Tested(SimpleNamespace):
    """What test.py gave.

    Attributes:
        metrics: The metrics.
        scores: The scores of each image.
        norms: How often a batch norm ran.
    """


@pytest.fixture(scope='module')
def tested(detector: Path, classifier: Path) -> Callable[..., Tested]:
    """Calls test.py once for each set of arguments."""
    data = {'retinanet': (COCO, detector), 'classifier': (FOLDERS, classifier)}

    @cache
    def test(name: str, *flags: str) -> Tested:
        forward, norms = nn.BatchNorm2d.forward, []
        out = Path(f'{name}{"".join(flags)}.pkl')
        options, checkpoint = data[name]
        args = [f'{name}.py', str(checkpoint), f'--out={out}', *flags]
        with pytest.MonkeyPatch.context() as patch:
            count = lambda norm, x: norms.append(0) or forward(norm, x)  # noqa: E731
            patch.setattr(nn.BatchNorm2d, 'forward', count)
            printed = call('test.py', *args, '--cfg-options', options)
        samples = pickle.loads(out.read_bytes())
        scores = [
            sample['pred_instances']['scores']
            if name == 'retinanet'
            else sample['pred_score']
            for sample in samples
        ]
        return Tested(metrics=written(printed), scores=scores, norms=len(norms))

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


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('dist_train.sh', 'CONFIG GPUS [options of train.py]'),
        ('dist_test.sh', 'CONFIG CHECKPOINT GPUS [options of test.py]'),
        ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]'),
        ('slurm_test.sh', 'PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]'),
    ],
)
def test_scripts_say_how_they_are_used(name: str, args: str) -> None:
    done = subprocess.run(['bash', TOOLS / name], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f' {TOOLS / name} {args}\n')


@pytest.mark.parametrize(
    ('name', 'args', 'env', 'expected'),
    [
        *(
            (
                f'slurm_{tool}.sh',
                ['gpu', 'job', 'a b.py', 'c d'],
                dict(GPUS='4', SRUN_ARGS='--time 5 --quiet'),
                r'.*\[--gres\]\[gpu:4\]\[--ntasks\]\[4\]\[--ntasks-per-node\]\[4\].*'
                r'\[--time\]\[5\]\[--quiet\].*\[a b\.py\].*\[c d\].*'
                r'\[--launcher\]\[slurm\]\[--flag\]',
            )
            for tool in ('train', 'test')
        ),
        *(
            (
                f'dist_{tool}.sh',
                ['a b.py', *checkpoint, '8'],
                dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='first', PORT='7'),
                r'\[--nnodes\]\[2\]\[--node-rank\]\[1\]\[--master-addr\]\[first\]'
                r'\[--master-port\]\[7\]\[--nproc-per-node\]\[8\].*\[a b\.py\].*'
                r'\[--launcher\]\[pytorch\]\[--flag\]',
            )
            for tool, checkpoint in (('train', []), ('test', ['c d.pth']))
        ),
    ],
)
def test_scripts_keep_arguments_whole(
    name: str, args: list[str], env: dict, expected: str, tmp_path: Path
) -> None:
    """The arguments that a script calls its launcher with, each in brackets."""
    fake = tmp_path / ('srun' if name.startswith('slurm') else 'torchrun')
    fake.write_text('#!/bin/sh\nfor arg; do printf "[%s]" "$arg"; done\n')
    fake.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    done = subprocess.run(
        ['bash', TOOLS / name, *args, '--flag'],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PATH=path) | env,
    )
    assert re.fullmatch(expected, done.stdout)


# --- Errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        ('train.py none.py', r'none\.py'),
        ('train.py retinanet.py', 'data/coco/.*instances_train2017.json and'),
        ('train.py retinanet.py --cfg-options data_root=sets', 'sets/annotations/'),
        (
            f'train.py retinanet.py --cfg-options {COCO} '
            'val_dataloader.dataset.data_prefix.img=other',
            'val_dataloader.* sets/coco/other',
        ),
        (
            f'train.py retinanet.py --cfg-options {COCO} val_evaluator.ann_file=a.json',
            r'val_evaluator.* a\.json.*CocoMetric',
        ),
        ('train.py classifier.py', 'data/none.*CustomDataset reads train'),
        ('train.py classifier.py --cfg-options lr', "KEY=VALUE.*'lr'"),
        (
            'train.py classifier.py --cfg-options default_scope=other',
            "default_scope='other'",
        ),
        (
            f'train.py classifier.py --cfg-options {FOLDERS} load_from=a.pth',
            r'checkpoint a\.pth',
        ),
        (
            f'train.py classifier.py --cfg-options {FOLDERS} '
            'model.backbone.init_cfg.type=Pretrained '
            'model.backbone.init_cfg.checkpoint=a.pth',
            r'checkpoint a\.pth.*init_cfg',
        ),
        (
            f'train.py classifier.py --resume a.pth --cfg-options {FOLDERS}',
            r'checkpoint a\.pth',
        ),
        ('train.py classifier.py --auto-scale-lr', 'auto_scale_lr.base_batch_size=N'),
        (
            f'train.py classifier.py --launcher pytorch --cfg-options {FOLDERS}',
            'env_cfg.dist_cfg.backend=gloo',
        ),
        ('train.py classifier.py --amp', '--amp.*GPU'),
        ('test.py classifier.py a.pth', r'checkpoint a\.pth'),
        ('test.py classifier.py damaged.pth', 'data/none'),
        (
            f'test.py classifier.py damaged.pth --cfg-options {FOLDERS}',
            r'damaged\.pth',
        ),
        ('test.py classifier.py damaged.pth --out a.json', r'\.pkl.*a\.json'),
        ('test.py classifier.py a.pth --out taken.pkl', 'taken.pkl exists'),
        ('test.py classifier.py a.pth --tta --show-dir a', '--show-dir.*--tta'),
        (
            f'test.py classifier.py damaged.pth --fuse --cfg-options {FOLDERS} '
            'model.backbone._delete_=True model.backbone.type=LeNet5',
            'DS-blocks.*ImageClassifier',
        ),
        ('analysis_tools/benchmark_ops.py --out taken.csv', 'taken.csv.*--overwrite'),
        ('analysis_tools/benchmark_ops.py --device cuda', 'GPU'),
        ('analysis_tools/get_flops.py nothing.py', r'nothing\.py'),
        ('analysis_tools/plot_predictions.py classifier.py a.pth a.png', 'no detector'),
        (
            'analysis_tools/plot_predictions.py retinanet.py a.pth taken.png',
            'taken.png.*--overwrite',
        ),
    ],
)
def test_errors_are_a_sentence(
    args: str,
    fact: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('dsnet_mm.engine.launch.get_device', lambda: 'cpu')
    for name in ('taken.pkl', 'taken.png', 'taken.csv'):
        Path(name).touch()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    name, *args = args.split()
    assert re.search(fact, refused(name, *args, capsys=capsys))


def test_checkpoints_are_not_trained_over(
    classifier: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def error(*args: str, name: str = 'train.py') -> str:
        options = ['--cfg-options', FOLDERS]
        return refused(name, 'classifier.py', *args, *options, capsys=capsys)

    assert '--resume' in error('--work-dir=one')
    (tmp_path / 'epoch_1.pth').touch()
    work_dir = f'--work-dir={tmp_path}'
    assert '--resume CHECKPOINT' in error(work_dir, '--resume')
    (tmp_path / 'last_checkpoint').write_text('moved/epoch_1.pth')
    assert 'moved/epoch_1.pth' in error(work_dir, '--resume')
    weights = tmp_path / 'weights.pth'
    torch.save(torch.load(classifier, weights_only=False)['state_dict'], weights)
    assert f'load_from={weights}' in error(f'--resume={weights}')
    # One of another model is refused.
    facts = r'missing, .* head\.fc\.weight.* unknown to the model, .* bbox_head\.\S+'
    assert re.search(facts, error(str(detector), name='test.py'))


# --- Configurations ---------------------------------------------------------------


@pytest.mark.parametrize('root', ['data/coco/tiny', './data/coco/tiny/', 'a b,c/'])
def test_data_root_moves_data_sets_and_evaluators(root: str) -> None:
    cfg = load_config('retinanet.py', {'data_root': root})
    stem = root.rstrip('/')
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root.rstrip('/') == stem
    for split in ('val', 'test'):
        ann_file = cfg[f'{split}_evaluator'].ann_file
        assert ann_file == f'{stem}/annotations/instances_val2017.json'
    assert cfg.data_root == f'{stem}/'


def test_other_options_are_merged_after_data_root() -> None:
    options = {'data_root': 'new', 'val_dataloader.dataset.data_root': 'data/coco/'}
    cfg = load_config('retinanet.py', options)
    assert cfg.val_dataloader.dataset.data_root == 'data/coco/'
    assert cfg.test_dataloader.dataset.data_root == 'new/'


def test_data_root_reaches_wrapped_data_sets() -> None:
    inner = dict(type='CocoDataset', data_root='old', ann_file='old/a.json')
    dataset = dict(type='ConcatDataset', datasets=[inner, dict(inner, ann_file='b')])
    cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
    set_data_root(cfg, 'new')
    first, second = cfg.train_dataloader.dataset.datasets
    assert (first.data_root, first.ann_file) == ('new', 'new/a.json')
    assert (second.data_root, second.ann_file) == ('new', 'b')


@pytest.mark.parametrize('roots', [('a', 'b'), (None, None)])
def test_data_root_needs_one_to_replace(roots: tuple) -> None:
    loaders = {
        f'{split}_dataloader': dict(dataset=dict(type='D', data_root=root))
        for split, root in zip(('train', 'val'), roots, strict=True)
    }
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset\.data_root=new'):
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


# --- Checkpoints ------------------------------------------------------------------


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_fitting_checkpoint_is_loaded(prefix: str, tmp_path: Path) -> None:
    net = small_net()
    state = {
        prefix + key: value + 1
        for key, value in net.state_dict().items()
        if not key.endswith('num_batches_tracked')
    }
    torch.save(dict(state_dict=state, meta=dict(epoch=7)), tmp_path / 'a.pth')
    before = net[0].weight.clone()
    checkpoint = load_checkpoint(net, str(tmp_path / 'a.pth'))
    assert checkpoint['meta'] == dict(epoch=7)
    assert torch.equal(net[0].weight, before + 1)


@pytest.mark.parametrize(
    ('change', 'facts'),
    [
        ({'0.bias': None}, r'1 .* missing, .* 0\.bias'),
        ({'2.bias': torch.zeros(1)}, r'1 .* unknown .* 2\.bias'),
        ({'0.bias': torch.zeros(9)}, r'1 .* shape.* 0\.bias.*\[9\]'),
    ],
)
def test_misfit_is_told(change: dict, facts: str, tmp_path: Path) -> None:
    state = small_net().state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=facts):
        load_checkpoint(small_net(), str(tmp_path / 'a.pth'))


# --- Options of train.py ----------------------------------------------------------


def test_processes_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    monkeypatch.setenv('LOCAL_RANK', '0')  # so that it is put back
    monkeypatch.delenv('LOCAL_RANK')
    monkeypatch.setattr('dsnet_mm.engine.launch.get_device', lambda: 'cpu')
    monkeypatch.setattr(torch.distributed, 'init_process_group', backends.append)
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(['a/net.py', '--launcher=pytorch', '--local-rank=1'])
    wrapper = dict(find_unused_parameters=True)
    env_cfg = dict(dist_cfg=dict(backend='gloo'))
    cfg = Config(dict(model_wrapper_cfg=wrapper, env_cfg=env_cfg))
    set_run(cfg, args)
    assert cfg.work_dir == os.path.join('work_dirs', 'net')
    assert cfg.launcher == 'pytorch'
    assert os.environ['LOCAL_RANK'] == '1'
    assert backends == ['gloo']
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


@pytest.mark.skipif(native.WHY_NOT is not None, reason=f'{native.WHY_NOT}')
def test_times_of_the_op_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = tool('analysis_tools/benchmark_ops.py')
    monkeypatch.setattr(benchmark, 'INPUTS', ((2, (64, 96)),))
    out = tmp_path / 'new' / 'times.csv'
    args = [f'--out={out}', '--seconds=0', '--dtype', 'float32', 'bfloat16']
    for _ in range(2):
        benchmark.main(args)
        with out.open() as file:
            rows = list(csv.DictReader(file))
        assert [row['dtype'] for row in rows] == ['float32'] * 4 + ['bfloat16'] * 4
        assert rows[0]['tokens'] == '384, 6'
        assert all(float(row['forward native, ms']) > 0 for row in rows)
        assert torch.__version__ in rows[0]['on']
        args.append('--overwrite')


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

"""The command-line tools, on data sets of a few small images."""

import argparse
import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    # Threads only get in each other's way in nets as small as these.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, *args: str) -> str:
    """Runs a tool as users do and returns what it printed."""
    program = 'bash' if name.endswith('.sh') else sys.executable
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    done = subprocess.run(
        [program, str(TOOLS / name), *args],
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=path, OMP_NUM_THREADS='1'),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def written(printed: str) -> dict:
    """The metrics in the file that the last line of test.py names."""
    match = re.fullmatch(r'Metrics are in (.+)\.', printed.strip().splitlines()[-1])
    return json.loads(Path(match[1]).read_text())


@pytest.fixture(scope='module')
def detector(folder: Path) -> Path:
    """Checkpoint of a RetinaNet that train.py trained."""
    os.chdir(folder)
    printed = run('train.py', 'retinanet.py', '--cfg-options', 'data_root=sets/coco')
    logs = sorted(Path('work_dirs/retinanet').glob('*_*'))
    assert printed.splitlines()[-1] == (
        f'Checkpoints are in work_dirs/retinanet, logs in {logs[0]}.'
    )
    return Path('work_dirs/retinanet/epoch_2.pth')


@pytest.fixture(scope='module')
def classifier(folder: Path) -> Path:
    """Checkpoint of a classifier that train.py trained in one process."""
    os.chdir(folder)
    printed = run(
        'train.py',
        'classifier.py',
        '--work-dir=one',
        '--resume',
        '--cfg-options',
        'data_root=sets/folders/',
    )
    assert 'one holds nothing to resume from; training starts anew' in printed
    return Path('one/epoch_2.pth')


# --- Training and testing -------------------------------------------------------


def test_detector_trains_resumes_and_tests(
    detector: Path, capsys: pytest.CaptureFixture
) -> None:
    state = torch.load(detector, weights_only=False)
    assert 'ema_state_dict' in state
    # The last validation before this checkpoint was that of the first epoch.
    validated = state['message_hub']['log_scalars']['val/coco/bbox_mAP'].current()
    data = ['--cfg-options', 'data_root=sets/coco/']
    tool('test.py').main(
        ['retinanet.py', str(detector.with_name('epoch_1.pth')), *data]
    )
    tested = written(capsys.readouterr().out)['coco/bbox_mAP']
    assert tested == pytest.approx(validated, abs=1e-3)
    assert tested > 0
    tool('train.py').main(
        ['retinanet.py', '--resume', '--no-validate', *data, 'train_cfg.max_epochs=3']
    )
    assert (
        torch.load(detector.with_name('epoch_3.pth'), weights_only=False)['meta'][
            'epoch'
        ]
        == 3
    )
    log = capsys.readouterr().out
    assert 'resumed epoch: 2, iter: 4' in log
    assert 'Epoch(val)' not in log


@pytest.mark.parametrize('name', ['retinanet', 'classifier'])
def test_outputs_and_flips(
    name: str,
    detector: Path,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    data, checkpoint, images, num = {
        'retinanet': (COCO, detector, ['1.png', '2.png'], 2),
        'classifier': (FOLDERS, classifier, ['0.png_0.png', '1.png_0.png'], 4),
    }[name]
    out, show = tmp_path / 'predictions.pkl', tmp_path / 'drawn'
    args = [f'{name}.py', str(checkpoint), '--cfg-options', data]
    tool('test.py').main([*args, f'--out={out}', f'--show-dir={show}'])
    metrics = written(capsys.readouterr().out)
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == num
    assert sorted(path.name for path in show.iterdir()) == images

    flipped = tmp_path / 'flipped.pkl'
    tool('test.py').main([*args, f'--out={flipped}', '--tta'])
    assert written(capsys.readouterr().out).keys() == metrics.keys()
    means = pickle.loads(flipped.read_bytes())
    if name == 'retinanet':
        predictions, means = (
            [sample['pred_instances'] for sample in samples]
            for samples in (predictions, means)
        )
    key = 'scores' if name == 'retinanet' else 'pred_score'
    for plain, mean in zip(predictions, means, strict=True):
        assert plain[key].tolist() != mean[key].tolist()


@pytest.mark.parametrize('flags', [[], ['--tta']], ids=str)
def test_fused_model_predicts_the_same(
    flags: list[str],
    detector: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the weights of the EMAHook, which differ from the last ones."""
    forward, num_norms = nn.BatchNorm2d.forward, 0

    def counted(self: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        nonlocal num_norms
        num_norms += 1
        return forward(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, 'forward', counted)
    args = ['retinanet.py', str(detector), *flags, '--cfg-options', COCO]
    results = []
    for option in ([], ['--fuse']):
        out = tmp_path / f'{len(results)}.pkl'
        tool('test.py').main([*args, f'--out={out}', *option])
        samples = [
            sample['pred_instances'] for sample in pickle.loads(out.read_bytes())
        ]
        results.append((written(capsys.readouterr().out), samples, num_norms))
        num_norms = 0
    (metrics, plain, norms), (fused_metrics, fused_samples, fused_norms) = results
    assert fused_norms < norms / 2
    assert fused_metrics == pytest.approx(metrics, abs=1e-3)
    for one, other in zip(plain, fused_samples, strict=True):
        torch.testing.assert_close(one['scores'], other['scores'], rtol=0, atol=1e-5)


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


def test_fuse_hook_is_an_option_of_any_configuration(
    detector: Path, capsys: pytest.CaptureFixture
) -> None:
    """As text of a configuration, without ``tools/test.py --fuse``."""
    Path('fused.py').write_text(
        "_base_ = 'retinanet.py'\n"
        "custom_hooks = [*_base_.custom_hooks, dict(type='dsnet_mm.FuseHook')]"
    )
    tool('test.py').main(['fused.py', str(detector), '--cfg-options', COCO])
    assert '(VERY_LOW    ) FuseHook' in capsys.readouterr().out


def test_two_processes_train_and_test_as_one(
    classifier: Path, capsys: pytest.CaptureFixture
) -> None:
    args = ['--cfg-options', 'data_root=sets/folders']
    gloo = 'env_cfg.dist_cfg.backend=gloo'
    run(
        'dist_train.sh',
        'classifier.py',
        '2',
        '--work-dir',
        'two processes',
        *args,
        gloo,
        'train_dataloader.batch_size=2',
    )
    one = torch.load(classifier, weights_only=False)['state_dict']
    start = torch.load('one/epoch_1.pth', weights_only=False)['state_dict']
    two = torch.load('two processes/epoch_2.pth', weights_only=False)['state_dict']
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=key)
    assert max((one[key] - start[key]).abs().max() for key in one) > 1e-3

    config, checkpoint = 'classifier.py', str(classifier)
    printed = run('dist_test.sh', config, checkpoint, '2', *args, gloo)
    tool('test.py').main([config, checkpoint, *args])
    assert written(printed) == written(capsys.readouterr().out)


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
    assert done.stderr.startswith('Usage: [')
    assert done.stderr.endswith(f' {TOOLS / name} {args}\n')


def printed_by(name: str, program: str, folder: Path, *args: str, **env: str) -> str:
    """The arguments that a script calls a program with, each in brackets."""
    fake = folder / program
    fake.write_text('#!/bin/sh\nfor arg; do printf "[%s]" "$arg"; done\n')
    fake.chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ['PATH']])
    return subprocess.run(
        ['bash', TOOLS / name, *args],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PATH=path) | env,
    ).stdout


@pytest.mark.parametrize('name', ['train', 'test'])
def test_slurm_scripts_keep_arguments_whole(name: str, tmp_path: Path) -> None:
    args = ['gpu', 'job', 'a b.py', 'c d', '--flag']
    env = dict(GPUS='4', SRUN_ARGS='--time 5 --quiet')
    printed = printed_by(f'slurm_{name}.sh', 'srun', tmp_path, *args, **env)
    assert '[--gres][gpu:4][--ntasks][4][--ntasks-per-node][4]' in printed
    assert '[--time][5][--quiet]' in printed
    assert '[a b.py]' in printed
    assert '[c d]' in printed
    assert printed.endswith('[--launcher][slurm][--flag]')


@pytest.mark.parametrize(
    ('name', 'args'), [('train', ['a b.py']), ('test', ['a b.py', 'c d.pth'])]
)
def test_dist_scripts_meet_other_machines(
    name: str, args: list[str], tmp_path: Path
) -> None:
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='first', PORT='7')
    args = [*args, '8', '--flag']
    printed = printed_by(f'dist_{name}.sh', 'torchrun', tmp_path, *args, **env)
    assert printed.startswith(
        '[--nnodes][2][--node-rank][1][--master-addr][first][--master-port][7]'
        '[--nproc-per-node][8]'
    )
    assert '[a b.py]' in printed
    assert printed.endswith('[--launcher][pytorch][--flag]')


# --- Errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ('args', 'sentence'),
    [
        ('train.py none.py', 'there is no configuration file none.py'),
        ('train.py retinanet.py', 'no data/coco/; .*instances_train2017.json and'),
        ('train.py retinanet.py --cfg-options data_root=sets', 'no sets/annotations/'),
        (
            f'train.py retinanet.py --cfg-options {COCO} '
            'val_dataloader.dataset.data_prefix.img=other',
            'val_dataloader: there is no sets/coco/other',
        ),
        (
            f'train.py retinanet.py --cfg-options {COCO} val_evaluator.ann_file=a.json',
            'val_evaluator: there is no a.json; CocoMetric reads a.json',
        ),
        (
            'train.py classifier.py',
            'no data/none; CustomDataset reads train in',
        ),
        ('train.py classifier.py --cfg-options lr', "takes KEY=VALUE, got 'lr'"),
        (
            'train.py classifier.py --cfg-options default_scope=other',
            "default_scope='other'",
        ),
        (
            f'train.py classifier.py --cfg-options {FOLDERS} load_from=a.pth',
            'there is no checkpoint a.pth',
        ),
        (
            f'train.py classifier.py --cfg-options {FOLDERS} '
            'model.backbone.init_cfg.type=Pretrained '
            'model.backbone.init_cfg.checkpoint=a.pth',
            'there is no checkpoint a.pth; the model starts from it',
        ),
        (
            f'train.py classifier.py --resume a.pth --cfg-options {FOLDERS}',
            'there is no checkpoint a.pth',
        ),
        ('train.py classifier.py --auto-scale-lr', 'auto_scale_lr.base_batch_size=N'),
        (
            f'train.py classifier.py --launcher pytorch --cfg-options {FOLDERS}',
            'env_cfg.dist_cfg.backend=gloo',
        ),
        ('train.py classifier.py --amp', '--amp needs a GPU'),
        ('test.py classifier.py a.pth', 'there is no checkpoint a.pth'),
        ('test.py classifier.py damaged.pth', 'no data/none'),
        (
            f'test.py classifier.py damaged.pth --cfg-options {FOLDERS}',
            'damaged.pth cannot be read as a checkpoint',
        ),
        ('test.py classifier.py damaged.pth --out a.json', 'takes the name of a .pkl'),
        ('test.py classifier.py a.pth --out taken.pkl', 'taken.pkl exists'),
        ('test.py classifier.py a.pth --tta --show-dir a', 'leave one of them out'),
        (
            f'test.py classifier.py damaged.pth --fuse --cfg-options {FOLDERS} '
            'model.backbone._delete_=True model.backbone.type=LeNet5',
            'takes models with DS-blocks .*, and ImageClassifier has none',
        ),
        (
            'analysis_tools/benchmark_ops.py --out taken.csv',
            'taken.csv exists; replace it by --overwrite',
        ),
        ('analysis_tools/benchmark_ops.py --device cuda', 'torch sees no GPU'),
        (
            'analysis_tools/plot_predictions.py classifier.py a.pth a.png',
            'is no detector',
        ),
        (
            'analysis_tools/plot_predictions.py retinanet.py a.pth taken.png',
            'taken.png exists; replace it by --overwrite',
        ),
    ],
)
def test_errors_are_a_sentence(
    args: str,
    sentence: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('dsnet_mm.cli.distributed.get_device', lambda: 'cpu')
    Path('taken.pkl').touch()
    Path('taken.png').touch()
    Path('taken.csv').touch()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    name, *args = args.split()
    module = tool(name)
    if name == 'train.py':
        monkeypatch.setattr(module, 'get_device', lambda: 'cpu')
    with pytest.raises(SystemExit) as exit_:
        module.main(args)
    assert exit_.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_checkpoints_are_not_trained_over(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = tool('train.py').main
    data = ['--cfg-options', FOLDERS]
    with pytest.raises(SystemExit):
        train(['classifier.py', '--work-dir=one', *data])
    assert 'by --resume, or choose another --work-dir' in capsys.readouterr().err

    copy = tmp_path / 'epoch_1.pth'
    copy.touch()
    with pytest.raises(SystemExit):
        train(['classifier.py', f'--work-dir={tmp_path}', '--resume', *data])
    assert 'name it by --resume CHECKPOINT' in capsys.readouterr().err

    (tmp_path / 'last_checkpoint').write_text('moved/epoch_1.pth')
    with pytest.raises(SystemExit):
        train(['classifier.py', f'--work-dir={tmp_path}', '--resume', *data])
    assert 'no checkpoint moved/epoch_1.pth' in capsys.readouterr().err

    weights = tmp_path / 'weights.pth'
    torch.save(torch.load(classifier, weights_only=False)['state_dict'], weights)
    with pytest.raises(SystemExit):
        train(['classifier.py', f'--resume={weights}', *data])
    assert f'--cfg-options load_from={weights}' in capsys.readouterr().err


def test_checkpoints_of_other_models_are_refused(
    detector: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        tool('test.py').main(['classifier.py', str(detector), '--cfg-options', FOLDERS])
    error = capsys.readouterr().err
    assert re.search(
        r'does not fit .*: \d+ tensors are missing, for example head\.fc\.weight; '
        r'\d+ tensors are unknown to the model, for example bbox_head\.\S+weight; ',
        error,
    )


# --- Helpers --------------------------------------------------------------------


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


@pytest.mark.parametrize(
    'dataset',
    [
        dict(type='CIFAR10', data_root='none'),
        dict(type='CocoDataset', data_root='s3://none/', ann_file='a.json'),
        dict(type='CocoDataset', data_root='none', backend_args=dict(backend='x')),
    ],
)
def test_data_from_elsewhere_is_not_looked_for(dataset: dict) -> None:
    check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])


def test_imagenet_reads_the_folder_of_its_split(tmp_path: Path) -> None:
    dataset = dict(type='ImageNet', data_root=str(tmp_path), split='train')
    cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
    with pytest.raises(FileNotFoundError, match=rf'no {tmp_path}/train'):
        check_data(cfg, ['train'])


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
    ('change', 'sentence'),
    [
        ({'0.bias': None}, r'1 tensors are missing, for example 0\.bias'),
        ({'2.bias': torch.zeros(1)}, r'1 tensors are unknown .* example 2\.bias'),
        ({'0.bias': torch.zeros(9)}, r'1 tensors have another shape.* 0\.bias.*\[9\]'),
    ],
)
def test_misfit_is_told(change: dict, sentence: str, tmp_path: Path) -> None:
    state = small_net().state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    torch.save(state, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(small_net(), str(tmp_path / 'a.pth'))


def test_processes_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = []
    monkeypatch.setenv('LOCAL_RANK', '0')  # so that it is put back
    monkeypatch.delenv('LOCAL_RANK')
    monkeypatch.setattr('dsnet_mm.cli.distributed.get_device', lambda: 'cpu')
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


def test_amp_and_scaled_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    train = tool('train.py')
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    cfg = load_config('retinanet.py', {})
    train.set_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    train.set_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)


def test_ema_is_one_option() -> None:
    train = tool('train.py')
    cfg = load_config('mask_rcnn.py', {})
    train.set_ema(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook']
    with pytest.raises(ValueError, match='leave --ema out'):
        train.set_ema(cfg)


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


# --- Images -------------------------------------------------------------------


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

    with pytest.raises(SystemExit):
        tool('test.py').main([*args, '--tta', f'--work-dir={tmp_path}', *data])
    assert 'this model predicts masks too' in capsys.readouterr().err

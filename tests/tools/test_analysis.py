"""The analysis tools of mmdet and mmpretrain, and loggers, with our configurations."""

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from dsnet_mm import find_config
from tests.conftest import COCO, FOLDERS, clear_instances, tool

# The visualizer comes from a configuration of mmpretrain, and MMEngine adds a `_scope_`
# to it, which the tool hands to the visualizer. The modes but `original` call a private
# function of matplotlib, which 3.11 has changed.
ORIGINAL = (
    '--mode original --cfg-options visualizer._delete_=True '
    'visualizer.type=UniversalVisualizer'
)
# By iteration the size is of no meaning, but IterBasedTrainLoop waits 2 s an epoch.
RATES = '--not-show --dataset-size {} --save-path {{out}}/lr.png'
# Package, tool, arguments, and a file that it writes. DET and CLS are configurations.
TOOLS = [
    (
        'mmdet',
        'analysis_tools/browse_dataset.py',
        'DET --not-show --output-dir {out}',
        '4.png',
    ),
    (
        'mmdet',
        'analysis_tools/analyze_logs.py',
        'plot_curve {det_log} --keys loss segm_mAP --out {out}/curves.png',
        'curves.png',
    ),
    (
        'mmdet',
        'analysis_tools/coco_error_analysis.py',
        'det/predictions.segm.json {out} --ann truth.json --types segm',
        'segm/segm-allclass-allarea.png',
    ),
    (
        'mmdet',
        'analysis_tools/confusion_matrix.py',
        'DET det/predictions.pkl {out}',
        'confusion_matrix.png',
    ),
    (
        'mmdet',
        'analysis_tools/analyze_results.py',
        'DET det/predictions.pkl {out} --topk 1',
        'bad/*',
    ),
    (
        'mmpretrain',
        'visualization/browse_dataset.py',
        f'CLS --not-show --output-dir {{out}} {ORIGINAL}',
        '*',
    ),
    (
        'mmpretrain',
        'analysis_tools/analyze_logs.py',
        'plot_curve {cls_log} --keys loss accuracy/top1 --out {out}/curves.png',
        'curves.png',
    ),
    (
        'mmpretrain',
        'analysis_tools/confusion_matrix.py',
        'CLS cls/predictions.pkl --show-path {out}/confusion.png --include-values',
        'confusion.png',
    ),
    (
        'mmpretrain',
        'visualization/vis_scheduler.py',
        f'{find_config("mask_rcnn_dsnet_nuclei")} {RATES.format(100_000)}',
        'lr.png',
    ),
    (
        'mmpretrain',
        'visualization/vis_scheduler.py',
        f'{find_config("dsnet-demo_scenes")} {RATES.format(320)}',
        'lr.png',
    ),
]


@pytest.fixture(scope='module')
def logs(folder: Path) -> Iterator[dict[str, Path]]:
    """Logs of a Mask R-CNN and a classifier, whose working directories are det and cls.

    These have predictions, and det a TensorBoard log. DET and CLS are configurations
    with the data root in them, as their user would write them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, old, new, alias in (
            ('mask_rcnn', 'data/coco', 'sets/coco', 'DET'),
            ('classifier', 'data/none', 'sets/folders', 'CLS'),
        ):
            text = Config.fromfile(f'{name}.py').pretty_text.replace(old, new)
            Path(f'{alias}.py').write_text(text)
        truth = Path('sets/coco/annotations/instances_val2017.json').read_text()
        truth = json.loads(truth)
        for category in truth['categories']:
            category['supercategory'] = 'shape'  # the tool fails without
        Path('truth.json').write_text(json.dumps(truth))

        one = ['--cfg-options', 'default_hooks.logger.interval=1']
        det = [*one, COCO, 'train_cfg.max_epochs=1']
        det += ['model.test_cfg.rcnn.max_per_img=20']
        flags = ['--tensorboard'] if find_spec('tensorboard') else []
        tool('train.py').main(['mask_rcnn.py', '--work-dir=det', *flags, *det])
        det += ['test_evaluator.outfile_prefix=det/predictions']
        det += ['model.test_cfg.rcnn.score_thr=0']  # it has learnt next to nothing
        args = ['det/epoch_1.pth', '--work-dir=det', '--out=det/predictions.pkl']
        tool('test.py').main(['mask_rcnn.py', *args, *det])
        cls = [*one, FOLDERS]
        tool('train.py').main(['classifier.py', '--work-dir=cls', *cls])
        args = ['cls/epoch_2.pth', '--out=cls/predictions.pkl']
        tool('test.py').main(['classifier.py', *args, *cls])
        yield {
            f'{name}_log': min(Path(name).glob('*/vis_data/scalars.json'))
            for name in ('det', 'cls')
        }
    torch.set_num_threads(threads)


@pytest.mark.parametrize(('package', 'name', 'args', 'written'), TOOLS)
def test_tools_of_openmmlab(
    package: str,
    name: str,
    args: str,
    written: str,
    logs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ``python PATH ARGUMENTS`` does."""
    folder = Path(importlib.import_module(package).__file__).parent
    path = folder / '.mim' / 'tools' / name
    if not path.is_file():
        pytest.skip(f'this {package} has no {name}')
    words = [word.format(out=tmp_path, **logs) for word in args.split()]
    words = [f'{word}.py' if word in ('DET', 'CLS') else word for word in words]
    if 'segm_mAP' in words:
        if 'import seaborn' in path.read_text():
            pytest.importorskip('seaborn')  # mmdet 3.3.0
        else:
            words += ['--style', 'default']
    clear_instances()
    monkeypatch.setattr(sys, 'argv', [name, *words])
    runpy.run_path(str(path), run_name='__main__')
    assert any(file.is_file() for file in tmp_path.glob(written))


# ------------------------------------------------------------------------ loggers


def test_tensorboard(logs: dict[str, Path]) -> None:
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    log = logs['det_log']
    events = accumulator.EventAccumulator(str(log.parent)).Reload()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name, num in (('loss', 2), ('coco/segm_mAP', 1)):
        expected = [line[name] for line in lines if name in line]
        measured = [event.value for event in events.Scalars(name)]
        assert measured == pytest.approx(expected)
        assert len(measured) == num


def test_wandb(logs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: it writes a run that ``wandb sync`` sends later."""
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    args = ['--work-dir=weights_and_biases', '--wandb=dsnet']
    tool('train.py').main(['classifier.py', *args, '--cfg-options', FOLDERS])
    assert wandb.run is None  # the run has ended
    wandb.teardown()  # its process writes the rest
    (run,) = Path('weights_and_biases').glob('*/vis_data/wandb/offline-run-*/*.wandb')
    assert b'accuracy/top1' in run.read_bytes()


@pytest.mark.parametrize('visualizer', [True, False])
def test_wandb_gets_project_and_name(
    visualizer: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tool('train.py')
    found = SimpleNamespace(origin='__init__.py')
    monkeypatch.setattr(train, 'find_spec', lambda package: found)
    cfg = Config.fromfile(folder / 'classifier.py')
    if not visualizer:
        cfg.pop('visualizer')
    cfg.work_dir = 'runs/first'
    train.set_loggers(cfg, tensorboard=False, wandb='dsnet')
    local, wandb = cfg.visualizer.vis_backends
    assert local.type == 'LocalVisBackend'
    assert wandb.type == 'WandbVisBackend'
    assert wandb.init_kwargs == dict(project='dsnet', name='first')


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
@pytest.mark.parametrize('spec', [None, SimpleNamespace(origin=None)])
def test_missing_logger(
    package: str, spec: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of that name, or only a folder, such as W&B writes."""
    train = tool('train.py')
    monkeypatch.setattr(train, 'find_spec', lambda package: spec)
    cfg = Config(dict(work_dir='none'))
    chosen = dict(tensorboard=False, wandb=None) | {package: 'dsnet'}
    with pytest.raises(ValueError, match=f'pip install {package}'):
        train.set_loggers(cfg, **chosen)

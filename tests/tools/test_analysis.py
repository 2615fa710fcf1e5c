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
NUCLEI, SCENES = find_config('mask_rcnn_dsnet_nuclei'), find_config('dsnet-demo_scenes')
# A tool, its arguments, > and a file that it writes into OUT. DET and CLS are
# configurations. By iteration the size of vis_scheduler is of no meaning, but
# IterBasedTrainLoop waits 2 s an epoch.
CALLS = f"""
mmdet analysis_tools/browse_dataset DET --not-show --output-dir OUT > 4.png
mmdet analysis_tools/analyze_logs plot_curve det/LOG --keys loss segm_mAP --out OUT/a.png > a.png
mmdet analysis_tools/coco_error_analysis det/predictions.segm.json OUT --ann truth.json --types segm > segm/segm-allclass-allarea.png
mmdet analysis_tools/confusion_matrix DET det/predictions.pkl OUT > confusion_matrix.png
mmdet analysis_tools/analyze_results DET det/predictions.pkl OUT --topk 1 > bad/*
mmpretrain visualization/browse_dataset CLS --not-show --output-dir OUT {ORIGINAL} > *
mmpretrain analysis_tools/analyze_logs plot_curve cls/LOG --keys loss accuracy/top1 --out OUT/a.png > a.png
mmpretrain analysis_tools/confusion_matrix CLS cls/predictions.pkl --show-path OUT/a.png --include-values > a.png
mmpretrain visualization/vis_scheduler {NUCLEI} --not-show --dataset-size 100000 --save-path OUT/lr.png > lr.png
mmpretrain visualization/vis_scheduler {SCENES} --not-show --dataset-size 320 --save-path OUT/lr.png > lr.png
"""  # noqa: E501


def log_of(work_dir: str) -> Path:
    """The log of losses and metrics that analyze_logs reads."""
    return min(Path(work_dir).glob('*/vis_data/scalars.json'))


@pytest.fixture(scope='module')
def trained(folder: Path) -> Iterator[None]:
    """The folders det and cls of a trained Mask R-CNN and a trained classifier.

    These have predictions, and det a TensorBoard log. DET.py and CLS.py are their
    configurations with the data root in them, as their user would write them.
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
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('line', CALLS.strip().splitlines())
def test_tools_of_openmmlab(
    line: str, trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``python PATH ARGUMENTS`` does."""
    call, written = line.split(' > ')
    package, name, *words = call.replace('OUT', str(tmp_path)).split()
    folder = Path(importlib.import_module(package).__file__).parent
    path = folder / '.mim' / 'tools' / f'{name}.py'
    if not path.is_file():
        pytest.skip(f'this {package} has no {name}')
    words = [str(log_of(w[:3])) if w.endswith('/LOG') else w for w in words]
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


def test_tensorboard(trained: None) -> None:
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    log = log_of('det')
    events = accumulator.EventAccumulator(str(log.parent)).Reload()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name, num in (('loss', 2), ('coco/segm_mAP', 1)):
        expected = [line[name] for line in lines if name in line]
        measured = [event.value for event in events.Scalars(name)]
        assert measured == pytest.approx(expected)
        assert len(measured) == num


def test_wandb(trained: None, monkeypatch: pytest.MonkeyPatch) -> None:
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

"""The analysis tools of mmdet and mmpretrain, and loggers, with our configurations."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from dsnet_mm import find_config
from tests.conftest import COCO, FOLDERS, clear_instances, tool


@pytest.fixture(scope='module', autouse=True)
def _in_folder(folder: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield
    torch.set_num_threads(threads)


def moved(config: str, root: str) -> str:
    """Writes a configuration with another ``data_root``, as its user would."""
    text = Config.fromfile(config).pretty_text.replace('data/coco', root)
    text = text.replace('data/none', root)
    Path(f'moved_{config}').write_text(text)
    return f'moved_{config}'


@pytest.fixture(scope='module')
def detector(folder: Path) -> Path:
    """Working directory of a Mask R-CNN, with its predictions and a TensorBoard log."""
    work_dir = folder / 'detector'
    flags = ['--tensorboard'] if find_spec('tensorboard') else []
    options = ['--cfg-options', COCO, 'default_hooks.logger.interval=1']
    options += ['train_cfg.max_epochs=1', 'model.test_cfg.rcnn.max_per_img=20']
    tool('train.py').main(['mask_rcnn.py', f'--work-dir={work_dir}', *flags, *options])
    tool('test.py').main(
        [
            'mask_rcnn.py',
            f'{work_dir}/epoch_1.pth',
            f'--work-dir={work_dir}',
            f'--out={work_dir}/predictions.pkl',
            *options,
            f'test_evaluator.outfile_prefix={work_dir}/predictions',
            'model.test_cfg.rcnn.score_thr=0',  # it has learnt next to nothing
        ]
    )
    return work_dir


@pytest.fixture(scope='module')
def classifier(folder: Path) -> Path:
    """Working directory of a classifier."""
    work_dir = folder / 'classifier'
    options = ['--cfg-options', FOLDERS, 'default_hooks.logger.interval=1']
    tool('train.py').main(['classifier.py', f'--work-dir={work_dir}', *options])
    return work_dir


def path_of(package: str, name: str) -> Path:
    """Finds a tool of mmdet or mmpretrain."""
    folder = Path(importlib.import_module(package).__file__).parent
    path = folder / '.mim' / 'tools' / name
    if not path.is_file():
        pytest.skip(f'this {package} has no {name}')
    return path


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a tool of mmdet or mmpretrain, as ``python PATH ...`` does."""

    def run(package: str, name: str, *args: str) -> None:
        path = path_of(package, name)
        clear_instances()
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        runpy.run_path(str(path), run_name='__main__')

    return run


def log_of(work_dir: Path) -> Path:
    """The log of losses and metrics that analyze_logs reads."""
    return min(work_dir.glob('*/vis_data/scalars.json'))


# --------------------------------------------------------------------- detectors


def test_browse_detection(upstream: Callable, tmp_path: Path) -> None:
    args = ['--not-show', '--output-dir', tmp_path]
    upstream(
        'mmdet',
        'analysis_tools/browse_dataset.py',
        moved('mask_rcnn.py', 'sets/coco'),
        *args,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f'{i}.png' for i in range(1, 5)
    ]


def test_detection_logs(detector: Path, upstream: Callable, tmp_path: Path) -> None:
    args = ['plot_curve', log_of(detector), '--keys', 'loss', 'segm_mAP']
    args += ['--out', tmp_path / 'curves.png']
    if (
        'import seaborn'
        in path_of('mmdet', 'analysis_tools/analyze_logs.py').read_text()
    ):
        pytest.importorskip('seaborn')  # mmdet 3.3.0
    else:
        args += ['--style', 'default']
    upstream('mmdet', 'analysis_tools/analyze_logs.py', *args)
    assert (tmp_path / 'curves.png').is_file()


def test_coco_errors(detector: Path, upstream: Callable, tmp_path: Path) -> None:
    content = json.loads(
        Path('sets/coco/annotations/instances_val2017.json').read_text()
    )
    for category in content['categories']:
        category['supercategory'] = 'shape'  # the tool fails without
    (tmp_path / 'truth.json').write_text(json.dumps(content))
    results = detector / 'predictions.segm.json'
    args = ['--ann', tmp_path / 'truth.json', '--types', 'segm']
    upstream('mmdet', 'analysis_tools/coco_error_analysis.py', results, tmp_path, *args)
    assert (tmp_path / 'segm' / 'segm-allclass-allarea.png').is_file()


def test_detection_confusion(
    detector: Path, upstream: Callable, tmp_path: Path
) -> None:
    config = moved('mask_rcnn.py', 'sets/coco')
    predictions = detector / 'predictions.pkl'
    upstream(
        'mmdet', 'analysis_tools/confusion_matrix.py', config, predictions, tmp_path
    )
    assert (tmp_path / 'confusion_matrix.png').is_file()


def test_best_and_worst(detector: Path, upstream: Callable, tmp_path: Path) -> None:
    config = moved('mask_rcnn.py', 'sets/coco')
    predictions = detector / 'predictions.pkl'
    args = ['--topk', '1']
    upstream(
        'mmdet',
        'analysis_tools/analyze_results.py',
        config,
        predictions,
        tmp_path,
        *args,
    )
    for kind in ('good', 'bad'):
        assert len(list((tmp_path / kind).iterdir())) == 1


# -------------------------------------------------------------------- classifiers


def test_browse_classification(upstream: Callable, tmp_path: Path) -> None:
    # The visualizer comes from a configuration of mmpretrain, and MMEngine adds
    # a `_scope_` to it, which the tool hands to the visualizer.
    options = ['visualizer._delete_=True', 'visualizer.type=UniversalVisualizer']
    # The other modes call a private function of matplotlib, which 3.11 has changed.
    args = ['--not-show', '--output-dir', tmp_path, '--mode', 'original']
    args += ['--cfg-options', *options]
    config = moved('classifier.py', 'sets/folders')
    upstream('mmpretrain', 'visualization/browse_dataset.py', config, *args)
    assert any(tmp_path.iterdir())


def test_classification_logs(
    classifier: Path, upstream: Callable, tmp_path: Path
) -> None:
    args = ['plot_curve', log_of(classifier), '--keys', 'loss', 'accuracy/top1']
    args += ['--out', tmp_path / 'curves.png']
    upstream('mmpretrain', 'analysis_tools/analyze_logs.py', *args)
    assert (tmp_path / 'curves.png').is_file()


def test_classification_confusion(
    classifier: Path, upstream: Callable, tmp_path: Path
) -> None:
    predictions = tmp_path / 'predictions.pkl'
    args = ['classifier.py', f'{classifier}/epoch_2.pth', f'--out={predictions}']
    tool('test.py').main([*args, '--cfg-options', FOLDERS])
    args = ['--show-path', tmp_path / 'confusion.png', '--include-values']
    config = moved('classifier.py', 'sets/folders')
    upstream(
        'mmpretrain', 'analysis_tools/confusion_matrix.py', config, predictions, *args
    )
    assert (tmp_path / 'confusion.png').is_file()


# By iteration the size is of no meaning, but IterBasedTrainLoop waits 2 s an epoch.
@pytest.mark.parametrize(
    ('config', 'size'),
    [('mask_rcnn_dsnet_nuclei', 100_000), ('dsnet-demo_scenes', 320)],
)
def test_learning_rates(
    config: str, size: int, upstream: Callable, tmp_path: Path
) -> None:
    args = ['--not-show', '--dataset-size', size, '--save-path', tmp_path / 'lr.png']
    path = find_config(config)
    upstream('mmpretrain', 'visualization/vis_scheduler.py', path, *args)
    assert (tmp_path / 'lr.png').is_file()


# ------------------------------------------------------------------------ loggers


def test_tensorboard(detector: Path) -> None:
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    log = log_of(detector)
    events = accumulator.EventAccumulator(str(log.parent)).Reload()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name, num in (('loss', 2), ('coco/segm_mAP', 1)):
        expected = [line[name] for line in lines if name in line]
        measured = [event.value for event in events.Scalars(name)]
        assert measured == pytest.approx(expected)
        assert len(measured) == num


def test_wandb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    visualizer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tool('train.py')
    found = SimpleNamespace(origin='__init__.py')
    monkeypatch.setattr(train, 'find_spec', lambda package: found)
    cfg = Config.fromfile('classifier.py')
    if not visualizer:
        cfg.pop('visualizer')
    cfg.work_dir = 'runs/first'
    train.set_loggers(cfg, tensorboard=False, wandb='dsnet')
    local, wandb = cfg.visualizer.vis_backends
    assert local.type == 'LocalVisBackend'
    assert wandb.type == 'WandbVisBackend'
    assert wandb.init_kwargs == dict(project='dsnet', name='first')


@pytest.mark.parametrize('option', ['--tensorboard', '--wandb=dsnet'])
@pytest.mark.parametrize('spec', [None, SimpleNamespace(origin=None)])
def test_missing_logger(
    option: str,
    spec: SimpleNamespace | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Nothing of that name, or only a folder, such as W&B writes."""
    train = tool('train.py')
    monkeypatch.setattr(train, 'find_spec', lambda package: spec)
    with pytest.raises(SystemExit):
        args = ['classifier.py', '--work-dir=no_logger', option]
        train.main([*args, '--cfg-options', FOLDERS])
    package = option.removeprefix('--').partition('=')[0]
    message = ' '.join(capsys.readouterr().err.split())
    assert f'install it by pip install {package}' in message
    assert not Path('no_logger').exists()

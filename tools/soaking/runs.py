"""The runs that are interrupted, their data, and what has to be equal."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import cv2
import timm
from safetensors.torch import save_file
from torch import Tensor

from dsnet_mm.checkpoint import read_checkpoint
from make_scenes import SceneSettings, make_scenes

REPO = Path(__file__).resolve().parents[2]

TRAINING = """
train_dataloader = dict(batch_size=4)
default_hooks = dict(logger=dict(interval=1))
"""
CLASSIFIER = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
default_hooks.update(checkpoint=dict(interval=1))
"""
BY_ITERATION = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=64, val_interval=32)
train_dataloader.update(
    num_workers=2, sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True)
)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=64)]
default_hooks.update(
    checkpoint=dict(
        by_epoch=False, interval=8, filename_tmpl='iter_{{}}.pth', max_keep_ckpts=2
    )
)
log_processor = dict(by_epoch=False)
"""
DETECTOR = f"""
_base_ = __import__('dsnet_mm').find_config('mask_rcnn_dsnet_demo_scenes')
{TRAINING}
model = dict(backbone=dict(init_cfg=None))
train_dataloader.update(batch_size=2)
train_cfg = dict(max_iters=24, val_interval=12)
default_hooks.update(checkpoint=dict(interval=4))
"""
# One and two processes train the same weights without batch norm and random numbers.
PROCESSES = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
env_cfg = dict(dist_cfg=dict(backend='gloo'))
model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=4)))
train_dataloader.update(
    dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9)
)
default_hooks.update(checkpoint=dict(interval=1, filename_tmpl='epoch_{{}}.pth'))
"""
TOLERANCE = 1e-5
"""Largest difference of weights between one and two processes."""

Pieces = dict[Any, int]
"""What a run has done, with a number that changes when it is done again."""


@dataclass(frozen=True)
class Run:
    """A command that is interrupted and goes on.

    Attributes:
        name: Name in the table.
        words: The command, a tool and its arguments. ``{data}`` is the folder of data.
        result: Reads what has to be equal from the folder in which it ran.
        pieces: Reads what has been done.
        again: Pieces that one start may at most do again.
        config: Configuration, in ``config.py`` of that folder.
        forks: Whether it can be a fork. Otherwise it is a process of its own each time,
            and only killed at random times.
    """

    name: str
    words: tuple[str, ...]
    result: Callable[[Path], dict[str, Any]]
    pieces: Callable[[Path], Pieces]
    again: int
    config: str = ''
    forks: bool = True

    def command(self, data: Path) -> list[str]:
        """Returns the words with absolute paths."""
        words = [word.format(data=data) for word in self.words]
        return [
            str(REPO / w) if w.startswith(('tools/', 'weights/')) else w for w in words
        ]


def training(folder: Path, name: str) -> dict[str, Any]:
    """Reads weights, averages, optimizer and schedules of the last checkpoint."""
    checkpoint = read_checkpoint(str(folder / 'run' / name))
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    found = {part: checkpoint.get(part) for part in parts}
    return found | {key: checkpoint['meta'][key] for key in ('epoch', 'iter')}


def iterations(folder: Path) -> Pieces:
    """Counts how often each iteration of a training was done, from its logs."""
    found: Counter = Counter()
    for path in folder.glob('run/*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the kill cut the line
                entry = json.loads(line)
                if 'loss' in entry:
                    found[entry['step']] += 1
    return dict(found)


def few_shot(folder: Path) -> dict[str, Any]:
    """Reads the records and classifiers of a few-shot run, without their times."""
    found = {}
    for path in sorted(folder.glob('run/runs/*.json')):
        record = json.loads(path.read_text())
        found[path.stem] = {k: v for k, v in record.items() if 'seconds' not in k}
        classifier = folder / 'run' / 'classifiers' / f'{path.stem}.safetensors'
        found[f'{path.stem} weights'] = read_checkpoint(str(classifier))['state_dict']
    return found


def features(folder: Path) -> dict[str, Any]:
    """Reads a file of features."""
    return read_checkpoint(str(folder / 'features.safetensors'))


def predictions(folder: Path) -> dict[str, Any]:
    """Reads the predictions and the drawn images."""
    files = [*folder.glob('run/*.json'), *folder.glob('run/images/*')]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def files(pattern: str) -> Callable[[Path], Pieces]:
    """Returns a function that tells when files were written."""
    return lambda folder: {f: f.stat().st_mtime_ns for f in folder.glob(pattern)}


TRAIN = ('tools/train.py', 'config.py', '--work-dir=run', '--resume')
IMAGES = ('{data}/shots', '--model=timm:test_vit')
IMAGES += ('--pretrained={data}/encoder.safetensors', '--cfg-options')
FEW_SHOT = ('--shots', '1', '4', '--seeds', '1', '2', '--methods')
FEW_SHOT += ('linear_probe', 'clap', 'tip_adapter_f', 'clip_adapter')
TWO = ('--cfg-options', 'data_root={data}/scenes/cls')
TWO += ('train_dataloader.batch_size=2',)
WEIGHTS = ('mask_rcnn_dsnet_nuclei', 'weights/mask_rcnn_dsnet_nuclei.safetensors')
RUNS = (
    Run(
        *('training', (*TRAIN, '--cfg-options', 'data_root={data}/scenes/cls')),
        *(partial(training, name='last.pth'), iterations, 8, CLASSIFIER),
    ),
    Run(
        'training, EMA, 2 workers',
        (*TRAIN, '--ema', '--cfg-options', 'data_root={data}/scenes/cls'),
        *(partial(training, name='iter_64.pth'), iterations, 8, BY_ITERATION),
    ),
    Run(
        'few-shot run',
        ('tools/few_shot.py', 'run', *IMAGES[:3], '--work-dir=run', *FEW_SHOT),
        *(few_shot, files('run/classifiers/*.safetensors'), 1),
    ),
    Run(
        'encoding',
        (
            'tools/few_shot.py',
            'encode',
            *IMAGES,
            'views=10',
            '--out=features.safetensors',
        ),
        *(features, files('work_dirs/few_shot_features/images_*/*.safetensors'), 0),
    ),
    Run(
        'inference',
        ('tools/infer.py', *WEIGHTS, '{data}/nuclei', '--out=run', '--resume'),
        *(predictions, files('run/images/*'), 1),
    ),
    Run(
        'training of a detector',
        (*TRAIN, '--cfg-options', 'data_root={data}/scenes'),
        *(partial(training, name='last.pth'), iterations, 4, DETECTOR),
    ),
    Run(
        'training, 2 processes',
        ('tools/dist_train.sh', 'config.py', '2', *TRAIN[2:], *TWO),
        *(partial(training, name='epoch_8.pth'), iterations, 8, PROCESSES, False),
    ),
)


def prepare(data: Path) -> None:
    """Writes the data of all runs: drawn scenes, an encoder, parts of a photograph."""
    small = dict(train=16, val=4, cls_train=8, cls_val=2, size=64)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        make_scenes(data / 'scenes', SceneSettings(**small))
        shots = SceneSettings(**(small | dict(train=1, val=1, cls_train=40)))
        make_scenes(data / 'shots_of_scenes', shots)
        (data / 'shots_of_scenes' / 'cls' / 'train').rename(data / 'shots')
        encoder = timm.create_model('test_vit')
        save_file(encoder.state_dict(), data / 'encoder.safetensors')
    photograph = cv2.imread(str(REPO / 'docs' / 'images' / 'nuclei.jpg'))
    (data / 'nuclei').mkdir()
    for i in range(24):
        y, x = 32 * (i // 6), 32 * (i % 6)
        cv2.imwrite(str(data / 'nuclei' / f'{i:02d}.png'), photograph[y:, x:][:96, :96])


def digests(result: dict[str, Any]) -> dict[str, str]:
    """Returns a hash of each part of a result."""
    found = {}
    for name, value in result.items():
        sha = hashlib.sha256()
        _feed(sha, value)
        found[name] = sha.hexdigest()
    return found


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(str(len(value)).encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, Tensor):
        sha.update(f'{value.dtype} {tuple(value.shape)}'.encode())
        sha.update(value.detach().contiguous().numpy().tobytes())
    else:
        sha.update(repr(value).encode())

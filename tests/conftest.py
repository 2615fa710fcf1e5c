"""Fixtures and functions that several test files use."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from mmengine.visualization import Visualizer
from PIL import Image
from torch import Tensor, nn

from dsnet_mm.models import DSNet
from dsnet_mm.ops import native
from dsnet_mm.ops.packing import PACKED_DTYPES

REPO = Path(__file__).resolve().parents[1]

needs_native = pytest.mark.skipif(
    native.WHY_NOT is not None, reason=f'no compiled ops: {native.WHY_NOT}'
)
needs_packing = pytest.mark.skipif(
    torch.float32 not in PACKED_DTYPES, reason='no compiled projections'
)


@pytest.fixture(params=[1, 2, 3], ids='{} threads'.format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def error(measured: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Returns the largest error of all tensors.

    It is relative to the largest value of the tensor, or to 1 if that is smaller. Small
    values are often sums that cancel, such as the gradient of a bias before a norm.
    Their rounding error is that of the terms.
    """
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1)).item()
        for m, e in zip(measured, expected, strict=True)
    )


def equal(measured: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Tells whether all tensors are equal, bit by bit."""
    return all(torch.equal(m, e) for m, e in zip(measured, expected, strict=True))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a new Python process, in the root of the repository."""
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, 'PYTHONPATH': str(REPO), **environment},
    )


def run_with_instructions(capability: str, code: str) -> None:
    """Runs tests in a process that uses at most these instructions of the CPU.

    Args:
        capability: A value of ``ATEN_CPU_CAPABILITY``.
        code: Imports and calls the tests.
    """
    code += 'import torch; print(torch.backends.cpu.get_cpu_capability())'
    done = run_python(code, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    if capability.upper() not in done.stdout:
        pytest.skip(f'this machine runs {done.stdout.strip()}')


# ------------------------------------------------------------------- networks

TINY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))
VARIANTS = [
    dict(),
    dict(isa=False),
    dict(isa='global_to_local'),
    dict(isa='local_to_global'),
    dict(intra_scale='local'),
    dict(intra_scale='global'),
    dict(isa=False, alpha=0.0),
    dict(isa=False, alpha=0.25),
    dict(isa=False, alpha=1.0),
    dict(num_heads=4),
    dict(global_factors=(8, 4, 2, 1)),
    # With images of 72 x 104 it shrinks the global streams of stages 1 and 2 only.
    dict(global_factors=(2, 2, 2, 1), max_global_tokens=20),
]
# The fused form packs weights with these numbers of channels.
WIDE = dict(embed_dims=(64, 128, 192, 256), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))


def trained(model: nn.Module) -> nn.Module:
    """Sets random statistics and weights of norms, like those of a trained model."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3)
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)  # some are negative
            nn.init.normal_(module.bias)
            module.weight.data[::4] = 1e-9
    return model


def build(options: dict, arch: dict = TINY) -> DSNet:
    torch.manual_seed(0)
    net = DSNet(**(dict(arch=arch, out_indices=(0, 1, 2, 3)) | options))
    return trained(net).double()


def images(height: int = 72, width: int = 104) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, height, width, dtype=torch.float64)


# ------------------------------------------------------------------------- CLIP

TINY_CLIP = {
    'embed_dim': 16,
    'vision_cfg': {
        'image_size': 32,
        'layers': 1,
        'width': 32,
        'head_width': 16,
        'patch_size': 16,
    },
    'text_cfg': {
        'context_length': 24,
        'vocab_size': 49408,
        'width': 16,
        'heads': 2,
        'layers': 1,
    },
}


@pytest.fixture(scope='session')
def tiny_clip(tmp_path_factory):
    """Arguments of OpenCLIPEncoder for a tiny model with stored weights."""
    import open_clip

    folder = tmp_path_factory.mktemp('clip')
    config = folder / 'dsnet_mm_tiny.json'
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model('dsnet_mm_tiny')
    weights = folder / 'tiny.pt'
    torch.save(model.state_dict(), weights)
    return {'model': str(config), 'pretrained': str(weights)}


@pytest.fixture(scope='session')
def encoder(tiny_clip):
    from dsnet_mm.models import OpenCLIPEncoder

    return OpenCLIPEncoder(**tiny_clip)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Three classes of coloured noise, 24 images each."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    colours = {'red': (1, 0, 0), 'green_sea': (0, 1, 0), 'blue': (0, 0, 1)}
    for name, colour in colours.items():
        (folder / name).mkdir()
        for i in range(24):
            noise = rng.uniform(0, 255, (40, 48, 3)) * (0.4 + 0.6 * np.array(colour))
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f'{i}.png')
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Names of the functions that loaded a CLIP model or a data set, in order."""
    import open_clip

    from dsnet_mm.datasets import task

    seen = []

    def spy(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    spy(open_clip, 'create_model')
    for reader in ('read_public', 'read_folder', 'read_csv'):
        spy(task, reader)
    return seen


# ------------------------------------------------------------------------ tools

TOOLS = Path(__file__).parents[1] / 'tools'
COCO, FOLDERS = 'data_root=sets/coco', 'data_root=sets/folders'

BACKBONE = """
    backbone=dict(
        _delete_=True, type='dsnet_mm.DSNet', out_indices=({levels}),
        arch=dict(
            embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
        ),
    ),
    neck=dict(
        _delete_=True, type='dsnet_mm.DSFPN', in_channels=[{widths}],
        out_channels=16, num_outs=5, num_heads=1,
    ),
"""
# The data root of the base configuration is data/coco/, which does not exist here.
DETECTION = """
_base_ = [
    'mmdet::_base_/models/{model}_r50_fpn.py',
    'mmdet::_base_/datasets/coco_{task}.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
load = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64)),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
    dict(type='PackDetInputs'),
]
metainfo = dict(classes=('square', 'disc'))
loader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(metainfo=metainfo, pipeline=load),
)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
train_cfg = dict(max_epochs=2)
param_scheduler = []
randomness = dict(seed=0)
"""
RETINANET = (
    DETECTION.format(model='retinanet', task='detection', masks=False)
    + f"""
model = dict({BACKBONE.format(levels='1, 2, 3', widths='16, 32, 32')}
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0.0, max_per_img=100),
)
custom_hooks = [dict(type='EMAHook')]
"""
)
MASK_RCNN = (
    DETECTION.format(model='mask-rcnn', task='instance', masks=True)
    + f"""
model = dict({BACKBONE.format(levels='0, 1, 2, 3', widths='16, 16, 32, 32')}
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2
        ),
    ),
)
"""
)
# Without randomness and batch norm, one and two processes train the same weights.
CLASSIFIER = """
_base_ = ['mmpretrain::_base_/default_runtime.py']
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='data/none', data_prefix='train',
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='data/none', data_prefix='val',
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
randomness = dict(seed=0)
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, num_classes=2)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='dsnet_mm.DSNet', norm_cfg=dict(type='GN', num_groups=4),
        arch=dict(
            embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32),
)
"""


def draw(rng: np.random.Generator, kind: int) -> tuple[np.ndarray, list[int]]:
    """Draws a 64x64 image of a square (0) or disc (1). Returns it and the box."""
    image = rng.integers(0, 60, (64, 64, 3), np.uint8)
    size = int(rng.integers(20, 36))
    left, top = (int(rng.integers(0, 64 - size)) for _ in range(2))
    if kind == 0:
        cv2.rectangle(image, (left, top), (left + size, top + size), (40, 200, 250), -1)
    else:
        center = (left + size // 2, top + size // 2)
        cv2.circle(image, center, size // 2, (250, 120, 60), -1)
    return image, [left, top, size, size]


def write_coco(root: Path, split: str, num: int) -> None:
    """Writes a split in the layout of COCO 2017."""
    rng = np.random.default_rng(num)
    folder = root / f'{split}2017'
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, num + 1):
        image, (x, y, w, h) = draw(rng, i % 2)
        cv2.imwrite(str(folder / f'{i}.png'), image)
        images.append(dict(id=i, file_name=f'{i}.png', height=64, width=64))
        annotations.append(
            dict(
                id=i,
                image_id=i,
                category_id=i % 2 + 1,
                bbox=[x, y, w, h],
                area=w * h,
                iscrowd=0,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
            )
        )
    categories = [dict(id=1, name='square'), dict(id=2, name='disc')]
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configurations, and with data sets in ``sets``."""
    folder = tmp_path_factory.mktemp('tools')
    write_coco(folder / 'sets' / 'coco', 'train', 4)
    write_coco(folder / 'sets' / 'coco', 'val', 2)
    rng = np.random.default_rng(0)
    for split, num in (('train', 4), ('val', 2)):
        for kind, name in enumerate(('square', 'disc')):
            path = folder / 'sets' / 'folders' / split / name
            path.mkdir(parents=True)
            for i in range(num):
                cv2.imwrite(str(path / f'{i}.png'), draw(rng, kind)[0])
    for name, text in (
        ('retinanet', RETINANET),
        ('mask_rcnn', MASK_RCNN),
        ('classifier', CLASSIFIER),
    ):
        (folder / f'{name}.py').write_text(text)
    (folder / 'damaged.pth').write_text('no checkpoint')
    return folder


def clear_instances() -> None:
    """Forgets the visualizers and the default scopes of earlier calls.

    MMEngine keeps them for the life of the process. mmdet gives all its visualizers the
    same name. The default scope of a runner is named by its configuration and by the
    second: a runner of the same name in the same second does not set its scope again.
    """
    for kind in (DefaultScope, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


def tool(name: str) -> ModuleType:
    """Imports a tool for calls of its ``main``, which are quicker than processes."""
    clear_instances()
    spec = importlib.util.spec_from_file_location(Path(name).stem, TOOLS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

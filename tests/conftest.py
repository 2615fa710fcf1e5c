"""What several test modules share: tools, small data sets and configurations."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from mmengine.visualization import Visualizer

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
# Only the data root of the base, data/coco/, is wrong for the pictures here.
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
# Nothing random and no batch norm: two processes must train what one does.
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
    """A 64 x 64 picture of a square (0) or disc (1), and its left, top, w, h."""
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
    pictures = root / f'{split}2017'
    pictures.mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, num + 1):
        image, (x, y, w, h) = draw(rng, i % 2)
        cv2.imwrite(str(pictures / f'{i}.png'), image)
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
    """A folder with configurations, and data sets in ``sets``."""
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


def tool(name: str) -> ModuleType:
    """Imports a tool for calls of its ``main``, which are quicker than processes.

    The visualizers of earlier calls are forgotten. MMEngine keeps them for the
    life of the process, and mmdet gives all of its own the same name.
    """
    Visualizer._instance_dict.clear()
    spec = importlib.util.spec_from_file_location(Path(name).stem, TOOLS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

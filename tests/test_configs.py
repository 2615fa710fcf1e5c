"""Configurations of DS-Net: they are built, do a training step, and one inference.

Those of one network in three sizes are trained in the smallest one. The others differ
from it in nothing but the size.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import (
    MMDistributedDataParallel,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from .conftest import REPO, write_coco

CONFIGS = REPO / 'configs' / 'dsnet'
DETECTION = sorted(path.stem for path in CONFIGS.glob('*_dsnet_*_coco.py'))
# With options for random weights: gradients are zero where a residual starts at zero.
OTHER_BACKBONES = dict(
    mask_rcnn_r50_dsfpn_coco=dict(zero_init_residual=False),
    mask_rcnn_timm_dsfpn_coco=dict(pretrained=False),
)
CLASSIFICATION = sorted(path.stem for path in CONFIGS.glob('*_in1k.py'))
SMALL_DETECTION = [
    'mask_rcnn_dsnet_demo_scenes',
    'mask_rcnn_dsnet_demo_coco8',
    'mask_rcnn_dsnet_nuclei',
    'mask_rcnn_dsnet_long_nuclei',
]
SMALL_CLASSIFICATION = ['dsnet-demo_scenes', 'dsnet_cifar10']
TINY = [n for n in DETECTION if 'dsnet_t_' in n and '_3x' not in n]


@cache
def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def test_all_are_listed():
    assert (len(DETECTION), len(CLASSIFICATION), len(TINY)) == (18, 3, 4)
    small = {*SMALL_DETECTION, *SMALL_CLASSIFICATION}
    listed = {*DETECTION, *OTHER_BACKBONES, *CLASSIFICATION, *small}
    assert {path.stem for path in CONFIGS.glob('*.py')} == listed


@pytest.mark.parametrize('name', [*DETECTION, *CLASSIFICATION])
def test_sizes_differ_in_the_size_alone(name: str):
    """And the 3x detectors from the others in the schedule and the scales."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    letter = re.search(r'dsnet[_-]([tsb])', name)[1]
    trained_name = name.replace('_3x', '').replace(f'dsnet_{letter}', 'dsnet_t')
    trained_name = re.sub('dsnet-(small|base)', 'dsnet-tiny', trained_name)
    cfg, other = (deepcopy(load(n).to_dict()) for n in (name, trained_name))
    backbone, tiny = cfg['model']['backbone'], other['model']['backbone']
    sizes = dict(t=('tiny', 0.1), s=('small', 0.2), b=('base', 0.3))
    arch, drop_path_rate = sizes[letter]
    assert (backbone.pop('arch'), tiny.pop('arch')) == (arch, 'tiny')
    if name in DETECTION:
        rates = backbone.pop('drop_path_rate'), tiny.pop('drop_path_rate')
        assert rates == (drop_path_rate, 0.1)
    if '_3x' in name:
        assert cfg['train_cfg'].pop('max_epochs') == 36
        other['train_cfg'].pop('max_epochs')
        for key in ('train_pipeline', 'param_scheduler'):
            assert cfg.pop(key) != other.pop(key)
        for config in (cfg, other):
            config['train_dataloader']['dataset'].pop('pipeline')
    assert cfg == other


# --- Detectors --------------------------------------------------------------------


def build_detector(
    name: str, *sizes: tuple[int, int], **backbone
) -> tuple[Config, nn.Module, dict]:
    """Builds a detector with few proposals, and a batch of images of these sizes."""
    testing = pytest.importorskip('mmdet.testing')
    pytest.importorskip('mmcv._ext')
    if 'timm' in name:
        pytest.importorskip('mmpretrain')
        pytest.importorskip('timm')
    cfg = deepcopy(load(name))
    options = OTHER_BACKBONES.get(name, {}) | backbone
    cfg.model.backbone |= dict(init_cfg=None, **options)
    masks = name.startswith('mask_rcnn')
    if masks:
        cfg.model.train_cfg.rpn_proposal.max_per_img = 50
        cfg.model.train_cfg.rcnn.sampler.num = 32
        cfg.model.test_cfg.rpn.max_per_img = 20
        cfg.model.test_cfg.rcnn.score_thr = 0
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    shapes = [[3, *size] for size in sizes]
    data = testing.demo_mm_inputs(len(sizes), shapes, num_classes=80, with_mask=masks)
    head = cfg.model.roi_head.bbox_head if masks else cfg.model.bbox_head
    for sample in data['data_samples']:
        sample.gt_instances.labels %= head.num_classes
    return cfg, model.train(), data


def train(model: nn.Module, data: dict, cfg: Config) -> dict[str, float]:
    """One training step as MMEngine does it.

    Every loss is finite and every parameter has a gradient: DDP stops at the second
    step if one has none. Nearly all gradients are not zero.
    """
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    params = {k: v for k, v in model.named_parameters() if v.requires_grad}
    gradients = {}
    for name, param in params.items():
        param.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.update({name: p.grad.any().item()})
        )
    before = {name: param.detach().clone() for name, param in params.items()}
    losses = {k: v.item() for k, v in model.train_step(data, optim_wrapper).items()}
    assert all(np.isfinite(value) for value in losses.values()), losses
    assert gradients.keys() == params.keys()
    moved = [not torch.equal(param, before[name]) for name, param in params.items()]
    assert min(np.mean(moved), np.mean(list(gradients.values()))) > 0.9
    return losses


@pytest.mark.parametrize('name', [*TINY, *SMALL_DETECTION, *OTHER_BACKBONES])
def test_detection(name: str):
    cfg, model, data = build_detector(name, (97, 131), (64, 96))
    masks = name.startswith('mask_rcnn')
    assert ('loss_mask' in train(model, data, cfg)) == masks
    levels = model.extract_feat(torch.zeros(1, 3, 128, 160))
    strides = [128 // level.shape[2] for level in levels]
    head = model.rpn_head if masks else model.bbox_head
    assert strides == [stride[0] for stride in head.prior_generator.strides]
    for sample in model.eval().test_step(data):
        found = sample.pred_instances
        assert found.bboxes.isfinite().all()
        if masks:
            assert found.masks.shape == (len(found), *sample.ori_shape[:2])
            assert len(found)


def test_channels_and_normalisation_are_those_of_timm():
    timm = pytest.importorskip('timm')
    pytest.importorskip('mmdet')
    model = load('mask_rcnn_timm_dsfpn_coco').model
    assert model.backbone.pretrained
    network = timm.create_model(model.backbone.model_name, features_only=True)
    assert network.feature_info.channels() == model.neck.in_channels
    assert network.feature_info.reduction() == [4, 8, 16, 32]
    data = timm.data.resolve_model_data_config(network)
    for key in ('mean', 'std'):
        ours = [value / 255 for value in model.data_preprocessor[key]]
        assert ours == pytest.approx(data[key], abs=1e-6)
    assert model.data_preprocessor.bgr_to_rgb


def test_detection_pipelines(tmp_path: Path):
    """1x and 3x read COCO's own layout."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    write_coco(tmp_path, 'train', 4)
    for name in ('mask_rcnn_dsnet_s_coco', 'mask_rcnn_dsnet_s_3x_coco'):
        cfg = deepcopy(load(name).train_dataloader.dataset)
        metainfo = dict(classes=('square', 'disc'))
        dataset = DATASETS.build({**cfg, 'data_root': tmp_path, 'metainfo': metainfo})
        sizes = {min(dataset[0]['inputs'].shape[1:]) for _ in range(6)}
        assert (len(sizes) > 1) == ('3x' in name)
        assert max(sizes) <= 800


def test_layer_wise_decay():
    pytest.importorskip('mmpretrain')
    cfg, model, _ = build_detector('mask_rcnn_dsnet_t_coco', (64, 64))
    cfg.optim_wrapper.constructor = 'dsnet_mm.LayerDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    scales = {group['param_name']: group['lr_scale'] for group in groups}
    assert scales['neck.lateral_convs.0.0.conv.weight'] == 1
    assert scales['backbone.stages.3.0.proj_out.weight'] == 0.5
    assert scales['backbone.patch_embeds.0.projection.weight'] == 0.5**10
    assert {g['weight_decay'] for g in groups if '.norm' in g['param_name']} == {0.0}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group by itself."""
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_two_steps_of_distributed_training(process_group: None):
    """DDP raises at the second step if a parameter had no gradient in the first."""
    cfg, model, data = build_detector('mask_rcnn_dsnet_t_coco', (64, 64), (64, 64))
    model = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for _ in range(2):
        losses = model.train_step(data, optim_wrapper)
        assert all(value.isfinite() for value in losses.values())


def test_sync_bn_takes_the_place_of_every_batch_norm():
    """As ``sync_bn='torch'`` of the COCO configurations does.

    PyTorch's SyncBatchNorm refuses to run on the CPU, so this only tests that
    it is everywhere, under the same names, and is taken out again.
    """
    cfg, model, _ = build_detector('retinanet_dsnet_t_coco', (64, 64))
    assert cfg.sync_bn == 'torch'
    image = torch.randn(1, 3, 64, 64)
    expected = model.eval().extract_feat(image)
    names = list(model.state_dict())
    norms = [k for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(name.startswith('neck') for name in norms)

    synced = convert_sync_batchnorm(model, cfg.sync_bn)
    for name in norms:
        assert isinstance(synced.get_submodule(name), nn.SyncBatchNorm)
    assert list(synced.state_dict()) == names
    reverted = revert_sync_batchnorm(synced).eval()
    for one, other in zip(reverted.extract_feat(image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

    for part in (cfg.model.backbone, cfg.model.neck):
        modules = list(
            MODELS.build(part | dict(norm_cfg=dict(type='SyncBN'))).modules()
        )
        assert any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)


@pytest.mark.skipif(
    not torch.amp.is_autocast_available('cpu'), reason='no autocast on the CPU'
)
def test_mixed_precision_computes_in_bfloat16():
    """One training step; MMCV's NMS, which Mask R-CNN trains with, has none."""
    sizes = (64, 96), (64, 96)
    _, model, data = build_detector('retinanet_dsnet_t_coco', *sizes, drop_path_rate=0)
    data = model.data_preprocessor(data, training=True)
    losses, norms = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled):
            dtype = torch.bfloat16 if enabled else torch.float32
            features = model.backbone(data['inputs'])
            assert {x.dtype for x in features} == {dtype}
            assert {x.dtype for x in model.neck(features)} == {dtype}
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        assert loss.dtype == torch.float32
        loss.backward()
        assert {param.grad.dtype for param in model.parameters()} == {torch.float32}
        losses.append(loss.item())
        norms.append(sum(param.grad.norm() ** 2 for param in model.parameters()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert float(norms[1]) == pytest.approx(float(norms[0]), rel=0.05)


# --- Classifiers ------------------------------------------------------------------


@pytest.mark.parametrize('name', ['dsnet-tiny_8xb128_in1k', *SMALL_CLASSIFICATION])
def test_classification(name: str, tmp_path: Path):
    pytest.importorskip('mmpretrain')
    cfg = deepcopy(load(name))
    init_default_scope('mmpretrain')
    noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
    (tmp_path / 'class').mkdir()
    cv2.imwrite(str(tmp_path / 'class' / 'image.jpg'), noise)
    samples = []
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        # The ImageNet data set insists on a thousand folders.
        pipeline = loader.dataset.pipeline
        dataset = dict(type='CustomDataset', data_prefix=str(tmp_path))
        samples.append(DATASETS.build(dict(dataset, pipeline=pipeline))[0])
    if 'in1k' in name:
        assert samples[0]['inputs'].shape == samples[1]['inputs'].shape == (3, 224, 224)

    torch.manual_seed(0)
    preprocessor = dict(type='ClsDataPreprocessor', **cfg.get('data_preprocessor', {}))
    # Mixup and CutMix come with train_cfg, and need no more than two images.
    model = MODELS.build(dict(data_preprocessor=preprocessor) | cfg.model)
    model.init_weights()
    first = samples[0]
    data = dict(
        inputs=[first['inputs'], first['inputs'].flip(2)],
        data_samples=[first['data_samples'], first['data_samples'].clone()],
    )
    cfg.optim_wrapper.setdefault('type', 'OptimWrapper')
    train(model.train(), data, cfg)
    with torch.no_grad():
        (prediction,) = model.eval().test_step({k: [v] for k, v in samples[1].items()})
    assert prediction.pred_score.shape == (cfg.model.head.num_classes,)
    assert float(prediction.pred_score.sum()) == pytest.approx(1, abs=1e-4)

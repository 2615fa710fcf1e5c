"""Every configuration is built and does one training step and one inference."""

from collections.abc import Iterator
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

from .conftest import write_coco

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'dsnet'
DETECTION = sorted(p.name for p in CONFIGS.glob('*.py') if p.name.endswith('_coco.py'))
CLASSIFICATION = sorted(CONFIGS.glob('*_in1k.py'), key=lambda p: p.name)


def trained(model, data: dict, cfg: Config) -> dict[str, float]:
    """One training step as MMEngine does it.

    Every loss is finite and every parameter has a gradient: DDP stops at the
    second step if one has none.
    """
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    without = {name for name, param in model.named_parameters() if param.requires_grad}
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(
                lambda _, name=name: without.discard(name)
            )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = {k: v.item() for k, v in model.train_step(data, optim_wrapper).items()}
    assert all(np.isfinite(value) for value in losses.values()), losses
    assert not without
    moved = sum(
        not torch.equal(v, before[k]) for k, v in model.state_dict().items()
    ) / len(before)
    assert moved > 0.9
    return losses


def test_all_are_listed():
    assert len(DETECTION) == 18
    assert len(CLASSIFICATION) == 3
    others = {p.name for p in CONFIGS.glob('*.py')} - set(DETECTION)
    assert others - {p.name for p in CLASSIFICATION} == {
        'dsnet-demo_scenes.py',
        'dsnet_cifar10.py',
        'mask_rcnn_dsnet_demo_coco8.py',
        'mask_rcnn_dsnet_demo_scenes.py',
        'mask_rcnn_dsnet_nuclei.py',
    }


def load_detector(name: str) -> Config:
    """Loads a configuration, with fewer proposals for training."""
    cfg = Config.fromfile(CONFIGS / name)
    if name.startswith('mask_rcnn'):
        cfg.model.train_cfg.rpn_proposal.max_per_img = 50
        cfg.model.train_cfg.rcnn.sampler.num = 32
    init_default_scope('mmdet')
    return cfg


@pytest.mark.parametrize('name', DETECTION)
def test_detection(name):
    testing = pytest.importorskip('mmdet.testing')
    pytest.importorskip('mmcv._ext')
    cfg = load_detector(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    data = testing.demo_mm_inputs(
        2, [[3, 96, 128], [3, 64, 96]], num_classes=80, with_mask=model.with_mask
    )
    losses = trained(model.train(), data, cfg)
    assert ('loss_mask' in losses) == name.startswith('mask_rcnn')
    levels = model.extract_feat(torch.zeros(1, 3, 128, 160))
    strides = [128 // level.shape[2] for level in levels]
    head = model.rpn_head if name.startswith('mask_rcnn') else model.bbox_head
    assert strides == [stride[0] for stride in head.prior_generator.strides]
    for sample in model.eval().test_step(data):
        assert sample.pred_instances.bboxes.isfinite().all()


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn_dsnet_demo_scenes.py',
        'mask_rcnn_dsnet_demo_coco8.py',
        'mask_rcnn_dsnet_nuclei.py',
    ],
)
def test_small_detection(name):
    testing = pytest.importorskip('mmdet.testing')
    pytest.importorskip('mmcv._ext')
    cfg = Config.fromfile(CONFIGS / name)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    data = testing.demo_mm_inputs(2, [[3, 128, 128]] * 2, num_classes=4, with_mask=True)
    for sample in data['data_samples']:
        sample.gt_instances.labels %= cfg.model.roi_head.bbox_head.num_classes
    assert 'loss_mask' in trained(model.train(), data, cfg)
    model.eval().test_step(data)


@pytest.mark.parametrize('name', ['dsnet-demo_scenes.py', 'dsnet_cifar10.py'])
def test_small_classification(name):
    pytest.importorskip('mmpretrain')
    from mmpretrain.structures import DataSample

    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    data = dict(
        inputs=torch.randint(0, 256, (4, 3, 64, 64)),
        data_samples=[DataSample().set_gt_label(i) for i in range(4)],
    )
    cfg.optim_wrapper.setdefault('type', 'OptimWrapper')
    trained(model.train(), data, cfg)
    assert len(model.eval().test_step(data)) == 4


def test_detection_pipelines(tmp_path):
    """1x and 3x read COCO's own layout."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    write_coco(tmp_path, 'train', 4)
    for name in ('mask_rcnn_dsnet_s_coco.py', 'mask_rcnn_dsnet_s_3x_coco.py'):
        dataset = Config.fromfile(CONFIGS / name).train_dataloader.dataset
        dataset.data_root = str(tmp_path)
        dataset.metainfo = dict(classes=('square', 'disc'))
        sizes = {min(DATASETS.build(dataset)[0]['inputs'].shape[1:]) for _ in range(8)}
        assert (len(sizes) > 1) == ('3x' in name)
        assert max(sizes) <= 800


@pytest.mark.parametrize('path', CLASSIFICATION, ids=lambda p: p.name)
def test_classification(path, tmp_path):
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    for split in ('train', 'val'):
        folder = tmp_path / split / 'n01440764'
        folder.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
        cv2.imwrite(str(folder / 'image.jpg'), noise)
    samples = []
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        # The ImageNet data set insists on a thousand folders.
        dataset = dict(
            type='CustomDataset',
            data_root=str(tmp_path),
            data_prefix=loader.dataset.split,
            pipeline=loader.dataset.pipeline,
        )
        samples.append(DATASETS.build(dataset)[0])
        assert samples[-1]['inputs'].shape == (3, 224, 224)

    torch.manual_seed(0)
    preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    # Mixup and CutMix come with train_cfg, and need no more than two images.
    model = MODELS.build(cfg.model | dict(data_preprocessor=preprocessor))
    model.init_weights()
    data = dict(
        inputs=[samples[0]['inputs'], samples[0]['inputs'].flip(2)],
        data_samples=[samples[0]['data_samples'], samples[0]['data_samples'].clone()],
    )
    cfg.optim_wrapper.setdefault('type', 'OptimWrapper')
    trained(model.train(), data, cfg)
    (prediction,) = model.eval().test_step(
        dict(inputs=[samples[1]['inputs']], data_samples=[samples[1]['data_samples']])
    )
    assert prediction.pred_score.shape == (1000,)
    assert float(prediction.pred_score.sum()) == pytest.approx(1, abs=1e-4)


def test_layer_wise_decay():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(CONFIGS / 'mask_rcnn_dsnet_t_coco.py')
    cfg.merge_from_dict(
        {
            'optim_wrapper.constructor': 'dsnet_mm.LayerDecayOptimWrapperConstructor',
            'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.5,
        }
    )
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    scales = {group['param_name']: group['lr_scale'] for group in groups}
    last = 'backbone.stages.3.0.proj_out.weight'
    assert scales['neck.lateral_convs.0.0.conv.weight'] == 1
    assert scales[last] == 0.5
    assert scales['backbone.patch_embeds.0.projection.weight'] == 0.5**10
    assert {g['weight_decay'] for g in groups if '.norm' in g['param_name']} == {0.0}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that is a group by itself."""
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn_dsnet_t_coco.py',
        'mask_rcnn_dsnet_t_fpn_coco.py',
        'retinanet_dsnet_t_coco.py',
        'retinanet_dsnet_t_fpn_coco.py',
    ],
)
def test_two_steps_of_distributed_training(name: str, process_group: None) -> None:
    """DDP raises at the second step if a parameter had no gradient in the first."""
    testing = pytest.importorskip('mmdet.testing')
    pytest.importorskip('mmcv._ext')
    cfg = load_detector(name)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = testing.demo_mm_inputs(
        2, [[3, 64, 64]] * 2, num_classes=80, with_mask=model.module.with_mask
    )
    for _ in range(2):
        losses = model.train().train_step(data, optim_wrapper)
        assert all(value.isfinite() for value in losses.values())


def test_sync_bn_takes_the_place_of_every_batch_norm() -> None:
    """As ``sync_bn='torch'`` of the COCO configurations does.

    PyTorch's SyncBatchNorm refuses to run on the CPU, so this only tests that
    it is everywhere, under the same names, and is taken out again.
    """
    pytest.importorskip('mmdet')
    cfg = load_detector('retinanet_dsnet_t_coco.py')
    assert cfg.sync_bn == 'torch'
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = model.extract_feat(image)
    names = {k: v.clone() for k, v in model.state_dict().items()}
    norms = [k for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(name.startswith('neck') for name in norms)

    synced = convert_sync_batchnorm(model, cfg.sync_bn)
    for name in norms:
        assert isinstance(synced.get_submodule(name), nn.SyncBatchNorm)
    assert synced.state_dict().keys() == names.keys()
    reverted = revert_sync_batchnorm(synced).eval()
    for one, other in zip(reverted.extract_feat(image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

    backbone = dict(cfg.model.backbone, norm_cfg=dict(type='SyncBN'))
    neck = dict(cfg.model.neck, norm_cfg=dict(type='SyncBN'))
    for part in (backbone, neck):
        modules = list(MODELS.build(part).modules())
        assert any(isinstance(module, nn.SyncBatchNorm) for module in modules)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)


@pytest.mark.skipif(
    not torch.amp.is_autocast_available('cpu'), reason='no autocast on the CPU'
)
def test_mixed_precision_computes_in_bfloat16() -> None:
    """One training step; MMCV's NMS, which Mask R-CNN trains with, has none."""
    testing = pytest.importorskip('mmdet.testing')
    pytest.importorskip('mmcv._ext')
    cfg = load_detector('retinanet_dsnet_t_coco.py')
    cfg.model.backbone.drop_path_rate = 0.0
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    data = testing.demo_mm_inputs(2, [[3, 64, 96]] * 2, num_classes=80)
    data = model.train().data_preprocessor(data, training=True)
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

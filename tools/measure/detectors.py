"""Mask R-CNN in parts: of this package, and those of mmdet with FPN.

Weights are random, so what a detector finds is arbitrary, and with it the work of its
heads. Here all have the same work. Their RPN computes its proposals, and then all get
the same 1,000 boxes, a fifth of them on one of the 7 objects (COCO has 7.3 an image).
So a training step has 512 RoIs, 128 of them with a mask. Each proposal is one detection
of one class, 100 remain, each with a mask in the size of the original image, 3/5 of
that of the input.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from dsnet_mm.models import fuse_for_inference

from .rows import Panel

CONFIGS = dict(
    resnet50='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    swin_t='mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
)
OURS = Path(__file__).resolve().parents[2] / 'configs/dsnet/mask_rcnn_dsnet_s_coco.py'
OBJECTS, PROPOSALS, DETECTIONS = 7, 1000, 100


def draw_proposals(objects: Tensor, height: int, width: int) -> Tensor:
    """Returns the proposals, of shape (N, 4) in pixels.

    A fifth of them are an object, moved by up to 5 % of its sides. The sides of the
    others are a twentieth to a half of those of the image.
    """
    rng = torch.Generator().manual_seed(0)
    sides = 0.05 * 10 ** torch.rand(PROPOSALS, 2, generator=rng)
    places = torch.rand(PROPOSALS, 2, generator=rng)
    corners = places * (1 - sides)
    boxes = torch.cat([corners, corners + sides], 1) * torch.tensor([width, height] * 2)
    near = objects[torch.arange(PROPOSALS // 5) % OBJECTS]
    shift = 0.1 * (places[: len(near)] - 0.5) * (near[:, 2:] - near[:, :2])
    boxes[: len(near)] = near + shift.repeat(1, 2)
    return boxes


def build_detector(key: str, panel: Panel, proposals: Tensor) -> nn.Module:
    """Builds a Mask R-CNN whose heads have the work of the module's docstring."""
    cfg = get_config(CONFIGS[key]) if key in CONFIGS else Config.fromfile(OURS)
    cfg.model.backbone.init_cfg = None
    if key not in CONFIGS:
        cap = panel.cap if key == 'ours' else None
        cfg.model.backbone.max_global_tokens = cfg.model.neck.max_global_tokens = cap
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train(panel.training)
    MMLogger.get_current_instance().setLevel('WARNING')  # or it lists all weights
    model.init_weights()
    model.roi_head.test_cfg.max_per_img = DETECTIONS
    classify = model.roi_head.bbox_head.fc_cls
    classify.weight.data.zero_()
    classify.bias.data = torch.eye(len(classify.bias))[0] * 10
    predict = model.rpn_head.predict_by_feat

    def predict_the_same(*args, **kwargs) -> list[InstanceData]:
        predict(*args, **kwargs)
        scores, labels = torch.ones(PROPOSALS), torch.zeros(PROPOSALS, dtype=torch.long)
        return [InstanceData(bboxes=proposals, scores=scores, labels=labels)]

    model.rpn_head.predict_by_feat = predict_the_same
    if panel.training:
        return model
    return (fuse_conv_bn if key in CONFIGS else fuse_for_inference)(model)


def make_parts(key: str, panel: Panel) -> dict[str, Callable[[], None]]:
    """Returns the calls of the parts of a detector, in their order.

    In a training step the maps between the parts are cut, so that the backward of each
    part is timed with it. There is no optimizer.

    Args:
        key: 'ours', 'uncapped' or a key of ``CONFIGS``.
        panel: Mode and size. The batch is 1, the dtype float32.

    Raises:
        RuntimeError: If a call finds another number of detections than ``DETECTIONS``.
    """
    height, width = panel.size
    shape = (3, height, width)
    samples = demo_mm_inputs(1, shape, [OBJECTS], with_mask=True)['data_samples']
    objects = samples[0].gt_instances
    objects.labels.zero_()  # one class, also that of the RPN
    sizes = dict(batch_input_shape=shape[1:], pad_shape=shape[1:])
    sizes |= dict(
        ori_shape=(height * 3 // 5, width * 3 // 5), scale_factor=(5 / 3,) * 2
    )
    samples[0].set_metainfo(sizes)
    proposals = draw_proposals(objects.bboxes, height, width)
    model = build_detector(key, panel, proposals)
    image, heads = torch.randn(1, *shape), model.roi_head
    kept = {}  # what a part leaves to the next

    def cut(name: str, maps: tuple[Tensor, ...]) -> None:
        leaves = [x.detach().requires_grad_(panel.training) for x in maps]
        kept[name], kept[f'{name} cut'] = maps, leaves

    def backbone() -> None:
        cut('maps', model.backbone(image))

    def neck() -> None:
        cut('levels', model.neck(kept['maps cut']))

    def backward(losses: dict) -> None:
        losses = [x for name, x in losses.items() if 'loss' in name]
        sum(sum(x) if isinstance(x, list) else x for x in losses).backward()

    def rpn() -> None:
        levels = kept['levels cut']
        if panel.training:
            losses, kept['proposals'] = model.rpn_head.loss_and_predict(
                levels, samples, proposal_cfg=model.train_cfg.rpn_proposal
            )
            backward(losses)
        else:
            kept['proposals'] = model.rpn_head.predict(levels, samples, rescale=False)

    def roi() -> None:
        levels, found = kept['levels cut'], kept['proposals']
        if panel.training:
            backward(heads.loss(levels, found, samples))
        elif (n := len(heads.predict(levels, found, samples, True)[0])) != DETECTIONS:
            raise RuntimeError(f'{key} finds {n} objects in place of {DETECTIONS}')

    def back(name: str) -> None:
        maps, leaves = kept[name], kept[f'{name} cut']
        pairs = zip(maps, leaves, strict=True)
        pairs = [(x, leaf.grad) for x, leaf in pairs if x.requires_grad]
        torch.autograd.backward(*zip(*pairs, strict=True))

    def backbone_backward() -> None:
        back('maps')
        model.zero_grad(set_to_none=True)
        kept.clear()

    parts = dict(backbone=backbone, neck=neck, rpn=rpn, roi=roi)
    if not panel.training:
        return {name: torch.inference_mode()(part) for name, part in parts.items()}
    parts['neck backward'] = lambda: back('levels')
    return parts | {'backbone backward': backbone_backward}

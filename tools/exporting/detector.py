"""A detector of mmdet as one graph, from a normalised image to objects and masks.

It computes what mmdet's ``predict`` does for one image, with tensors alone: mmdet's
own code has branches that depend on values, which cannot be exported.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.models import (
    ConvFCBBoxHead,
    FasterRCNN,
    FCNMaskHead,
    MaskRCNN,
    RetinaHead,
    RetinaNet,
    RPNHead,
    Shared2FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

ACCEPTED = {
    'detector': (MaskRCNN, FasterRCNN, RetinaNet),
    'detector.bbox_head': (RetinaHead,),
    'detector.bbox_head.prior_generator': (AnchorGenerator,),
    'detector.bbox_head.bbox_coder': (DeltaXYWHBBoxCoder,),
    'detector.rpn_head': (RPNHead,),
    'detector.rpn_head.prior_generator': (AnchorGenerator,),
    'detector.rpn_head.bbox_coder': (DeltaXYWHBBoxCoder,),
    'detector.roi_head': (StandardRoIHead,),
    'detector.roi_head.bbox_head': (ConvFCBBoxHead, Shared2FCBBoxHead),
    'detector.roi_head.bbox_head.bbox_coder': (DeltaXYWHBBoxCoder,),
    'detector.roi_head.bbox_roi_extractor': (SingleRoIExtractor,),
    'detector.roi_head.mask_roi_extractor': (SingleRoIExtractor,),
    'detector.roi_head.mask_head': (FCNMaskHead,),
}
"""Classes of the parts of a detector."""


class OnnxDetector(nn.Module):
    """A Mask R-CNN, Faster R-CNN or RetinaNet for export.

    Args:
        detector: A detector of mmdet. Its layers, anchors and options are used.

    Attributes:
        compared: Numbers of objects that :meth:`predict` has found.

    The others are those of ``ExportedPart`` in tools/export.py.

    Raises:
        ValueError: If a part or an option of the detector is not accepted.
    """

    batch = 1
    what = 'the whole detector, for one image'

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        _check(detector)
        self.detector = detector.eval()
        self.compared: list[int] = []
        self.names = ['boxes', 'scores', 'labels', 'masks'][: 3 + detector.with_mask]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Finds objects.

        Args:
            image: Normalised image of shape (1, 3, H, W), without padding.

        Returns:
            Boxes (N, 4): left, top, right and bottom in pixels. Scores (N,), the
            highest first. Numbers of the classes (N,). If the detector has masks, their
            probabilities (N, h, w) on a grid over the box.
        """
        detector, size = self.detector, image.shape[-2:]
        maps = detector.extract_feat(_pad(detector, image))
        if 'rpn_head' not in detector._modules:
            return _one_stage(detector.bbox_head, maps, size)
        proposals, _, _ = _one_stage(detector.rpn_head, maps, size)
        head = detector.roi_head
        boxes, scores, labels = _second_stage(head, maps, proposals, size)
        if not detector.with_mask:
            return boxes, scores, labels
        rois = _with_empty(boxes)
        masks = head.mask_head(_align(head.mask_roi_extractor, maps, rois)).sigmoid()
        channels = labels * 0 if head.mask_head.class_agnostic else labels
        return boxes, scores, labels, masks[torch.arange(labels.shape[0]), channels]

    @torch.no_grad()
    def predict(self, image: Tensor) -> list[Tensor]:
        """Returns the same by mmdet's own code, for comparison."""
        detector, size = self.detector, tuple(image.shape[-2:])
        image = _pad(detector, image)
        about = dict(img_shape=size, ori_shape=size, scale_factor=(1, 1))
        about['batch_input_shape'] = tuple(image.shape[-2:])
        (sample,) = detector.predict(image, [DetDataSample(metainfo=about)])
        found = sample.pred_instances
        outs = [found.bboxes, found.scores, found.labels]
        self.compared.append(len(found))
        if detector.with_mask:
            maps, rois = detector.extract_feat(image), F.pad(found.bboxes, (1, 0))
            masks = detector.roi_head._mask_forward(maps, rois)['mask_preds'].sigmoid()
            channels = found.labels * (masks.shape[1] > 1)
            outs.append(masks[torch.arange(len(found)), channels])
        return outs

    @staticmethod
    def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Compares objects, in any order.

        Args:
            found: Boxes, scores, labels and masks.
            expected: Others.

        Returns:
            The largest difference of an object from its nearest counterpart: of the
            score, a probability of the mask, or a side of the box relative to the
            largest one. Another class counts as 1 or more, and objects without a
            counterpart as infinite.
        """
        if not len(found[0]) or not len(expected[0]):
            return 0.0 if len(found[0]) == len(expected[0]) else float('inf')
        scale = expected[0].abs().max()
        gaps = torch.cdist(
            *(
                torch.cat([boxes / scale, *(x.float().flatten(1) for x in others)], 1)
                for boxes, scores, labels, *masks in (found, expected)
                for others in [[scores[:, None], labels[:, None], *masks]]
            ),
            p=float('inf'),
        )
        return max(gaps.amin(0).max().item(), gaps.amin(1).max().item())


def _check(detector: nn.Module) -> None:
    """Refuses parts and options that the graph does not have."""
    why = 'a whole detector is exported with'
    for name, accepted in ACCEPTED.items():
        part = detector
        for key in name.split('.')[1:]:
            part = getattr(part, key, None)
        if part is not None and type(part) not in accepted:
            raise ValueError(
                f'{name} is a {type(part).__name__}, and {why} '
                f'{" or ".join(x.__name__ for x in accepted)}; a .pt2 file takes '
                f'backbone and neck of any detector'
            )
    one_stage = getattr(detector, 'rpn_head', None) or detector.bbox_head
    for head in (one_stage, getattr(detector, 'roi_head', one_stage)):
        cfg = head.test_cfg
        if cfg.nms.keys() - {'iou_threshold'} != {'type'} or cfg.nms.type != 'nms':
            raise ValueError(
                f"test_cfg has nms={dict(cfg.nms)}, and {why} dict(type='nms', "
                f'iou_threshold=...)'
            )
        if min(cfg.max_per_img, cfg.get('nms_pre', 1)) < 1:
            raise ValueError(
                f'test_cfg is {dict(cfg)}, and {why} max_per_img and nms_pre of 1 or '
                f'more'
            )
    if not one_stage.use_sigmoid_cls:
        raise ValueError(f'the anchors have softmax scores, and {why} sigmoid scores')


def _pad(detector: nn.Module, image: Tensor) -> Tensor:
    """Pads an image as the data preprocessor does."""
    step, value = (
        getattr(detector.data_preprocessor, key)
        for key in ('pad_size_divisor', 'pad_value')
    )
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % step, 0, -height % step), value=value)


def _one_stage(
    head: nn.Module, maps: Sequence[Tensor], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes, scores and labels of RPN or RetinaNet."""
    cfg, is_rpn, classes = head.test_cfg, type(head) is RPNHead, head.cls_out_channels
    scores, deltas = head(maps)
    sizes = [x.shape[-2:] for x in scores]
    anchors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
    best = []
    for level, parts in enumerate(zip(scores, deltas, anchors, strict=True)):
        score = parts[0][0].permute(1, 2, 0).flatten().sigmoid()
        delta = parts[1][0].permute(1, 2, 0).reshape(-1, 4)
        # Filled up, so that there are nms_pre candidates on small maps too.
        top, at = F.pad(score, (0, cfg.nms_pre), value=-1).topk(cfg.nms_pre)
        at = at.clamp(max=score.shape[0] - 1)
        anchor, label = at // classes, at % classes
        group = torch.full_like(label, level) if is_rpn else label
        best.append((parts[2][anchor], delta[anchor], top, label, group))
    anchors, deltas, scores, labels, groups = map(torch.cat, zip(*best, strict=True))
    boxes = head.bbox_coder.decode(anchors, deltas, max_shape=size)
    kept = scores >= 0 if is_rpn else scores > cfg.get('score_thr', 0)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = kept & (sides > cfg.get('min_bbox_size', -1)).all(1)
    at = kept.nonzero().flatten()
    at = at[_nms(boxes[at], scores[at], groups[at], cfg)]
    return boxes[at], scores[at], labels[at]


def _second_stage(
    head: nn.Module, maps: Sequence[Tensor], proposals: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes, scores and labels of the RoI head."""
    rois = _with_empty(proposals)
    scores, deltas = head.bbox_head(_align(head.bbox_roi_extractor, maps, rois))
    scores = scores.softmax(-1)[:-1, :-1]  # without the empty box and background
    boxes = head.bbox_head.bbox_coder.decode(rois, deltas, max_shape=size)[:-1]
    boxes = boxes.unflatten(1, (-1, 4)).expand(-1, scores.shape[1], -1)
    at, labels = (scores > head.test_cfg.score_thr).nonzero().unbind(1)
    boxes, scores = boxes[at, labels], scores[at, labels]
    kept = _nms(boxes, scores, labels, head.test_cfg)
    return boxes[kept], scores[kept], labels[kept]


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: dict) -> Tensor:
    """Non-maximum suppression in each group. Returns the indices, the best first."""
    offset = F.pad(boxes.flatten(), (0, 1)).max() + 1
    apart = boxes + (groups * offset)[:, None]
    return nms(apart, scores, cfg.nms.iou_threshold)[: cfg.max_per_img]


def _with_empty(boxes: Tensor) -> Tensor:
    """Adds an empty box, as layers cannot reshape the features of none at all."""
    return F.pad(boxes, (0, 0, 0, 1))


def _align(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Returns the features (N, C, h, w) of boxes (N, 4), each from the map it fits."""
    rois = F.pad(boxes, (1, 0))  # of image 0
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    order, features = [], []
    for level, layer in enumerate(extractor.roi_layers):
        at = (levels == level).nonzero().flatten()
        options = layer.output_size, layer.spatial_scale, layer.sampling_ratio
        features.append(roi_align(maps[level], rois[at], *options, layer.aligned))
        order.append(at)
    aligned = torch.cat(features)[torch.cat(order).argsort()]
    torch._check(aligned.shape[0] > 0)
    return aligned

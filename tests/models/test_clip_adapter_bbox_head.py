"""A box head with a class matrix: cosines, files, prototypes, new classes."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox2roi
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from dsnet_mm.checkpoint import load_checkpoint
from dsnet_mm.engine.config import load_config
from dsnet_mm.models import AdaptedDetector
from dsnet_mm.models.heads import CLIPAdapterBBoxHead
from dsnet_mm.models.heads.clip_adapter_bbox_head import class_prototypes

CLASSES = r'.*fc_cls\.(text_features|.*weight)'


@cache
def config(folder: Path) -> Config:
    return load_config(str(folder / 'mask_rcnn.py'), {})


def build(
    folder: Path, classes: int, linear: bool = False, **head: object
) -> nn.Module:
    """A small Mask R-CNN whose masks do not depend on the class."""
    options = {
        'model.roi_head.bbox_head.num_classes': classes,
        'model.roi_head.bbox_head.reg_class_agnostic': True,
        'model.roi_head.mask_head.num_classes': classes,
        'model.roi_head.mask_head.class_agnostic': True,
        'model.train_cfg.rpn_proposal.max_per_img': 50,
        'model.train_cfg.rcnn.sampler.num': 16,
        'model.test_cfg.rcnn.score_thr': 0.0,
    }
    if not linear:
        kind = dict(type='dsnet_mm.CLIPAdapterBBoxHead', num_shared_fcs=2, **head)
        options |= {f'model.roi_head.bbox_head.{k}': v for k, v in kind.items()}
    cfg = deepcopy(config(folder))
    cfg.merge_from_dict(options)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


def batch(classes: int = 2) -> dict:
    torch.manual_seed(3)
    data = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=classes, with_mask=True)
    for i, sample in enumerate(data['data_samples']):
        sample.gt_instances.labels.copy_(
            torch.arange(len(sample.gt_instances)).add(i) % classes
        )
    return data


def test_logits_are_cosines(folder: Path) -> None:
    head = build(folder, 2).roi_head.bbox_head.double()
    assert isinstance(head, CLIPAdapterBBoxHead)
    regions = torch.randn(5, 16, 7, 7, dtype=torch.float64)
    (down, _, up), w = head.fc_cls.visual_adapter, head.fc_cls.text_features
    assert w.shape == (3, 16), 'with the background'
    for alpha in (0.2, 0.5):
        head.fc_cls.options['alpha'] = alpha
        f = regions.flatten(1)
        for fc in head.shared_fcs:
            f = (f @ fc.weight.T + fc.bias).relu()
        f = alpha * (f @ down.weight.T).relu() @ up.weight.T + (1 - alpha) * f
        cosines = (f / f.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1)[:, None]).T
        logits, boxes = head(regions)
        assert (logits - 20 * cosines).abs().max() < 1e-12
        assert boxes.shape == (5, 4)
        nn.init.normal_(up.weight)  # 0 at first


def test_it_learns(folder: Path) -> None:
    model = build(folder, 2).train()
    model.init_weights()
    up = model.roi_head.bbox_head.fc_cls.visual_adapter[2]
    assert not up.weight.any(), 'the adapter starts as it was built'
    before = deepcopy(model.roi_head.bbox_head.fc_cls.state_dict())
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        losses = model.train_step(batch(), optimizer)
    assert losses['loss_cls'] > 0
    after = model.roi_head.bbox_head.fc_cls.state_dict()
    assert [k for k in after if torch.equal(before[k], after[k])] == ['logit_scale']


@pytest.mark.parametrize('linear', [False, True], ids=['cosine', 'linear'])
def test_new_classes(folder: Path, tmp_path: Path, linear: bool) -> None:
    """A detector of one class gets two more, from their boxes."""
    base = build(folder, 1, linear)
    path = str(tmp_path / 'base.pth')
    torch.save(dict(state_dict=base.state_dict()), path)
    detector = build(folder, 3)
    load_checkpoint(detector, path)
    matrix = detector.roi_head.bbox_head.fc_cls.text_features
    old = [] if linear else [0, 3]
    for row, given in zip(old, (0, 1), strict=False):
        theirs = base.roi_head.bbox_head.fc_cls.text_features
        assert torch.equal(matrix[row], theirs[given])
    new = [row for row in range(4) if row not in old]
    assert not matrix[new].any()

    state = deepcopy(detector.state_dict())
    model = AdaptedDetector(detector, places=[CLASSES])
    assert model.start([batch(3)]) == (1.0, new)
    rows = class_prototypes(detector, [batch(3)])
    change = model.adapters[0].weights
    changed = change['roi_head/bbox_head/fc_cls/text_features'](
        matrix, model.adapters[0].alpha
    )
    torch.testing.assert_close(changed[new], rows[new])
    assert torch.equal(changed[old], matrix[old])
    assert all(torch.equal(state[k], v) for k, v in detector.state_dict().items())
    # A checkpoint of the same classes is loaded as it is.
    again = build(folder, 3)
    nn.init.constant_(matrix, 0.5)
    again.load_state_dict(detector.state_dict())
    assert (again.roi_head.bbox_head.fc_cls.text_features == 0.5).all()


def test_prototypes(folder: Path) -> None:
    """The mean of the unit features of all boxes of a class."""
    model = build(folder, 2)
    data = model.data_preprocessor(batch(), True)
    head, sums = model.roi_head.bbox_head, torch.zeros(3, 16, dtype=torch.float64)
    with torch.no_grad():
        maps = model.extract_feat(data['inputs'])
        for i, sample in enumerate(data['data_samples']):
            for label, box in zip(
                sample.gt_instances.labels, sample.gt_instances.bboxes, strict=True
            ):
                rois = bbox2roi([box[None] * (j == i) for j in (0, 1)])[i : i + 1]
                f = model.roi_head.bbox_roi_extractor(maps[:4], rois).flatten(1)
                for fc in head.shared_fcs:
                    f = fc(f).relu()
                sums[label] += F.normalize(f[0].double(), dim=0)
    rows = class_prototypes(model, [batch()])
    assert (rows[:2] - F.normalize(sums, dim=1)[:2]).abs().max() < 1e-5
    assert rows.norm(dim=1).sub(1).abs().max() < 1e-5, 'the background too'


def test_text_features(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / 'text.safetensors'
    matrix = torch.randn(2, 16)
    safetensors.torch.save_file(dict(text_features=matrix), path)
    base = build(folder, 1)
    given = build(folder, 2, text_features=str(path))
    fc_cls = given.roi_head.bbox_head.fc_cls
    assert torch.equal(fc_cls.text_features[:2], matrix)
    given.load_state_dict(base.state_dict())
    assert torch.equal(fc_cls.text_features[:2], matrix), 'not those of the checkpoint'
    theirs = base.roi_head.bbox_head.fc_cls.text_features
    assert torch.equal(fc_cls.text_features[2], theirs[1])
    with pytest.raises(ValueError, match=r'\(3, 16\).*\(2, 16\)'):
        build(folder, 3, text_features=str(path))
    with pytest.raises(FileNotFoundError, match='none'):
        build(folder, 3, text_features='none.safetensors')

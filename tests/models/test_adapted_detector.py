"""Adapters of a frozen detector: what they change, and what they leave alone."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.testing import demo_mm_inputs
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from dsnet_mm.checkpoint import load_checkpoint, write_safetensors
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.hooks import AdaptedDetectorHook
from dsnet_mm.models import AdaptedDetector
from dsnet_mm.models.adapted_detector import box_ap50, colours, identity
from evidence.tables import STAINED
from tests.conftest import trained

ALL = r'.*\.(weight|bias)'
LAST = r'.*\.(fc_cls|fc_reg|conv_logits)\.(weight|bias)'


@pytest.fixture(scope='module')
def detector(folder: Path) -> nn.Module:
    """A small Mask R-CNN with group norms in the backbone and batch norms behind it."""
    options = {
        'model.backbone.norm_cfg': dict(type='GN', num_groups=4),
        'model.train_cfg.rpn_proposal.max_per_img': 50,
        'model.train_cfg.rcnn.sampler.num': 16,
        'model.test_cfg.rpn.max_per_img': 20,
        'model.test_cfg.rcnn.score_thr': 0.0,
    }
    cfg = load_config(str(folder / 'mask_rcnn.py'), options)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return trained(model).eval()


@pytest.fixture
def copied(detector: nn.Module) -> nn.Module:
    return deepcopy(detector)


def batch() -> dict:
    torch.manual_seed(3)
    return demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=2, with_mask=True)


def found(model: nn.Module) -> list[Tensor]:
    """Returns what a detector finds in the images of a batch."""
    with torch.no_grad():
        samples = model.test_step(batch())
    objects = [sample.pred_instances for sample in samples]
    assert len(objects[0]) > 0
    return [x for o in objects for x in (o.bboxes, o.scores, o.labels, o.masks)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def disturb(model: AdaptedDetector) -> AdaptedDetector:
    """Gives the adapters weights as after a training."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


PLACES = {
    'norms': ['norms'],
    'lora': ['lora'],
    'last': [LAST],
    'many': ['norms', 'lora'],
}


@pytest.mark.parametrize('places', PLACES.values(), ids=PLACES)
def test_identity_at_first_and_when_off(copied: nn.Module, places: list[str]) -> None:
    frozen = found(copied)
    state = deepcopy(copied.state_dict())
    model = AdaptedDetector(copied, places=places).eval()
    assert same(found(model), frozen)
    disturb(model)
    adapted = found(model)
    assert not same(adapted, frozen)
    model.adapters[0].alpha.fill_(0)
    assert same(found(model), frozen)
    model.used = None
    assert same(found(model), frozen)
    assert all(torch.equal(state[k], v) for k, v in copied.state_dict().items())
    model.adapters[0].alpha.fill_(1)
    assert same(found(model.merge()), adapted)


def test_training_changes_adapters_only(copied: nn.Module) -> None:
    state = deepcopy(copied.state_dict())
    model = AdaptedDetector(copied, places=['norms', 'lora']).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = [*model.parameters()]
    optimizer = OptimWrapper(torch.optim.AdamW(own, lr=1e-2))
    for _ in range(2):  # factors of what is 0 have no gradient in the first step
        model.train_step(batch(), optimizer)
    assert all(torch.equal(state[k], v) for k, v in copied.state_dict().items())
    assert all(p.grad is None for p in copied.parameters())
    after = model.state_dict()
    assert {k for k in after if torch.equal(before[k], after[k])} == {
        f'adapters.0.{name}'
        for name in ('alpha', 'detector', 'domain', 'detector_domain')
    }
    assert copied.training and not copied.backbone.stages[0].training
    assert 'detector' not in dict(model.named_children())


def test_gradients_are_those_of_the_weights(copied: nn.Module) -> None:
    """Also where norms are computed again in the backward, after the forward's end."""
    model = disturb(AdaptedDetector(deepcopy(copied), places=[ALL], alpha=1.0))
    weights = model.adapters[0].weights
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            change = weights[name.replace('.', '/')].up
            parameter.add_(change.view_as(parameter))
    copied.eval()
    for net in (copied, model.train()):
        torch.manual_seed(5)
        data = net.data_preprocessor(batch(), True)
        sum(net.parse_losses(net(**data, mode='loss'))[:1]).backward()
    for name, parameter in copied.named_parameters():
        got = weights[name.replace('.', '/')].up.grad.view_as(parameter)
        torch.testing.assert_close(got, parameter.grad, msg=name)


def write(model: AdaptedDetector, path: Path) -> Path:
    """Writes an adapter as the hook does."""
    options = model.adapters[0].options
    about = dict(options=options, class_names=['square', 'disc'])
    write_safetensors(path, model.state_dict(), dict(adapter=json.dumps(about)))
    return path


def test_files(copied: nn.Module, tmp_path: Path) -> None:
    frozen = found(copied)
    model = disturb(AdaptedDetector(copied, places=['norms']))
    adapter = model.adapters[0].half().float()  # as the file has it
    adapter.alpha.fill_(0.25)
    path = write(model, tmp_path / 'adapter.safetensors')
    assert path.stat().st_size < 50_000
    again = AdaptedDetector.from_files(copied, [path], False, ['square', 'disc'])
    assert same(found(again), found(model.eval()))
    given = AdaptedDetector(copied, places=['norms'], alpha=0.0).eval()
    load_checkpoint(given, str(path))
    assert same(found(given), frozen), 'a given alpha replaces that of the file'

    def refused(fact: str, detector: nn.Module, files: list, *args: object) -> None:
        with pytest.raises(ValueError, match=fact) as error:
            AdaptedDetector.from_files(detector, files, *args)
        assert '\n' not in str(error.value)

    refused('adapter.safetensors', copied, [path], False, ['nucleus'])
    refused('nucleus', copied, [path], False, ['nucleus'])
    refused('2 adapters', copied, [path, path])
    refused('base', copied, [path], True)
    model.adapters[0].options |= dict(option=1)
    refused('another version', copied, [write(model, tmp_path / 'new.safetensors')])
    del model.adapters[0].options['option']
    other = deepcopy(copied)
    other.backbone.norm0.weight.data[0] += 1e-6
    refused(bytes(identity(other).tolist()).hex()[:12], other, [path])
    plain = tmp_path / 'plain.safetensors'
    write_safetensors(plain, copied.state_dict(), {})
    refused('plain.safetensors', copied, [plain])
    with pytest.raises(FileNotFoundError, match='none'):
        AdaptedDetector.from_files(copied, [tmp_path / 'none.safetensors'], False)

    # By image: the frozen detector for dark images, the adapter for bright ones.
    data = batch()
    data['inputs'] = [torch.full_like(x, i * 200) for i, x in enumerate(data['inputs'])]
    adapter.domain.copy_(colours(data['inputs'][1]))
    adapter.detector_domain.fill_(0.01)
    write(model, path)
    auto = AdaptedDetector.from_files(copied, [path], True)
    assert [auto.choose(x) for x in data['inputs']] == [None, 0]
    auto.test_step(data)
    assert auto.used == 0, 'as in training'
    dark = {k: v[:1] for k, v in data.items()}
    (ours,), (theirs,) = auto.test_step(dark), copied.test_step(dark)
    assert torch.equal(ours.pred_instances.scores, theirs.pred_instances.scores)


@pytest.mark.parametrize(
    ('options', 'fact'),
    [
        (dict(places=[]), r'\[\]'),
        (dict(places=['nothing']), 'nothing'),
        (dict(places=['(']), r"'\('"),
        (dict(places=['neck']), "no weight at 'neck'"),
        (dict(rank=0), '0'),
        (dict(alpha=1.5), '1.5'),
        (dict(checkpoint='none.pth'), 'none.pth'),
    ],
    ids=lambda value: ''.join(value) if isinstance(value, dict) else '',
)
def test_bad_options(copied: nn.Module, options: dict, fact: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=fact):
        AdaptedDetector(copied, **options)
    for block in copied.backbone.modules():
        if hasattr(block, 'with_cp'):
            block.with_cp = True
    with pytest.raises(ValueError, match='with_cp'):
        AdaptedDetector(copied)


class Found(nn.Module):
    """A detector that finds given objects."""

    def __init__(self, objects: list[InstanceData]) -> None:
        super().__init__()
        self.objects = objects
        self.data_preprocessor = DetDataPreprocessor()

    def predict(self, inputs: Tensor, data_samples: list, rescale: bool) -> list:
        assert not rescale
        for sample, objects in zip(data_samples, self.objects, strict=True):
            sample.pred_instances = objects
        return data_samples


@pytest.mark.parametrize('seed', range(3))
def test_ap50_is_that_of_coco(seed: int) -> None:
    """If no two boxes overlap, and up to the 101 points at which COCO reads recall."""
    data, rng = batch(), np.random.default_rng(seed)
    objects, known, found = [], [], []
    for image, sample in enumerate(data['data_samples']):
        n = 40
        corners = 40.0 * np.stack(np.divmod(np.arange(n), 8), 1)
        true = np.hstack([corners, corners + rng.uniform(12, 24, (n, 2))])
        boxes = true + rng.uniform(-5, 5, (n, 4))
        labels, scores = rng.integers(0, 2, n), rng.uniform(0, 1, n)
        guess = np.where(rng.uniform(0, 1, n) < 0.2, 2, labels)
        for k in range(n):
            for out, x, label in ((known, true, labels), (found, boxes, guess)):
                box = [*x[k, :2], *(x[k, 2:] - x[k, :2])]
                out.append(dict(image_id=image, category_id=label[k], bbox=box))
            found[-1]['score'] = scores[k]
            known[-1] |= dict(id=len(known), iscrowd=0, area=1)
        truth = dict(bboxes=torch.tensor(true), labels=torch.tensor(labels))
        sample.gt_instances = InstanceData(**truth)
        numbers = dict(bboxes=boxes, scores=scores, labels=guess)
        tensors = {name: torch.tensor(x) for name, x in numbers.items()}
        objects.append(InstanceData(**tensors))
    coco, kinds = COCO(), [dict(id=i) for i in range(3)]
    coco.dataset = dict(images=[dict(id=0), dict(id=1)], annotations=known)
    coco.dataset['categories'] = kinds
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(found), 'bbox')
    judge.params.iouThrs = np.array([0.5])
    judge.evaluate()
    judge.accumulate()
    expected = judge.eval['precision'][0, :, :2, 0, -1].mean()
    assert box_ap50(Found(objects), [data]) == pytest.approx(expected, abs=0.01)
    assert 0.2 < expected < 0.8


def test_alpha_is_small_where_the_detector_is_right(copied: nn.Module) -> None:
    data = batch()
    true = [sample.gt_instances for sample in data['data_samples']]
    right = [InstanceData(**dict(x.items()), scores=torch.ones(len(x))) for x in true]
    nothing = [x[:0] for x in right]
    model = AdaptedDetector(copied)
    for objects, alpha in ((right, 0.0), (nothing, 1.0)):
        model.__dict__['detector'] = Found(objects)
        assert model.start([data]) == (pytest.approx(alpha), [])
    model = AdaptedDetector(copied, alpha=0.125)
    assert model.start([data]) == (0.125, [])
    for sample in data['data_samples']:  # a training without Resize has none
        del sample.scale_factor
    alpha, _ = AdaptedDetector(copied).start([data])
    assert alpha == pytest.approx((1 - box_ap50(copied, [data])) ** 2)


def test_changes_count_whole_in_training(copied: nn.Module) -> None:
    """Otherwise the optimizer would make up for a small alpha."""

    def loss(model: nn.Module) -> float:
        torch.manual_seed(5)
        data = model.data_preprocessor(batch(), True)
        return model.parse_losses(model(**data, mode='loss'))[0].item()

    model = disturb(AdaptedDetector(copied, alpha=0.25)).train()
    whole = loss(model)
    frozen = loss(copied.train(False))
    model.adapters[0].alpha.fill_(1)
    copied = model.merge()
    assert whole == pytest.approx(loss(copied), rel=1e-5)
    assert abs(whole - frozen) > 1e-3


def test_images_are_prepared_as_the_configuration_says(folder: Path) -> None:
    """The preprocessor may stand beside the model, from where MMEngine passes it."""
    cfg = load_config(str(folder / 'mask_rcnn.py'), {}).model
    beside = cfg.pop('data_preprocessor')
    init_default_scope('mmdet')
    model = AdaptedDetector(cfg, data_preprocessor=beside)
    mean = model.detector.data_preprocessor.mean.flatten().tolist()
    assert mean == pytest.approx(beside['mean'])
    own = dict(beside, mean=[1.0, 2.0, 3.0])
    model = AdaptedDetector(dict(cfg, data_preprocessor=own), data_preprocessor=beside)
    mean = model.detector.data_preprocessor.mean.flatten().tolist()
    assert mean == own['mean']


def test_hook_takes_an_adapted_detector(copied: nn.Module) -> None:
    runner = SimpleNamespace(iter=0, model=copied, train_dataloader=MagicMock())
    with pytest.raises(ValueError, match='MaskRCNN'):
        AdaptedDetectorHook().before_train(runner)


def test_places_of_the_table() -> None:
    """Those of docs/few_shot_detection.md fit the detector of the nuclei."""
    options = load_config('mask_rcnn_dsnet_stained', {}).model
    init_default_scope('mmdet')
    detector = MODELS.build(options.detector)
    sizes = {}
    for name, (_, _, choices) in STAINED.items():
        places = choices.get('model.places', options.places)
        model = AdaptedDetector(detector, places=places)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes['full'] == sum(p.numel() for p in detector.parameters())
    assert len({*sizes.values()}) == len(sizes)
    assert sizes['lora'] < sizes['full'] / 10

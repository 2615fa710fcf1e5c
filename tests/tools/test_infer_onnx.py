"""Whole detectors as ONNX files, and what runs them without PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from mmcv.transforms import CenterCrop, Resize
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.datasets import ResizeEdge
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from dsnet_mm import infer
from exporting.detector import OnnxDetector
from exporting.metadata import KEY, describe
from tests.conftest import TOOLS, tool, trained

for library in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(library, reason='an optional library')

import onnxruntime  # noqa: E402

from infer_onnx import Model, main, paste, prepare, to_rle  # noqa: E402

# A block of DS-Net takes a second to export, so the backbone has two layers.
SMALL = """
_base_ = '{base}.py'
model = dict(backbone=dict(_delete_=True, type='TwoLayers'), {options})
load = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', {resize}),
    dict(type='PackDetInputs'),
]
test_dataloader = dict(dataset=dict(pipeline=load))
"""
LEVELS = 'roi_layer=dict(sampling_ratio=1), featmap_strides=[8, 16]'
OPTIONS = dict(
    mask_rcnn=f"""
    neck=None,
    rpn_head=dict(anchor_generator=dict(strides=[8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict({LEVELS}), mask_roi_extractor=dict({LEVELS}),
        mask_head=dict(norm_cfg=dict(type='GN', num_groups=4)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=60, max_per_img=40, min_bbox_size=3),
        rcnn=dict(score_thr=THRESHOLD, max_per_img=20),
    ),""",
    retinanet="""
    neck=None, bbox_head=dict(anchor_generator=dict(strides=[8, 16])),
    test_cfg=dict(nms_pre=60, score_thr=THRESHOLD, max_per_img=20),""",
)
RESIZE = dict(mask_rcnn='scale_factor=2.0', retinanet='scale=(96, 64), keep_ratio=True')


@MODELS.register_module()
class TwoLayers(nn.Module):
    """Maps of strides 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.second = nn.Conv2d(16, 16, 2, 2, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x).relu()
        return [first, self.second(first).relu()]


class Exported:
    """A detector with random weights and its file.

    Its least score is a little above what it finds in an image without contrast.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.config, self.weights = folder / f'small_{kind}.py', folder / f'{kind}.pth'
        self.out = folder / f'{kind}.onnx'
        text = SMALL.format(base=kind, options=OPTIONS[kind], resize=RESIZE[kind])
        self.config.write_text(text.replace('THRESHOLD', '0.0'))
        init_default_scope('mmdet')
        torch.manual_seed(1)
        self.model = trained(MODELS.build(Config.fromfile(self.config).model)).eval()
        for name, values in self.model.named_parameters():
            if 'cls.weight' in name or 'logits.weight' in name:
                values.data *= 16 if 'roi_head' in name else 4  # far apart
            if name == 'bbox_head.retina_cls.bias':
                values.data.zero_()
        torch.save(dict(state_dict=self.model.state_dict()), self.weights)
        found = OnnxDetector(self.model).predict(self.blank)
        threshold = found[1].max().item() + 0.01
        self.config.write_text(text.replace('THRESHOLD', f'{threshold}'))
        head = getattr(self.model, 'roi_head', None) or self.model.bbox_head
        head.test_cfg.score_thr = threshold
        self.net = OnnxDetector(self.model)
        self.tool = tool('export.py')
        self.tool.SIZES = self.tool.SIZES[1:2]
        self.args = [str(x) for x in (self.config, self.weights, self.out)]
        self.tool.main([*self.args, '--turns', '1'])
        self.run = self.tool.decode(self.out.read_bytes(), '.onnx')

    blank = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope='module', params=['mask_rcnn', 'retinanet'])
def exported(request: pytest.FixtureRequest, folder: Path) -> Exported:
    return Exported(request.param, folder)


def test_objects_are_those_of_mmdet_at_any_size(exported: Exported) -> None:
    net, total = exported.net, 0
    for size in ((1, 1), (2, 3), (31, 33), (64, 97), (131, 117), (1, 300), (257, 64)):
        torch.manual_seed(sum(size))
        image = torch.randn(1, 3, *size) * 2
        found, expected = exported.run(image), net.predict(image)
        assert len(found[0]) == len(expected[0])
        assert net.difference(found, expected) < 1e-4
        # mmdet's order, apart from equal scores
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
        total += len(found[0])
    assert total > 10
    for outs in (exported.run(exported.blank), net.predict(exported.blank)):
        assert [len(out) for out in outs] == [0] * len(net.names)


def test_nothing_is_written_if_mmdet_finds_something_else(
    exported: Exported, capsys
) -> None:
    tool, out = exported.tool, exported.out.with_name('other.onnx')
    export, encode, predict = tool.export, tool.encode, OnnxDetector.predict
    try:
        tool.export = lambda net, batch: (
            torch.export.export(nn.ReLU(), (torch.ones(1),)),
            1,
        )
        tool.encode = lambda *args: exported.out.read_bytes()
        OnnxDetector.predict = lambda net, image: [x[1:] for x in predict(net, image)]
        with pytest.raises(SystemExit, match='--tolerance'):
            tool.main([*exported.args[:2], str(out)])
    finally:
        tool.export, tool.encode, OnnxDetector.predict = export, encode, predict
    assert not out.exists()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of every kind and of odd sizes."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        grid = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
        return np.asarray(grid.resize(shape[::-1], Image.BICUBIC))

    folder = tmp_path / 'images'
    (folder / 'below').mkdir(parents=True)
    for name, size in (('a', (37, 61)), ('below/b', (90, 50)), ('pixel', (1, 1))):
        Image.fromarray(noise(*size)).save(folder / f'{name}.png')
    Image.fromarray(noise(5, 3000)).save(folder / 'wide.png')
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / 'black.png')
    alpha = np.dstack([noise(40, 44), noise(40, 44)[..., 0]])
    Image.fromarray(alpha, 'RGBA').save(folder / 'alpha.png')
    grey = noise(33, 34)[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / 'grey16.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise(30, 60)).save(folder / 'turned.png', exif=exif)
    return folder


def test_the_same_results_as_tools_infer(
    exported: Exported, images: Path, tmp_path: Path, capsys
) -> None:
    (images / 'bad.jpg').write_bytes(b'no image')
    out, args = tmp_path / 'out', ['--score-thr', '0', '--threads', '1']
    with pytest.raises(SystemExit, match='1'):
        main([str(exported.out), str(images), '--out', str(out), *args])
    printed = capsys.readouterr().out
    assert 'bad.jpg' in printed and '8 of 9' in printed and 'disc' in printed
    info = json.loads((out / 'images.json').read_text())
    assert [x['name'] for x in info['categories']] == ['square', 'disc']
    assert [x['file_name'] for x in info['failed']] == ['bad.jpg']
    names = {x['id']: x for x in info['images']}
    assert set(names) == set(range(1, 9))
    assert all((out / 'images' / x['file_name']).exists() for x in info['images'])
    found = {i: [] for i in names}
    for entry in json.loads((out / 'predictions.json').read_text()):
        found[entry['image_id']].append(entry)
    sizes = {x['file_name']: (x['height'], x['width']) for x in info['images']}
    assert sizes['turned.png'] == (60, 30)

    matched = total = 0
    for i, about in names.items():
        path = images / about['file_name']
        (prediction,) = infer(exported.config, exported.weights, path, score_thr=0.0)
        expected = prediction.to_coco(i)
        assert (prediction.height, prediction.width) == sizes[about['file_name']]
        scores = [[x['score'] for x in some] for some in (found[i], expected)]
        np.testing.assert_allclose(*scores, atol=0.02)
        if about['file_name'] in ('black.png', 'pixel.png', 'wide.png'):
            continue  # without contrast, most boxes have the same score
        for entry in expected:
            total += 1
            matched += any(agree(entry, other) for other in found[i])
    assert total > 10
    assert matched >= 0.95 * total


def agree(entry: dict, other: dict) -> bool:
    """Tells whether two entries of COCO's result format are of the same object."""
    box = max(entry['bbox'][2:])
    if (
        entry['category_id'] != other['category_id']
        or abs(entry['score'] - other['score']) > 0.01
        or np.abs(np.subtract(entry['bbox'], other['bbox'])).max() > 0.02 * box + 0.02
        or ('segmentation' in entry) != ('segmentation' in other)
    ):
        return False
    if 'segmentation' not in entry:
        return True
    masks = [coco_mask.decode(x['segmentation']) for x in (entry, other)]
    return (masks[0] != masks[1]).sum() <= 0.05 * masks[0].sum() + 1


def test_runs_without_the_libraries_of_the_training(
    exported: Exported, images: Path, tmp_path: Path
) -> None:
    packages = 'torch torchvision mmcv mmengine mmdet mmpretrain dsnet_mm pycocotools'
    code = (
        f'import runpy, sys\n'
        f'for name in {packages.split()} + ["cv2", "matplotlib", "rich", "onnx"]:\n'
        f'    sys.modules[name] = None\n'
        f'sys.argv = sys.argv[1:]\n'
        f'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    script = tmp_path / 'infer_onnx.py'  # alone in its folder
    script.write_text((TOOLS / 'infer_onnx.py').read_text())
    args = [script, exported.out, images / 'alpha.png', '--out', tmp_path / 'out']
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'out' / 'predictions.json').read_text())


@pytest.mark.parametrize('density', [0.0, 0.02, 0.5, 0.98, 1.0])
def test_run_lengths_are_those_of_pycocotools(density: float) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (60, 90), (2, 3000)):
        for _ in range(5):
            top, left = rng.integers(0, height), rng.integers(0, width)
            shape = rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)
            whole = np.zeros((height, width), np.uint8, order='F')
            part = rng.random(shape) < density
            whole[top : top + shape[0], left : left + shape[1]] = part
            expected = coco_mask.encode(whole)
            found = to_rle(part, int(left), int(top), height, width)
            assert found['counts'] == expected['counts'].decode()
            assert found['size'] == expected['size']


def test_masks_are_pasted_as_in_mmdet() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(20):
        corner, sides = rng.uniform(-5, 60, 2), rng.uniform(0.3, 50, 2)
        box = np.float32([*corner, *(corner + sides)])
        grid = np.float32(rng.uniform(size=(5, 7)))
        expected, _ = _do_paste_mask(
            torch.tensor(grid)[None, None], torch.tensor(box)[None], 50, 70, False
        )
        pixels, left, top = paste(grid, box, 50, 70, 0.5)
        whole = np.zeros((50, 70), bool)
        height, width = pixels.shape
        whole[top : top + height, left : left + width] = pixels
        near = (expected[0] - 0.5).abs().numpy() < 1e-5
        assert ((whole == (expected[0].numpy() >= 0.5)) | near).all()


@pytest.mark.parametrize('size', [(64, 48), (37, 61), (5, 300), (1, 1), (200, 100)])
def test_images_are_prepared_as_in_the_test_pipelines(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    by_pillow = dict(backend='pillow', interpolation='bicubic')
    for transform, step in (
        (Resize(scale_factor=2.0), dict(kind='factor', size=(2, 2))),
        (Resize((130, 90), keep_ratio=True), dict(kind='fit', size=(130, 90))),
        (Resize((40, 70)), dict(kind='stretch', size=(40, 70))),
        (
            ResizeEdge(32, **by_pillow),
            dict(kind='edge', size=(32, 32), filter='bicubic'),
        ),
        (CenterCrop(31), dict(kind='crop', size=(31, 31))),
    ):
        expected = transform(dict(img=image))['img']
        found = prepare(image, **{'filter': 'opencv', **step})
        assert found.dtype == np.uint8 and found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1, step


@pytest.mark.parametrize(
    ('options', 'fact'),
    [
        ({'bbox_head.type': 'FCOSHead'}, 'FCOSHead'),
        ({'test_cfg.nms.type': 'soft_nms'}, 'soft_nms'),
        ({'test_cfg.max_per_img': -1}, 'max_per_img'),
    ],
)
def test_detectors_that_are_not_exported(
    folder: Path, options: dict, fact: str
) -> None:
    cfg = Config.fromfile(folder / 'retinanet.py')
    cfg.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    if 'bbox_head.type' in options:
        cfg.model.bbox_head = dict(type='FCOSHead', num_classes=2, in_channels=16)
        cfg.model.type = 'FCOS'
        fact = 'FCOS'
    init_default_scope('mmdet')
    with pytest.raises(ValueError, match=f'{fact}.*whole detector'):
        OnnxDetector(MODELS.build(cfg.model))


def test_a_test_pipeline_that_the_tool_does_not_have(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config.fromfile(folder / 'retinanet.py')
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='RandomFlip', prob=0.5))
    init_default_scope('mmdet')
    about = describe(cfg, MODELS.build(cfg.model), [])
    session = MagicMock()
    session.get_modelmeta().custom_metadata_map = {KEY: json.dumps(about)}
    monkeypatch.setattr(
        onnxruntime, 'InferenceSession', lambda *args, **kwargs: session
    )
    with pytest.raises(ValueError, match=r'it\.onnx.*RandomFlip'):
        Model(tmp_path / 'it.onnx')
    session.get_modelmeta().custom_metadata_map = {}
    with pytest.raises(ValueError, match=r'it\.onnx.*tools/export\.py'):
        Model(tmp_path / 'it.onnx')


def test_wrong_arguments(tmp_path: Path, capsys) -> None:
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.onnx').write_text('no model')
    image = tmp_path / 'image.png'
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    for args, facts in (
        ([image, '--out', tmp_path], ['exists', str(tmp_path)]),
        ([tmp_path / 'empty'], ['empty', '.png']),
        ([tmp_path / 'none.jpg'], ['none.jpg']),
        ([image], ['text.onnx']),
        ([image, '--score-thr', '2'], ['--score-thr', '2']),
        ([image, '--threads', '-1'], ['--threads', '-1']),
    ):
        out = [] if '--out' in args else ['--out', tmp_path / 'out']
        with pytest.raises(SystemExit, match='2'):
            main([str(x) for x in (tmp_path / 'text.onnx', *args, *out)])
        said = capsys.readouterr().err.split('error: ')[-1]
        assert all(fact in said for fact in facts), said
    assert not (tmp_path / 'out').exists()

"""An adapter from the training to images: tools/train.py, test.py and infer.py."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import MODELS
from safetensors import safe_open

from dsnet_mm.inference import Predictor
from tests.conftest import COCO, draw, tool
from tests.inference.conftest import SIZE, random_checkpoint

ADAPTED = """
_base_ = 'mask_rcnn.py'
model = dict(
    _delete_=True, type='dsnet_mm.AdaptedDetector', detector={{_base_.model}},
    checkpoint='base.pth', places=['lora', 'norms'],
)
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=1)
custom_hooks = [
    dict(
        type='dsnet_mm.AdaptedDetectorHook',
        base=dict(ann_file='annotations/base.json', data_prefix=dict(img='base/')),
    )
]
"""


@pytest.fixture(scope='module')
def trained(folder: Path) -> Path:
    """The folder after a training of an adapter in ``out``, and with images."""
    random_checkpoint(folder / 'mask_rcnn.py', MODELS, folder / 'base.pth')
    (folder / 'adapted.py').write_text(ADAPTED)
    rng = np.random.default_rng(0)
    coco = folder / 'sets' / 'coco'
    (coco / 'base').mkdir()
    cv2.imwrite(str(coco / 'base' / 'a.png'), np.full((64, 64, 3), 230, np.uint8))
    content = json.loads((coco / 'annotations/instances_train2017.json').read_text())
    content['images'] = [{**content['images'][0], 'file_name': 'a.png'}]
    content['annotations'] = content['annotations'][:1]
    (coco / 'annotations/base.json').write_text(json.dumps(content))
    (folder / 'images').mkdir()
    cv2.imwrite(str(folder / 'images' / 'like_base.png'), 255 - draw(rng, 0)[0])
    cv2.imwrite(str(folder / 'images' / 'like_new.png'), draw(rng, 1)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tool('train.py').main(
            ['adapted.py', '--work-dir=out', '--no-validate', '--cfg-options', COCO]
        )
    return folder


def test_adapter_file(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    with safe_open('out/adapter.safetensors', 'pt') as file:
        about = json.loads(file.metadata()['adapter'])
        assert about['class_names'] == ['square', 'disc']
        assert about['options']['places'] == ['lora', 'norms']
        alpha = float(file.get_tensor('adapters.0.alpha'))
        assert 0.8 < alpha <= 1, 'random weights find nothing, or little'
        assert file.get_tensor('adapters.0.domain')[:3].max() < 0.4
        base = file.get_tensor('adapters.0.detector_domain')
        assert base[:3].float().sub(230 / 255).abs().max() < 1e-3
        assert not base[3:].any()
        assert not any('backbone.' in key for key in file.keys())  # noqa: SIM118
    # The same predictions from the configuration with adapters, and auto ones.
    options = dict(x.split('=') for x in (COCO, SIZE[-2], SIZE[-1]))
    options = {k: v if k == 'data_root' else int(v) for k, v in options.items()}
    adapted = {k.replace('model.', 'model.detector.'): v for k, v in options.items()}
    adapter = 'out/adapter.safetensors'
    detector = 'mask_rcnn.py', 'base.pth'
    scores = {}
    for name, predictor in dict(
        frozen=Predictor(*detector, cfg_options=options, score_thr=0),
        on=Predictor(*detector, cfg_options=options, score_thr=0, adapters=[adapter]),
        fused=Predictor(
            *detector, cfg_options=options, score_thr=0, adapters=[adapter], fuse=True
        ),
        auto=Predictor(
            *detector, cfg_options=options, score_thr=0, adapters=['auto', adapter]
        ),
        config=Predictor('adapted.py', adapter, cfg_options=adapted, score_thr=0),
    ).items():
        found = predictor('images')
        scores[name] = {Path(p.image).stem: p.to_coco(0) for p in found}
    assert scores['on'] == scores['config'] != scores['frozen']
    for ours, theirs in zip(
        *(scores[x]['like_new'] for x in ('fused', 'on')), strict=True
    ):
        assert ours['score'] == pytest.approx(theirs['score'], abs=1e-4)
    assert scores['auto']['like_base'] == scores['frozen']['like_base']
    assert scores['auto']['like_new'] == scores['on']['like_new']


def test_command_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(trained)

    given = ['mask_rcnn.py', 'base.pth', 'images', '--out=found']
    options = ['--cfg-options', COCO, *SIZE]
    with pytest.raises(SystemExit, match='2'):
        tool('infer.py').main([*given, *options, '--adapter', 'auto'])
    assert '0 adapters' in ' '.join(capsys.readouterr().err.split())
    adapter = 'out/adapter.safetensors'
    tool('infer.py').main([*given, *options, '--adapter', 'auto', adapter])
    assert (trained / 'found' / 'predictions.json').is_file()

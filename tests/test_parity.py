"""Against numbers of an independent implementation of the public code."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from .golden import GOLDEN, picture, public_state

REPO = Path(__file__).resolve().parents[1]
CONVERTER = REPO / 'tools' / 'model_converters' / 'dsnet_to_mm.py'


def convert(src: Path, dst: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, CONVERTER, src, dst], capture_output=True, text=True
    )


def classifier(arch: str):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(REPO / f'configs/dsnet/dsnet-{arch}_8xb128_in1k.py')
    init_default_scope('mmpretrain')
    return MODELS.build(cfg.model)


needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason='the golden numbers (../shared/golden) are not here'
)


@needs_golden
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_converted_checkpoint_fits_the_configuration(arch, tmp_path):
    pytest.importorskip('mmpretrain')
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in public_state(arch).items()
    }
    torch.save(dict(model=state, args=Namespace(lr=0.1)), tmp_path / 'public.pth')
    done = convert(tmp_path / 'public.pth', tmp_path / 'mm.pth')
    assert done.returncode == 0, done.stderr
    converted = torch.load(tmp_path / 'mm.pth', weights_only=True)['state_dict']
    classifier(arch).load_state_dict(converted, strict=True)
    kinds = {v.dtype for v in converted.values()}
    assert kinds == {torch.float16, torch.int64}


@needs_golden
def test_tiny_equals_the_public_code(tmp_path):
    pytest.importorskip('mmpretrain')
    torch.save(public_state('tiny'), tmp_path / 'public.pth')
    done = convert(tmp_path / 'public.pth', tmp_path / 'mm.pth')
    assert done.returncode == 0, done.stderr
    model = classifier('tiny').double().eval()
    model.load_state_dict(
        torch.load(tmp_path / 'mm.pth', weights_only=True)['state_dict']
    )
    stages = []
    for stage in model.backbone.stages:
        stage[-1].register_forward_hook(lambda module, args, out: stages.append(out))
    with torch.no_grad():
        logits = model(picture(224, 224))

    expected = np.load(GOLDEN / 'dsnet_tiny_224.npz')
    measured = dict(logits=logits)
    for i, out in enumerate(stages, 1):
        measured[f'stage{i}_corner'] = out[:, :8, :4, :4]
        measured[f'stage{i}_channel_mean'] = out.mean((2, 3))
        measured[f'stage{i}_channel_std'] = out.flatten(2).std(2, correction=0)
    assert set(measured) == set(expected)
    for name, value in measured.items():
        error = np.abs(value.numpy() - expected[name]).max()
        assert error <= 1e-9 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (dict(model={'layer1.0.conv1.weight': torch.zeros(1)}), 'not a tensor of the'),
        (dict(epoch=3), 'holds no state dict'),
        (None, 'No checkpoint at'),
        (b'not a checkpoint', 'cannot be loaded'),
    ],
    ids=['another model', 'no weights', 'no file', 'damaged'],
)
def test_converter_refuses(content, sentence, tmp_path):
    src = tmp_path / 'src.pth'
    if isinstance(content, bytes):
        src.write_bytes(content)
    elif content is not None:
        torch.save(content, src)
    done = convert(src, tmp_path / 'dst.pth')
    assert done.returncode == 2
    assert sentence in ' '.join(done.stderr.split())
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'dst.pth').exists()


def test_converter_overwrites_nothing(tmp_path):
    (tmp_path / 'dst.pth').write_text('mine')
    torch.save({'head.bias': torch.zeros(2)}, tmp_path / 'src.pth')
    done = convert(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert done.returncode == 2
    assert (tmp_path / 'dst.pth').read_text() == 'mine'

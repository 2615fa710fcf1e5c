"""Against golden numbers of an independent implementation of the public code."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet_mm.models import DSNet, fuse_for_inference
from dsnet_mm.models.reference import reference_net

from .golden import golden, picture, public_state

REPO = Path(__file__).resolve().parents[1]
CONVERTER = REPO / 'tools' / 'model_converters' / 'dsnet_to_mm.py'


def convert(src: Path, dst: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, CONVERTER, src, dst], capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def converted(tmp_path_factory) -> dict[str, Tensor]:
    """The state dict of DS-Net-T, converted from the public names."""
    folder = tmp_path_factory.mktemp('converted')
    torch.save(public_state('tiny'), folder / 'public.pth')
    done = convert(folder / 'public.pth', folder / 'mm.pth')
    assert done.returncode == 0, done.stderr
    return torch.load(folder / 'mm.pth', weights_only=True)['state_dict']


def load_backbone(state: dict[str, Tensor]) -> DSNet:
    net = DSNet('tiny').double().eval()
    prefix = 'backbone.'
    net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return net


def logits_of(out: Tensor, state: dict[str, Tensor]) -> Tensor:
    return F.linear(out.mean((2, 3)), state['head.fc.weight'], state['head.fc.bias'])


def assert_equals_golden(measured: dict[str, Tensor]) -> None:
    expected = golden()
    for name, value in measured.items():
        error = (value - expected[name]).abs().max()
        assert error <= 1e-9 * expected[name].abs().max(), name


@pytest.mark.parametrize('fused', [False, True], ids=['network', 'fused'])
def test_tiny_equals_the_public_code(fused, converted):
    net = load_backbone(converted)
    if fused:
        net = fuse_for_inference(net)
    maps = []
    for stage in net.stages:
        stage[-1].register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.no_grad():
        (out,) = net(picture(224, 224))
    measured = dict(logits=logits_of(out, converted))
    for i, x in enumerate(maps, 1):
        measured[f'stage{i}_corner'] = x[:, :8, :4, :4]
        measured[f'stage{i}_channel_mean'] = x.mean((2, 3))
        measured[f'stage{i}_channel_std'] = x.flatten(2).std(2, correction=0)
    assert set(measured) == set(golden())
    assert_equals_golden(measured)


def test_the_reference_equals_the_public_code(converted):
    with torch.no_grad():
        (out,) = reference_net(load_backbone(converted), picture(224, 224))
    assert_equals_golden(dict(logits=logits_of(out, converted)))


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_converted_checkpoint_fits_the_configuration(arch, tmp_path):
    pytest.importorskip('mmpretrain')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in public_state(arch).items()
    }
    torch.save(dict(model=state, args=Namespace(lr=0.1)), tmp_path / 'public.pth')
    done = convert(tmp_path / 'public.pth', tmp_path / 'mm.pth')
    assert done.returncode == 0, done.stderr
    converted = torch.load(tmp_path / 'mm.pth', weights_only=True)['state_dict']
    cfg = Config.fromfile(REPO / f'configs/dsnet/dsnet-{arch}_8xb128_in1k.py')
    init_default_scope('mmpretrain')
    MODELS.build(cfg.model).load_state_dict(converted, strict=True)
    dtypes = {v.dtype for v in converted.values()}
    assert dtypes == {torch.float16, torch.int64}


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

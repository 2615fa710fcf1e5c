"""Compares DS-Net with golden numbers of the public code.

They come from an independent implementation, see ``tests/data/README.md``.
"""

import io
import os
import pickle
import re
from argparse import Namespace
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsnet_mm.models import DSNet, fuse_for_inference
from dsnet_mm.models.reference import reference_net
from tests.conftest import tool
from tests.models.golden import golden, image, public_state

REPO = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """How a run of the converter ended."""

    returncode: int
    stderr: str


def convert(src: Path, dst: Path, *options: str) -> Done:
    """Runs the converter in this process, which is quicker than in a new one."""
    errors, status = io.StringIO(), 0
    with redirect_stderr(errors):
        try:
            tool('model_converters/dsnet_to_mm.py').main([str(src), str(dst), *options])
        except SystemExit as exit_:
            status = exit_.code
    return Done(status, errors.getvalue())


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
        (out,) = net(image(224, 224))
    measured = dict(logits=logits_of(out, converted))
    for i, x in enumerate(maps, 1):
        measured[f'stage{i}_corner'] = x[:, :8, :4, :4]
        measured[f'stage{i}_channel_mean'] = x.mean((2, 3))
        measured[f'stage{i}_channel_std'] = x.flatten(2).std(2, correction=0)
    assert set(measured) == set(golden())
    assert_equals_golden(measured)
    if not fused:
        with torch.no_grad():
            (out,) = reference_net(net, image(224, 224))
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
def test_converter_raises(content, sentence, tmp_path):
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


# --- PaddleClas, and back ------------------------------------------------------


@cache
def public_tiny() -> dict[str, Tensor]:
    """The state dict of the public code, in float32."""
    return {
        k: v.float() if v.is_floating_point() else v
        for k, v in public_state('tiny').items()
    }


def paddle_state() -> dict[str, np.ndarray]:
    """The state dict of PaddleClas, from its rules and not from the converter's."""
    state = {}
    for key, value in public_tiny().items():
        if key.endswith('num_batches_tracked'):
            continue
        if re.search(r'(channel_up|cross_channel_up_sa|fuse_\w+|head)\.weight$', key):
            value = value.T
        key = key.replace('running_mean', '_mean').replace('running_var', '_variance')
        state[key] = value.contiguous().numpy()
    return state


def write_paddle(state: dict, path: Path, form: str) -> None:
    """Writes a file as a version of Paddle does."""
    if form == '2.0':
        # With its own names of the parameters, and the oldest pickles of Python 3.
        names = {key: f'parameter_{i}' for i, key in enumerate(state)}
        state = {**state, 'StructuredToParameterName@@': names}
        path.write_bytes(pickle.dumps(state, protocol=2))
    elif form == '2.1':  # pairs of name and array
        state = {key: (f'p_{i}', v) for i, (key, v) in enumerate(state.items())}
        path.write_bytes(pickle.dumps(state, protocol=4))
    else:
        path.write_bytes(pickle.dumps(state, protocol=4))


@pytest.mark.parametrize('form', ['2.0', '2.1', '3.3'])
def test_paddle_equals_the_public_code_and_goes_back(form: str, tmp_path: Path) -> None:
    original = paddle_state()
    write_paddle(original, tmp_path / 'a.pdparams', form)
    done = convert(tmp_path / 'a.pdparams', tmp_path / 'ours.pth')
    assert done.returncode == 0, done.stderr
    torch.save(public_tiny(), tmp_path / 'a.pth')
    done = convert(tmp_path / 'a.pth', tmp_path / 'same.pth')
    assert done.returncode == 0, done.stderr
    ours, same = (
        torch.load(tmp_path / name, weights_only=True)['state_dict']
        for name in ('ours.pth', 'same.pth')
    )
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[key], same[key]) for key in ours)

    done = convert(tmp_path / 'ours.pth', tmp_path / 'back.pdparams', '--reverse')
    assert done.returncode == 0, done.stderr
    back = pickle.loads((tmp_path / 'back.pdparams').read_bytes())
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[key], original[key]) for key in back)


def test_ours_goes_back_to_public_names(converted, tmp_path):
    torch.save(dict(state_dict=converted), tmp_path / 'ours.pth')
    done = convert(tmp_path / 'ours.pth', tmp_path / 'public.pth', '--reverse')
    assert done.returncode == 0, done.stderr
    public = torch.load(tmp_path / 'public.pth', weights_only=True)['model']
    original = public_state('tiny')
    assert public.keys() == original.keys()
    assert all(torch.equal(public[key], original[key]) for key in public)


class Runs:
    """Pickles to a call of a function that leaves a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda s: s.pop('blocks3.2.norm1._mean'), r'1 tensors differ .* blocks, for '),
        (lambda s: s.pop('head.bias'), r'2 tensors differ .* head.fc.bias: missing'),
        (lambda s: s.pop('patch_embed1.proj.bias'), r'it is a part of one'),
        (lambda s: s.update(more=s['head.bias']), "'more' is not a tensor of the"),
        (lambda s: s.update({'head.bias': s['head.bias'][:7]}), 'head.fc.weight'),
        (lambda s: s.update({'head.bias': 'text'}), 'holds no parameters'),
        (lambda s: s.clear(), 'holds no parameters'),
        (lambda s: s.update(more=os.getcwd), 'not safe to load .it names posix.getcwd'),
    ],
)
def test_paddle_files_with_anything_else_are_refused(change, sentence, tmp_path):
    state = paddle_state()
    change(state)
    (tmp_path / 'a.pdparams').write_bytes(pickle.dumps(state))
    done = convert(tmp_path / 'a.pdparams', tmp_path / 'b.pth')
    assert done.returncode == 2
    assert re.search(sentence, ' '.join(done.stderr.split()))


def test_nothing_in_a_paddle_file_is_run(tmp_path):
    state = paddle_state() | dict(more=Runs(tmp_path / 'ran'))
    (tmp_path / 'a.pdparams').write_bytes(pickle.dumps(state))
    done = convert(tmp_path / 'a.pdparams', tmp_path / 'b.pth')
    assert done.returncode == 2
    assert 'it names posix.mkdir' in ' '.join(done.stderr.split())
    assert not (tmp_path / 'ran').exists()


def test_converter_does_not_overwrite_files(tmp_path):
    (tmp_path / 'dst.pth').write_text('mine')
    torch.save({'head.bias': torch.zeros(2)}, tmp_path / 'src.pth')
    done = convert(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert done.returncode == 2
    assert (tmp_path / 'dst.pth').read_text() == 'mine'

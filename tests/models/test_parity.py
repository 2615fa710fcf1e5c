"""Compares DS-Net with golden numbers of the public code.

They come from an independent implementation, see ``tests/data/README.md``.
"""

import io
import os
import pickle
import random
import re
from argparse import Namespace
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

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


def convert(src: Path, dst: Path, *options: str) -> dict[str, Tensor] | None:
    """Runs the converter, and reads the state dict that it writes for PyTorch."""
    tool('model_converters/dsnet_to_mm.py').main([str(src), str(dst), *options])
    if dst.suffix == '.pth':
        checkpoint = torch.load(dst, weights_only=True)
        return checkpoint.get('state_dict') or checkpoint['model']
    return None


def refusal(src: Path, dst: Path) -> str:
    """The sentence with which the converter ends."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit, match='2'):
        convert(src, dst)
    return ' '.join(errors.getvalue().split())


def as_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@pytest.fixture(scope='module')
def converted(tmp_path_factory) -> dict[str, Tensor]:
    """The state dict of DS-Net-T, converted from the public names."""
    folder = tmp_path_factory.mktemp('converted')
    torch.save(public_state('tiny'), folder / 'public.pth')
    return convert(folder / 'public.pth', folder / 'mm.pth')


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
    """In half precision, and beside arguments that a restricted unpickler refuses."""
    pytest.importorskip('mmpretrain')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    state = {k: as_type(v, torch.float16) for k, v in public_state(arch).items()}
    torch.save(dict(model=state, args=Namespace(lr=0.1)), tmp_path / 'public.pth')
    converted = convert(tmp_path / 'public.pth', tmp_path / 'mm.pth')
    cfg = Config.fromfile(REPO / f'configs/dsnet/dsnet-{arch}_8xb128_in1k.py')
    init_default_scope('mmpretrain')
    MODELS.build(cfg.model).load_state_dict(converted, strict=True)
    assert {v.dtype for v in converted.values()} == {torch.float16, torch.int64}


@pytest.mark.parametrize(
    ('content', 'fact'),
    [
        (
            dict(model={'layer1.0.conv1.weight': torch.zeros(1)}),
            'layer1.0.conv1.weight',
        ),
        (dict(epoch=3), 'src.pth'),
        (None, 'src.pth'),
        (b'not a checkpoint', 'src.pth'),
    ],
    ids=['another model', 'no weights', 'no file', 'damaged'],
)
def test_converter_refuses(content, fact, tmp_path):
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    if isinstance(content, bytes):
        src.write_bytes(content)
    elif content is not None:
        torch.save(content, src)
    assert fact in refusal(src, dst)
    assert not dst.exists()
    dst.write_text('mine')
    assert 'dst.pth' in refusal(src, dst)
    assert dst.read_text() == 'mine'


# --- PaddleClas, and back ------------------------------------------------------


@cache
def public_tiny() -> dict[str, Tensor]:
    """The state dict of the public code, in float32."""
    return {k: as_type(v, torch.float32) for k, v in public_state('tiny').items()}


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


@pytest.mark.parametrize('form', ['2.0', '2.1', '3.3'])
def test_paddle_equals_the_public_code_and_goes_back(form: str, tmp_path: Path) -> None:
    """Files of three versions of Paddle."""
    original = written = paddle_state()
    if form == '2.0':  # with its own names of the parameters
        names = {key: f'parameter_{i}' for i, key in enumerate(original)}
        written = {**original, 'StructuredToParameterName@@': names}
    elif form == '2.1':  # pairs of name and array
        written = {key: (f'p_{i}', v) for i, (key, v) in enumerate(original.items())}
    protocol = 2 if form == '2.0' else 4
    (tmp_path / 'a.pdparams').write_bytes(pickle.dumps(written, protocol=protocol))
    ours = convert(tmp_path / 'a.pdparams', tmp_path / 'ours.pth')
    torch.save(public_tiny(), tmp_path / 'a.pth')
    same = convert(tmp_path / 'a.pth', tmp_path / 'same.pth')
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[key], same[key]) for key in ours)

    convert(tmp_path / 'ours.pth', tmp_path / 'back.pdparams', '--reverse')
    back = pickle.loads((tmp_path / 'back.pdparams').read_bytes())
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[key], original[key]) for key in back)


@pytest.mark.parametrize('suffix', ['pth', 'pdparams', 'reverse'])
def test_mutated_checkpoints_end_in_a_sentence(suffix: str, tmp_path: Path) -> None:
    """Names, shapes, types and bytes of a small one are changed."""
    arch = dict(embed_dims=(16, 16, 32, 32), depths=(1,) * 4, num_heads=(1,) * 4)
    state = {f'backbone.{k}': v for k, v in DSNet(arch).state_dict().items()}
    state |= {'head.fc.weight': torch.ones(5, 32), 'head.fc.bias': torch.ones(5)}
    torch.save(dict(state_dict=state), tmp_path / 'ours.pth')
    options = ['--reverse'] if suffix == 'reverse' else []
    src = tmp_path / f'src.{suffix.replace("reverse", "pth")}'
    if suffix == 'reverse':
        names = dict(state_dict=state)
    else:
        public = tmp_path / f'public.{suffix}'
        convert(tmp_path / 'ours.pth', public, '--reverse')
        read = (
            torch.load
            if suffix == 'pth'
            else lambda path: pickle.loads(path.read_bytes())
        )
        names = read(public)
    rng = random.Random(0)
    junk = [
        *(
            None,
            3,
            'text',
            [],
            {},
            torch.tensor(2),
            torch.tensor(1.0),
            torch.ones(2, 2),
        ),
        *(torch.full((16,), torch.nan), torch.ones(16).int(), torch.ones(10**6)),
        *(torch.ones(16, dtype=torch.bfloat16), np.ones(3), np.ones(3, np.longdouble)),
        *(np.array(1.0), np.ones(16, '>f4'), np.array(['a']), np.ones(16, complex)),
    ]
    codes = []
    for i in range(60):
        changed = dict(names.get('model') or names.get('state_dict') or names)
        key = rng.choice([*changed])
        other = rng.choice(
            [3, '', 'blocks1.99999999.norm1.bias', 'blocks1.x', key[:-3]]
        )
        if rng.random() < 0.6:
            changed[key] = rng.choice(junk)
        else:
            changed[other] = changed.pop(key)
        content = io.BytesIO()
        if suffix == 'pdparams':
            pickle.dump(changed, content)
        else:
            torch.save({next(iter(names)): changed}, content)
        content = bytearray(content.getvalue())
        if i % 3 == 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        src.write_bytes(content)
        out = (
            tmp_path / f'{i}.pdparams' if suffix == 'reverse' else tmp_path / f'{i}.pth'
        )
        errors = io.StringIO()
        try:
            with redirect_stderr(errors):
                convert(src, out, *options)
        except SystemExit as error:
            codes.append(error.code)
            assert ': error: ' in errors.getvalue()
    assert {*codes} == {2} and len(codes) > 40


def test_ours_goes_back_to_public_names(converted, tmp_path):
    torch.save(dict(state_dict=converted), tmp_path / 'ours.pth')
    public = convert(tmp_path / 'ours.pth', tmp_path / 'public.pth', '--reverse')
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
    ('change', 'fact'),
    [
        (lambda s: s.pop('blocks3.2.norm1._mean'), 'stages.2.2.norm1.running_mean'),
        (lambda s: s.pop('head.bias'), 'head.fc.bias'),
        (lambda s: s.pop('patch_embed1.proj.bias'), '[0, 128, 320, 512]'),
        (lambda s: s.update(more=s['head.bias']), "'more'"),
        (lambda s: s.update({'head.bias': s['head.bias'][:7]}), 'head.fc.weight'),
        (lambda s: s.update({'head.bias': 'text'}), 'a.pdparams'),
        (lambda s: s.clear(), 'a.pdparams'),
        (lambda s: s.update(more=os.getcwd), 'posix.getcwd'),
        (lambda s: s.update(more=Runs('ran')), 'posix.mkdir'),
    ],
)
def test_paddle_files_with_anything_else_are_refused(
    change, fact, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    state = paddle_state()
    change(state)
    Path('a.pdparams').write_bytes(pickle.dumps(state))
    assert fact in refusal(Path('a.pdparams'), Path('b.pth'))
    assert os.listdir() == ['a.pdparams']  # nothing in it was run

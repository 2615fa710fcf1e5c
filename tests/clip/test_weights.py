"""Files of weights that are damaged, and towers that encoders share."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from dsnet_mm.clip.prompts import resolve_prompts
from dsnet_mm.datasets.few_shot_dataset import FewShotDataset
from dsnet_mm.models import OpenCLIPEncoder


def state_without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


def flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]


DAMAGES = {
    'empty file': lambda content, state: b'',
    'garbage': lambda content, state: b'garbage' * 100,
    'half a file': lambda content, state: content[:10_000],
    'incomplete': lambda content, state: state_without(state, 'visual.proj'),
    'empty state': lambda content, state: {},
    'another model': lambda content, state: {
        k: v[..., :1].clone() if v.dim() else v for k, v in state.items()
    },
    'flipped bit': lambda content, state: flipped(content),
    'integers': lambda content, state: {
        **state,
        'visual.proj': state['visual.proj'].int(),
    },
    'nan': lambda content, state: {
        **state,
        'visual.proj': state['visual.proj'] * torch.nan,
    },
}


@pytest.mark.parametrize(
    ('damage', 'suffix'),
    [
        *((damage, 'pt') for damage in DAMAGES),
        *((damage, 'safetensors') for damage in [*DAMAGES][:3]),
    ],
)
def test_bad_weights(tiny_clip, tmp_path, damage, suffix):
    good, bad = Path(tiny_clip['pretrained']), tmp_path / f'weights.{suffix}'
    found = DAMAGES[damage](good.read_bytes(), torch.load(good))
    if isinstance(found, bytes):
        bad.write_bytes(found)
    else:
        torch.save(found, bad)
    with pytest.raises(ValueError, match=r'weights\.') as error:
        OpenCLIPEncoder(tiny_clip['model'], str(bad))
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


def test_torchscript_archive(tiny_clip, tmp_path):
    """OpenAI's files are TorchScript archives with three more entries."""

    class Archive(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            for name, module in clip.named_children():
                self.add_module(name, module)
            for name, value in (
                *clip.named_parameters(recurse=False),
                ('input_resolution', torch.tensor(32)),
                ('context_length', torch.tensor(24)),
                ('vocab_size', torch.tensor(49408)),
            ):
                self.register_buffer(name, value.detach())

        def forward(self, x):
            return self.visual(x)

    config = json.loads(Path(tiny_clip['model']).read_text())
    config['quick_gelu'] = True  # as OpenAI's models have
    own = OpenCLIPEncoder(config, tiny_clip['pretrained'])
    traced = torch.jit.trace(Archive(own.clip), torch.randn(1, 3, 32, 32))
    torch.jit.save(traced, tmp_path / 'RN50.pt')
    loaded = OpenCLIPEncoder(config, str(tmp_path / 'RN50.pt'))
    assert loaded.digest() == own.digest()


class Harmful(torch.nn.Module):
    """Writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.ones(1), state[0])

    def forward(self, x):
        return x


def test_torchscript_archive_is_not_run(tiny_clip, tmp_path):
    target, archive = tmp_path / 'thesis.tex', tmp_path / 'a.pt'
    torch.jit.script(Harmful(str(target))).save(archive)
    torch.jit.load(archive)
    target.unlink()  # it is harmful
    config = {**json.loads(Path(tiny_clip['model']).read_text()), 'quick_gelu': True}
    with pytest.raises(ValueError, match=r'a\.pt'):
        OpenCLIPEncoder(config, str(archive))
    assert not target.exists()


def test_class_names_with_the_same_first_tokens(encoder):
    names = [f'{"very " * 30}old {animal}' for animal in ('cat', 'dog')]
    with pytest.raises(ValueError, match='24 tokens'):
        encoder.encode_classes(names, 'photo')
    assert len(encoder.encode_classes(['missile', 'missile'], 'photo')) == 2


def test_encoding_of_a_file_of_prompts(tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('a café {}.\n\nan old {}.\n', encoding='utf-8-sig')
    assert resolve_prompts(path) == ('a café {}.', 'an old {}.')
    path.write_text('a café {}.', encoding='latin-1')
    with pytest.raises(ValueError, match=r'prompts\.txt.*UTF-8'):
        resolve_prompts(path)


# --- Encoders that share their towers ---------------------------------------------


@pytest.fixture
def own_clip(tiny_clip, tmp_path):
    """Copies of the files of the tiny CLIP, which no other test has loaded."""
    return {key: shutil.copy(path, tmp_path) for key, path in tiny_clip.items()}


def test_encoders_of_the_same_weights_share_the_towers(own_clip, loads):
    first = OpenCLIPEncoder(**own_clip)
    second = OpenCLIPEncoder.shared(**own_clip, amp='bfloat16')
    third = OpenCLIPEncoder.shared(**own_clip)
    assert loads == ['create_model']
    assert first.clip is second.clip is third.clip
    assert (first.amp, second.amp, third.amp) == (None, 'bfloat16', None)
    assert second.digest() == first.digest()
    OpenCLIPEncoder(**own_clip)
    assert len(loads) == 2, 'the constructor always loads'
    with pytest.raises(ValueError, match='float8'):
        OpenCLIPEncoder.shared(**own_clip, amp='float8')


def test_towers_are_freed_with_the_last_encoder(own_clip):
    first = OpenCLIPEncoder(**own_clip)
    second = OpenCLIPEncoder.shared(**own_clip)
    clip = weakref.ref(first.clip)
    del first
    gc.collect()
    assert OpenCLIPEncoder.shared(**own_clip).clip is clip()
    del second
    gc.collect()
    assert clip() is None


@pytest.mark.parametrize('change', ['file', 'load_state_dict', 'double', 'device'])
def test_changed_towers_are_not_shared(own_clip, change):
    first = OpenCLIPEncoder(**own_clip)
    digest, scale = first.digest(), first.logit_scale
    if change == 'file':
        state = torch.load(own_clip['pretrained'])
        state['logit_scale'] += 1
        torch.save(state, own_clip['pretrained'])
        os.utime(own_clip['pretrained'], ns=(1, 1))
    elif change == 'device':
        first = first.to('meta')
    elif change == 'double':
        first.double()
    else:
        other = OpenCLIPEncoder(own_clip['model'])
        first.load_state_dict(other.state_dict())
        assert first.digest() == other.digest() != digest
    second = OpenCLIPEncoder.shared(**own_clip)
    assert second.clip is not first.clip
    assert not next(second.parameters()).is_meta
    assert (second.digest() == digest) == (change != 'file')
    factor = 2.71828 if change == 'file' else 1
    assert second.logit_scale == pytest.approx(scale * factor, rel=1e-4)


def test_data_sets_with_features_load_one_clip(own_clip, image_folder, tmp_path, loads):
    features = dict(folder=str(tmp_path / 'cache'), encoder=own_clip)
    datasets = [
        FewShotDataset(str(image_folder), part, 4, features=features)
        for part in ('train', 'val', 'test')
    ]
    assert loads.count('create_model') == 1
    for dataset in datasets:  # copies and worker processes do not need the encoder
        modules = [v for v in vars(dataset).values() if isinstance(v, torch.nn.Module)]
        assert not modules

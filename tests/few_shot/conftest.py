"""A tiny random CLIP model and pictures for it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

TINY = {
    'embed_dim': 16,
    'vision_cfg': {
        'image_size': 32,
        'layers': 1,
        'width': 32,
        'head_width': 16,
        'patch_size': 16,
    },
    'text_cfg': {
        'context_length': 24,
        'vocab_size': 49408,
        'width': 16,
        'heads': 2,
        'layers': 1,
    },
}


@pytest.fixture(scope='session')
def tiny_clip(tmp_path_factory):
    """Arguments of OpenCLIPEncoder for a tiny model with stored weights."""
    import open_clip

    folder = tmp_path_factory.mktemp('clip')
    config = folder / 'dsnet_mm_tiny.json'
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model('dsnet_mm_tiny')
    weights = folder / 'tiny.pt'
    torch.save(model.state_dict(), weights)
    return {'model': str(config), 'pretrained': str(weights)}


@pytest.fixture(scope='session')
def encoder(tiny_clip):
    from dsnet_mm.models import OpenCLIPEncoder

    return OpenCLIPEncoder(**tiny_clip)


@pytest.fixture(scope='session')
def picture_folder(tmp_path_factory):
    """Three classes of coloured noise, 24 pictures each."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    colours = {'red': (1, 0, 0), 'green_sea': (0, 1, 0), 'blue': (0, 0, 1)}
    for name, colour in colours.items():
        (folder / name).mkdir()
        for i in range(24):
            noise = rng.uniform(0, 255, (40, 48, 3)) * (0.4 + 0.6 * np.array(colour))
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f'{i}.png')
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Names of what was loaded, in order."""
    import open_clip

    from dsnet_mm.tasks import task

    seen = []

    def spy(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    spy(open_clip, 'create_model')
    for reader in ('read_public', 'read_folder', 'read_csv'):
        spy(task, reader)
    return seen

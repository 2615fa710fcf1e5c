"""Fixtures: the encoder of a tiny CLIP model, and pictures."""

import numpy as np
import pytest
from PIL import Image


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
    """Names of the functions that loaded a CLIP model or a data set, in order."""
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

"""The demo without a download, cut short."""

import numpy as np

from dsnet_mm.datasets.few_shot import load_task
from dsnet_mm.few_shot import demo
from dsnet_mm.models import OpenCLIPEncoder


def test_captions_never_name_what_is_held_out():
    rng = np.random.default_rng(0)
    captions = [demo.random_scene(rng)[1] for _ in range(300)]
    words = set(' '.join(captions).replace('.', '').split())
    assert not words & {*demo.NEW_TEXTURES, *demo.NEW_SHAPES}
    assert {'striped', 'disc', 'red', 'left'} <= words
    assert len(demo.HELD_OUT) == len(set(demo.HELD_OUT)) == 24


def test_captions_are_true():
    for seed in range(30):
        obj, caption = demo.random_scene(np.random.default_rng(seed))
        assert f'{obj.texture} {obj.shape}' in caption
        if 'left' in caption:
            assert obj.centre[0] < demo.SIZE / 2
        if 'bottom' in caption:
            assert obj.centre[1] > demo.SIZE / 2


def test_pictures_are_a_task(tmp_path):
    demo.write_pictures(tmp_path / 'held_out', train=2, val=1, test=1)
    task = load_task(tmp_path / 'held_out')
    assert set(task.class_names) == set(demo.HELD_OUT)
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 48, 'val': 24, 'test': 24}
    assert not list(tmp_path.glob('.*'))


def test_pretraining_is_repeatable_and_done_once(tmp_path):
    config, weights = demo.pretrain(tmp_path / 'a', steps=2, batch_size=4, quiet=True)
    encoder = OpenCLIPEncoder(str(config), str(weights))
    assert (encoder.embed_dims, encoder.image_size) == (128, demo.SIZE)
    before = weights.stat().st_mtime_ns
    assert demo.pretrain(tmp_path / 'a', steps=2, quiet=True) == (config, weights)
    assert weights.stat().st_mtime_ns == before
    other = demo.pretrain(tmp_path / 'b', steps=2, batch_size=4, quiet=True)
    digest = OpenCLIPEncoder(*map(str, other)).digest()
    assert digest == encoder.digest()

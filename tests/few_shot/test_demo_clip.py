"""The pictures and the pre-training of tools/demo_clip.py, with few steps."""

from io import BytesIO
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from dsnet_mm.datasets import load_task
from dsnet_mm.demo import clip as demo
from dsnet_mm.models import OpenCLIPEncoder


def test_captions_do_not_name_held_out_classes():
    rng = np.random.default_rng(0)
    captions = [demo.random_scene(rng)[1] for _ in range(300)]
    words = set(' '.join(captions).replace('.', '').split())
    assert not words & {*demo.NEW_TEXTURES, *demo.NEW_SHAPES}
    assert {'striped', 'disc', 'red', 'left'} <= words
    assert len(demo.HELD_OUT) == len(set(demo.HELD_OUT)) == 24


def test_captions_describe_the_pictures():
    for seed in range(30):
        obj, caption = demo.random_scene(np.random.default_rng(seed))
        assert f'{obj.texture} {obj.shape}' in caption
        if 'left' in caption:
            assert obj.centre[0] < demo.SIZE / 2
        if 'bottom' in caption:
            assert obj.centre[1] > demo.SIZE / 2


def test_pictures_are_read_as_a_task(tmp_path):
    demo.write_pictures(tmp_path / 'held_out', train=2, val=1, test=1)
    task = load_task(tmp_path / 'held_out')
    assert set(task.class_names) == set(demo.HELD_OUT)
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 48, 'val': 24, 'test': 24}
    assert not list(tmp_path.glob('.*'))


def small_clip(out):
    return demo.pretrain(out, demo.scene_pairs(4), steps=2, quiet=True)


def test_pretraining_is_deterministic_and_done_once(tmp_path):
    config, weights = small_clip(tmp_path / 'a')
    encoder = OpenCLIPEncoder(str(config), str(weights))
    assert (encoder.embed_dims, encoder.image_size) == (128, demo.SIZE)
    before = weights.stat().st_mtime_ns
    assert small_clip(tmp_path / 'a') == (config, weights)
    assert weights.stat().st_mtime_ns == before
    other = OpenCLIPEncoder(*map(str, small_clip(tmp_path / 'b')))
    assert other.digest() == encoder.digest()


def test_training_and_task_have_different_classes_of_cifar(tmp_path):
    names = ('airplane', 'cat', *demo.CIFAR_HELD_OUT)
    with ZipFile(tmp_path / 'cifar.zip', 'w') as file:
        for part in ('train', 'test'):
            for name in names:
                for i in range(5):
                    buffer = BytesIO()
                    Image.new('RGB', (32, 32), (50 * i, 0, 0)).save(buffer, 'JPEG')
                    path = f'cifar10/{part}/{name}/{i}.jpg'
                    file.writestr(path, buffer.getvalue())
    images, captions = next(demo.cifar_pairs(tmp_path / 'cifar.zip', 16))
    assert images.shape == (16, 3, demo.SIZE, demo.SIZE)
    assert {c.rstrip('.').split()[-1] for c in captions} == {'airplane', 'cat'}
    demo.write_cifar(tmp_path / 'held_out', tmp_path / 'cifar.zip', train=5, test=3)
    task = load_task(tmp_path / 'held_out')
    assert task.class_names == demo.CIFAR_HELD_OUT
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 16, 'val': 4, 'test': 12}


def test_archive_without_cifar(tmp_path):
    with ZipFile(tmp_path / 'other.zip', 'w') as file:
        file.writestr('photos/cat.jpg', b'')
    sentence = r"no pictures cifar10/train/class_name/\*.jpg; .* 'photos/cat.jpg'"
    with pytest.raises(ValueError, match=sentence):
        next(demo.cifar_pairs(tmp_path / 'other.zip'))
    with pytest.raises(ValueError, match=sentence):
        demo.write_cifar(tmp_path / 'held_out', tmp_path / 'other.zip')
    assert [path.name for path in tmp_path.iterdir()] == ['other.zip']

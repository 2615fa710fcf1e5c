"""The images and the pre-training of tools/demo_clip.py, with few steps."""

import hashlib
from io import BytesIO
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets import load_task
from dsnet_mm.demo import tiny_clip
from tests.conftest import tool

# SHA-256 of 16 training images and captions, and of the pixels of a drawn task.
# Results of make demo-clip and the examples of the page hold for these.
RECORDED_PAIRS = '645f1d7fe3301231d8f589d0ba43bff9c1e710ab6b566da5677c52ce57d7b6d8'
RECORDED_TASK = '1d3abac0149f519576ae4553eea8b2edf27079b0a563c89d490c325da550fa48'


@pytest.fixture(scope='module')
def demo():
    return tool('demo_clip.py')


def test_captions_do_not_name_held_out_classes():
    rng = np.random.default_rng(0)
    captions = [tiny_clip.random_scene(rng)[1] for _ in range(300)]
    words = set(' '.join(captions).replace('.', '').split())
    assert not words & {*tiny_clip.NEW_TEXTURES, *tiny_clip.NEW_SHAPES}
    assert {'striped', 'disc', 'red', 'left'} <= words
    assert len(tiny_clip.HELD_OUT) == len(set(tiny_clip.HELD_OUT)) == 24


def test_captions_describe_the_images():
    for seed in range(30):
        obj, caption = tiny_clip.random_scene(np.random.default_rng(seed))
        assert obj.name in caption
        if 'left' in caption:
            assert obj.centre[0] < tiny_clip.SIZE / 2
        if 'bottom' in caption:
            assert obj.centre[1] > tiny_clip.SIZE / 2


def test_images_are_the_recorded_ones_and_a_task(demo, tmp_path):
    images, captions = next(tiny_clip.scene_pairs(16))
    digest = hashlib.sha256(images.contiguous().numpy().tobytes())
    digest.update('\n'.join(captions).encode())
    assert digest.hexdigest() == RECORDED_PAIRS

    demo.write_task(tmp_path / 'held_out', train=2, val=1, test=1)
    task = load_task(tmp_path / 'held_out')
    assert set(task.class_names) == set(tiny_clip.HELD_OUT)
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 48, 'val': 24, 'test': 24}
    assert not list(tmp_path.glob('.*'))
    digest = hashlib.sha256()
    for path in sorted(tmp_path.rglob('*.png')):
        digest.update(path.parent.name.encode() + Image.open(path).tobytes())
    assert digest.hexdigest() == RECORDED_TASK


def small_clip(out):
    return tiny_clip.pretrain(out, tiny_clip.scene_pairs(4), steps=2)


def test_pretraining_is_deterministic_and_done_once(tmp_path):
    config, weights = small_clip(tmp_path / 'a')
    encoder = OpenCLIPEncoder(str(config), str(weights))
    assert (encoder.embed_dims, encoder.image_size) == (128, tiny_clip.SIZE)
    before = weights.stat().st_mtime_ns
    assert small_clip(tmp_path / 'a') == (config, weights)
    assert weights.stat().st_mtime_ns == before
    other = OpenCLIPEncoder(*map(str, small_clip(tmp_path / 'b')))
    assert other.digest() == encoder.digest()


def test_training_and_task_have_different_classes_of_cifar(demo, tmp_path):
    with ZipFile(tmp_path / 'cifar.zip', 'w') as file:
        for part in ('train', 'test'):
            for name in ('airplane', 'cat', *demo.CIFAR_HELD_OUT):
                for i in range(5):
                    buffer = BytesIO()
                    Image.new('RGB', (32, 32), (50 * i, 0, 0)).save(buffer, 'JPEG')
                    path = f'cifar10/{part}/{name}/{i}.jpg'
                    file.writestr(path, buffer.getvalue())
    images, captions = next(demo.cifar_pairs(tmp_path / 'cifar.zip', 16))
    assert images.shape == (16, 3, tiny_clip.SIZE, tiny_clip.SIZE)
    assert {c.rstrip('.').split()[-1] for c in captions} == {'airplane', 'cat'}
    demo.write_cifar(tmp_path / 'held_out', tmp_path / 'cifar.zip', train=5, test=3)
    task = load_task(tmp_path / 'held_out')
    assert task.class_names == demo.CIFAR_HELD_OUT
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 16, 'val': 4, 'test': 12}


def test_archive_without_cifar(demo, tmp_path):
    with ZipFile(tmp_path / 'other.zip', 'w') as file:
        file.writestr('photos/cat.jpg', b'')
    sentence = r"cifar10/train/class_name/\*.jpg; .* 'photos/cat.jpg'"
    with pytest.raises(ValueError, match=sentence):
        next(demo.cifar_pairs(tmp_path / 'other.zip'))
    with pytest.raises(ValueError, match=sentence):
        demo.write_cifar(tmp_path / 'held_out', tmp_path / 'other.zip')
    assert [path.name for path in tmp_path.iterdir()] == ['other.zip']

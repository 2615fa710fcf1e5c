"""FeatureCache: features, shared files, checksums and errors."""

import logging
import os

import pytest
import torch

from dsnet_mm.datasets import features, load_task
from dsnet_mm.datasets.images import open_image
from dsnet_mm.few_shot import FeatureCache
from dsnet_mm.few_shot.deployment import DeployedClassifier


@pytest.fixture
def items(image_folder):
    return load_task(image_folder).split['val']


@pytest.fixture
def opened(monkeypatch):
    """Paths of the images that were opened."""
    paths = []

    def spy(path):
        paths.append(path)
        return open_image(path)

    monkeypatch.setattr(features, 'open_image', spy)
    return paths


def test_second_call_reads_the_file(tmp_path, encoder, items, opened):
    first = FeatureCache(tmp_path, encoder).images(items, views=2)
    assert len(opened) == len(items), 'an image is opened once for all views'
    second = FeatureCache(tmp_path, encoder).images(items, views=2)
    assert len(opened) == len(items)
    assert torch.equal(first.features, second.features)
    assert first.features.shape == (2, len(items), 16)
    assert first.labels.tolist() == [item[1] for item in items]
    assert not torch.equal(first.features[0], first.features[1])
    assert not list(tmp_path.glob('.*'))


def test_every_option_has_a_file_of_its_own(tmp_path, encoder, items):
    FeatureCache(tmp_path, encoder).images(items)
    FeatureCache(tmp_path, encoder, preprocessing='warp').images(items)
    FeatureCache(tmp_path, encoder).images(items, views=1)
    FeatureCache(tmp_path, encoder, crop_scale=(0.5, 1)).images(items, views=1)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_image_is_encoded_once_for_all_lists(
    tmp_path, encoder, items, opened, monkeypatch
):
    monkeypatch.setattr(features, 'SHARD', 4)
    cache = FeatureCache(tmp_path, encoder)
    cache.images(items[:6], views=2)
    mixed = [items[7], items[2], items[2], items[0]]
    found = cache.images(mixed, views=2)
    assert opened == [path for path, *_ in [*items[:6], items[7]]]
    alone = FeatureCache(tmp_path / 'other', encoder).images(mixed, views=2)
    torch.testing.assert_close(found.features, alone.features)
    assert torch.equal(found.labels, alone.labels)


def test_a_kill_loses_at_most_one_file(tmp_path, encoder, items, opened, monkeypatch):
    monkeypatch.setattr(features, 'SHARD', 4)
    killed = FeatureCache(tmp_path, encoder, batch_size=2)
    forward, calls = type(encoder).forward, []

    def fail(self, x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(type(encoder), 'forward', fail)
    with pytest.raises(KeyboardInterrupt):
        killed.images(items)
    assert calls == [2, 2, 2, 2]
    opened.clear()
    cache = FeatureCache(tmp_path, encoder)
    assert cache.count_missing(items) == len(items) - 4
    cache.images(items)
    assert len(opened) == len(items) - 4


def test_processes_share_the_images(tmp_path, encoder, items, opened, monkeypatch):
    monkeypatch.setattr(features, 'SHARD', 2)
    seen = []
    for rank in range(3):
        cache = FeatureCache(tmp_path, encoder)
        cache.encode(items, share=(rank, 3))
        seen.append(list(opened))
        opened.clear()
    assert sorted(path for paths in seen for path in paths) == sorted(
        path for path, *_ in items
    )
    assert all(seen)
    FeatureCache(tmp_path, encoder).images(items)
    assert not opened


def test_clip_crops_and_warp_does_not(encoder):
    from PIL import Image

    from dsnet_mm.datasets.images import build_transform

    wide = Image.new('RGB', (96, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))
    clip = build_transform(encoder, 'clip')(wide)
    warp = build_transform(encoder, 'warp')(wide)
    assert clip.shape == warp.shape == (3, 32, 32)
    assert clip[0].std() < 1e-6, 'the white part lies outside the centre'
    assert warp[0, :, :10].mean() > warp[0, :, 12:].mean()


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'garbage'])
def test_damaged_file_is_rebuilt(tmp_path, encoder, items, damage, caplog, opened):
    cache = FeatureCache(tmp_path, encoder)
    good = cache.images(items)
    (file,) = tmp_path.glob('*/*')
    content = bytearray(file.read_bytes())
    if damage == 'truncate':
        content = content[:-40]
    elif damage == 'flip':
        content[-1] ^= 1
    else:
        content = bytearray(b'nothing')
    file.write_bytes(content)
    opened.clear()
    with caplog.at_level(logging.WARNING):
        rebuilt = FeatureCache(tmp_path, encoder).images(items)
    assert len(opened) == len(items)
    assert 'removing the damaged cache file' in caplog.text
    assert torch.equal(rebuilt.features, good.features)
    caplog.clear()
    FeatureCache(tmp_path, encoder).images(items)
    assert len(opened) == len(items) and not caplog.text


def test_changed_image_is_encoded_again(tmp_path, encoder):
    from PIL import Image

    image = tmp_path / 'a.png'
    Image.new('RGB', (32, 32), 'red').save(image)
    cache = FeatureCache(tmp_path / 'cache', encoder)
    red = cache.images([(str(image), 0, 'a')])
    Image.new('RGB', (32, 32), 'blue').save(image)
    os.utime(image, ns=(1, 1))
    blue = cache.images([(str(image), 0, 'a')])
    assert not torch.allclose(red.features, blue.features)


def test_error_names_the_unreadable_image(tmp_path, encoder, items, caplog):
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    mixed = [items[0], (str(bad), 1, 'x'), items[1]]
    with pytest.raises(ValueError, match=r'bad\.jpg cannot be read .* on_bad_image'):
        FeatureCache(tmp_path / 'c', encoder).images(mixed)
    with caplog.at_level(logging.WARNING):
        found = FeatureCache(tmp_path / 'c', encoder, on_bad_image='skip').images(mixed)
    assert 'bad.jpg' in caplog.text
    assert found.labels.tolist() == [items[0][1], items[1][1]]
    with pytest.raises(FileNotFoundError, match=r'none\.jpg is missing'):
        FeatureCache(tmp_path / 'c', encoder).images([('none.jpg', 0, 'x')])


def test_error_of_a_deployed_classifier_names_the_image(tmp_path, encoder):
    classifier = DeployedClassifier(torch.nn.Identity(), encoder, ['a', 'b'], 'clip')
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'bad\.jpg cannot be read'):
        classifier([tmp_path / 'bad.jpg'])
    with pytest.raises(FileNotFoundError, match=r'none\.jpg is missing'):
        classifier([tmp_path / 'none.jpg'])


def test_unknown_options(tmp_path, encoder):
    with pytest.raises(ValueError, match='preprocessing must be one of'):
        FeatureCache(tmp_path, encoder, preprocessing='crop')
    with pytest.raises(ValueError, match='on_bad_image must be'):
        FeatureCache(tmp_path, encoder, on_bad_image='ignore')
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='is a file; choose a folder'):
        FeatureCache(tmp_path / 'file', encoder)


def test_texts_are_encoded_once(tmp_path, encoder, monkeypatch):
    cache = FeatureCache(tmp_path, encoder)
    first = cache.texts(['cat', 'dog'], ['a {}.'])
    monkeypatch.setattr(encoder, 'encode_classes', None)
    assert torch.equal(cache.texts(['cat', 'dog'], ['a {}.']), first)

"""The feature cache: what it gives, shares, verifies and refuses."""

import logging
import os

import pytest
import torch

from dsnet_mm.few_shot import FeatureCache
from dsnet_mm.few_shot.deployment import DeployedClassifier
from dsnet_mm.tasks import load_task


@pytest.fixture
def items(picture_folder):
    return load_task(picture_folder).split['val']


def count_encoded(cache):
    seen = []
    cache.progress = seen.append
    return lambda: sum(seen)


def test_second_time_is_read_and_equal(tmp_path, encoder, items):
    first = FeatureCache(tmp_path, encoder).images(items, views=2)
    again = FeatureCache(tmp_path, encoder)
    encoded = count_encoded(again)
    second = again.images(items, views=2)
    assert encoded() == 0
    assert torch.equal(first.features, second.features)
    assert first.features.shape == (2, len(items), 16)
    assert first.labels.tolist() == [item[1] for item in items]
    assert not torch.equal(first.features[0], first.features[1])
    assert not list(tmp_path.glob('.*'))


def test_key_tells_apart_what_changes_the_features(tmp_path, encoder, items):
    FeatureCache(tmp_path, encoder).images(items)
    FeatureCache(tmp_path, encoder, preprocessing='warp').images(items)
    FeatureCache(tmp_path, encoder).images(items, views=1)
    FeatureCache(tmp_path, encoder, crop_scale=(0.5, 1)).images(items, views=1)
    FeatureCache(tmp_path, encoder).images(items[1:])
    assert len(list(tmp_path.iterdir())) == 5


def test_clip_and_warp_differ_as_they_should(encoder):
    from PIL import Image

    from dsnet_mm.datasets.pictures import build_transform

    wide = Image.new('RGB', (96, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))
    clip = build_transform(encoder, 'clip')(wide)
    warp = build_transform(encoder, 'warp')(wide)
    assert clip.shape == warp.shape == (3, 32, 32)
    assert clip[0].std() < 1e-6, 'the white part lies outside the centre'
    assert warp[0, :, :10].mean() > warp[0, :, 12:].mean()


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'garbage'])
def test_damaged_file_is_rebuilt(tmp_path, encoder, items, damage, caplog):
    cache = FeatureCache(tmp_path, encoder)
    good = cache.images(items)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == 'truncate':
        content = content[:-40]
    elif damage == 'flip':
        content[-1] ^= 1
    else:
        content = bytearray(b'nothing')
    file.write_bytes(content)
    encoded = count_encoded(cache)
    with caplog.at_level(logging.WARNING):
        rebuilt = cache.images(items)
    assert encoded() == len(items)
    assert 'rebuilding' in caplog.text
    assert torch.equal(rebuilt.features, good.features)


def test_changed_picture_is_encoded_again(tmp_path, encoder):
    from PIL import Image

    picture = tmp_path / 'a.png'
    Image.new('RGB', (32, 32), 'red').save(picture)
    cache = FeatureCache(tmp_path / 'cache', encoder)
    red = cache.images([(str(picture), 0, 'a')])
    Image.new('RGB', (32, 32), 'blue').save(picture)
    os.utime(picture, ns=(1, 1))
    blue = cache.images([(str(picture), 0, 'a')])
    assert not torch.allclose(red.features, blue.features)


def test_unreadable_picture_is_named(tmp_path, encoder, items, caplog):
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no picture')
    mixed = [items[0], (str(bad), 1, 'x'), items[1]]
    with pytest.raises(ValueError, match=r'bad\.jpg cannot be read .* on_bad_image'):
        FeatureCache(tmp_path / 'c', encoder).images(mixed)
    with caplog.at_level(logging.WARNING):
        found = FeatureCache(tmp_path / 'c', encoder, on_bad_image='skip').images(mixed)
    assert 'bad.jpg' in caplog.text
    assert found.labels.tolist() == [items[0][1], items[1][1]]
    with pytest.raises(FileNotFoundError, match=r'none\.jpg is missing'):
        FeatureCache(tmp_path / 'c', encoder).images([('none.jpg', 0, 'x')])


def test_deployed_classifier_names_the_picture_it_cannot_read(tmp_path, encoder):
    classifier = DeployedClassifier(torch.nn.Identity(), encoder, ['a', 'b'], 'clip')
    (tmp_path / 'bad.jpg').write_bytes(b'no picture')
    with pytest.raises(ValueError, match=r'bad\.jpg cannot be read'):
        classifier([tmp_path / 'bad.jpg'])
    with pytest.raises(FileNotFoundError, match=r'none\.jpg is missing'):
        classifier([tmp_path / 'none.jpg'])


def test_cache_refuses_unknown_options(tmp_path, encoder):
    with pytest.raises(ValueError, match='preprocessing must be one of'):
        FeatureCache(tmp_path, encoder, preprocessing='crop')
    with pytest.raises(ValueError, match='on_bad_image must be'):
        FeatureCache(tmp_path, encoder, on_bad_image='ignore')


def test_texts_are_encoded_once(tmp_path, encoder, monkeypatch):
    cache = FeatureCache(tmp_path, encoder)
    first = cache.texts(['cat', 'dog'], ['a {}.'])
    monkeypatch.setattr(encoder, 'encode_classes', None)
    assert torch.equal(cache.texts(['cat', 'dog'], ['a {}.']), first)

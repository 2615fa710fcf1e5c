"""FeatureCache: what is encoded again, and what is not."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsnet_mm.datasets import features, load_task
from dsnet_mm.datasets.features import FeatureCache
from dsnet_mm.datasets.images import open_image
from tests.damage import damaged_bytes, quick


@pytest.fixture
def items(image_folder):
    return load_task(image_folder).split['val']


@pytest.fixture
def opened(monkeypatch):
    """Paths of the images that were opened. Files of the cache have four views."""
    monkeypatch.setattr(features, 'SHARD', 4)
    paths = []

    def spy(path):
        paths.append(path)
        return open_image(path)

    monkeypatch.setattr(features, 'open_image', spy)
    return paths


def test_an_image_is_encoded_once(tmp_path, encoder, items, opened):
    cache = FeatureCache(tmp_path, encoder)
    first = cache.images(items[:6], views=2)
    assert first.features.shape == (2, 6, 16)
    assert first.labels.tolist() == [item[1] for item in items[:6]]
    assert not torch.equal(first.features[0], first.features[1])
    mixed = [items[7], items[2], items[2], items[0]]
    found = FeatureCache(tmp_path, encoder).images(mixed, views=2)
    assert opened == [path for path, *_ in [*items[:6], items[7]]]
    assert torch.equal(found.features[:, 1:], first.features[:, [2, 2, 0]])
    alone = FeatureCache(tmp_path / 'other', encoder).images(mixed, views=2)
    torch.testing.assert_close(found.features, alone.features)
    assert torch.equal(found.labels, alone.labels)
    assert not list(tmp_path.rglob('.*')), 'no temporary file is left'


def test_every_option_has_files_of_its_own(tmp_path, encoder, items):
    for options, views in (
        ({}, 0),
        ({'preprocessing': 'warp'}, 0),
        ({}, 1),
        ({'crop_scale': (0.5, 1)}, 1),
    ):
        FeatureCache(tmp_path, encoder, **options).images(items[:1], views)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_kill_loses_at_most_one_file(tmp_path, encoder, items, opened, monkeypatch):
    forward, calls = type(encoder).forward, []

    def fail(self, x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(type(encoder), 'forward', fail)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, encoder, batch_size=2).images(items)
    assert calls == [2, 2, 2, 2]
    opened.clear()
    cache = FeatureCache(tmp_path, encoder)
    assert cache.count_missing(items) == len(items) - 4
    cache.images(items)
    assert len(opened) == len(items) - 4


def test_processes_share_the_images(tmp_path, encoder, items, opened):
    ends = [0]
    for rank in range(3):
        FeatureCache(tmp_path, encoder).encode(items, share=(rank, 3))
        ends.append(len(opened))
    assert sorted(opened) == sorted(path for path, *_ in items)
    assert ends == sorted({*ends}), 'each process has a share'
    FeatureCache(tmp_path, encoder).images(items)
    assert len(opened) == len(items)


@pytest.mark.parametrize('damage', ['flip', 'metadata'])
def test_damaged_file_is_rebuilt(tmp_path, encoder, items, damage, caplog, opened):
    good = FeatureCache(tmp_path, encoder).images(items[:4])
    (file,) = tmp_path.glob('*/*')
    content = bytearray(file.read_bytes())
    if damage == 'flip':
        content[-1] ^= 1
    else:
        content = content.replace(b'"pictures"', b'"pikturez"')
    file.write_bytes(content)
    for _ in range(2):  # the second time it is sound
        rebuilt = FeatureCache(tmp_path, encoder).images(items[:4])
        assert torch.equal(rebuilt.features, good.features)
        assert len(opened) == 8
    assert caplog.text.replace('\n', '').count('removing the damaged') == 1


@settings(quick, max_examples=40)
@given(st.data())
def test_any_damage_of_a_file_is_repaired(tmp_path, encoder, items, data):
    shutil.rmtree(folder := tmp_path / 'cache', ignore_errors=True)
    good = FeatureCache(folder, encoder, quiet=True).images(items[:2]).features
    (file,) = folder.glob('*/*')
    file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    again = FeatureCache(folder, encoder, quiet=True).images(items[:2]).features
    torch.testing.assert_close(again, good)


def test_changed_image_is_encoded_again(tmp_path, encoder):
    image = tmp_path / 'a.png'
    cache = FeatureCache(tmp_path / 'cache', encoder)
    seen = []
    for colour in ('red', 'blue'):
        Image.new('RGB', (32, 32), colour).save(image)
        os.utime(image, ns=(len(seen), 1 + len(seen)))
        seen.append(cache.images([(str(image), 0, 'a')]).features)
    assert not torch.allclose(*seen)


def test_touched_and_moved_images_are_not_encoded_again(
    tmp_path, encoder, items, opened
):
    shutil.copytree(Path(items[0][0]).parents[1], tmp_path / 'a')
    moved = [
        (str(tmp_path / 'a' / Path(p).parent.name / Path(p).name), *rest)
        for p, *rest in items
    ]
    first = FeatureCache(tmp_path / 'cache', encoder).images(items, views=1)
    opened.clear()
    for round_ in range(2):
        found = FeatureCache(tmp_path / 'cache', encoder).images(moved, views=1)
        assert torch.equal(found.features, first.features) and not opened
        os.utime(moved[round_][0], ns=(5, 5))
    content = Path(moved[3][0]).read_bytes()
    Path(moved[3][0]).write_bytes(content[:-1] + b'x')  # of the same size
    FeatureCache(tmp_path / 'cache', encoder).images(moved, views=1)
    assert opened == [moved[3][0]]


def test_unreadable_images(tmp_path, encoder, items, caplog, opened):
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'no image')
    mixed = [items[0], (str(bad), 1, 'x'), items[1]]
    with pytest.raises(ValueError, match=r'bad\.jpg'):
        FeatureCache(tmp_path / 'c', encoder).images(mixed)
    for _ in range(2):
        cache = FeatureCache(tmp_path / 'c', encoder, on_bad_image='skip')
        found = cache.images(mixed)
        assert found.labels.tolist() == [items[0][1], items[1][1]]
        assert 'bad.jpg' in caplog.text
        assert cache.count_missing(mixed) == 0, 'the cache knows that it is bad'
    with pytest.raises(ValueError, match=r'bad\.jpg'):
        FeatureCache(tmp_path / 'c', encoder).images(mixed)
    with pytest.raises(FileNotFoundError, match=r'none\.jpg'):
        cache.images([('none.jpg', 0, 'x')])


def test_unknown_options(tmp_path, encoder):
    with pytest.raises(ValueError, match='crop'):
        FeatureCache(tmp_path, encoder, preprocessing='crop')
    with pytest.raises(ValueError, match='ignore'):
        FeatureCache(tmp_path, encoder, on_bad_image='ignore')
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='file'):
        FeatureCache(tmp_path / 'file', encoder)


def test_texts_are_encoded_once(tmp_path, encoder, monkeypatch):
    first = FeatureCache(tmp_path, encoder).texts(['cat', 'dog'], ['a {}.'])
    expected = encoder.encode_classes(['cat', 'dog'], ['a {}.'])
    torch.testing.assert_close(first, expected)
    (file,) = Path(tmp_path).glob('texts_*')
    file.write_bytes(file.read_bytes()[:-8])
    again = FeatureCache(tmp_path, encoder).texts(['cat', 'dog'], ['a {}.'])
    monkeypatch.setattr(encoder, 'encode_classes', None)
    for found in (
        again,
        FeatureCache(tmp_path, encoder).texts(['cat', 'dog'], ['a {}.']),
    ):
        assert torch.equal(found, first)

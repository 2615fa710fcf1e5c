"""Images: finding them, naming their damage, and preparing them."""

from pathlib import Path

import pytest
from PIL import Image

from dsnet_mm.datasets.images import build_transform, damage_of, find_images


def test_images_in_and_below_folders(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in ('b.JPG', 'a/c.png', 'a/.hidden.png', 'a/d.heic', 'odd.name'):
        (tmp_path / name).touch()
    found, notes = find_images([tmp_path, str(tmp_path / 'odd.name')])
    names = ['a/c.png', 'b.JPG', 'odd.name']
    assert found == [tmp_path / name for name in names], 'a file may have any suffix'
    assert len(notes) == 1 and '1 .heic, 1 .name' in notes[0]
    (tmp_path / 'empty').mkdir()
    for missing in ('none', 'empty'):
        with pytest.raises(FileNotFoundError, match=missing):
            find_images([tmp_path / missing])


def test_damage_of_a_file(tmp_path, monkeypatch):
    good = tmp_path / 'good.png'
    Image.effect_noise((64, 64), 50).save(good)
    cut, text, empty = (tmp_path / name for name in ('cut.png', 'text.png', 'no.png'))
    cut.write_bytes(good.read_bytes()[:700])
    text.write_text('no image')
    empty.touch()

    def damages(decode: bool) -> list[str | None]:
        found = [damage_of(p, decode) for p in (good, cut, text, empty, Path('none'))]
        return [damage and damage[0] for damage in found]

    assert damages(True) == [None, 'cut off', 'unreadable', 'empty', 'missing']
    assert damages(False) == [None, None, None, 'empty', 'missing']
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert damage_of(good)[0] == 'too large'


def test_clip_crops_and_warp_does_not(encoder):
    wide = Image.new('RGB', (96, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))
    clip = build_transform(encoder, 'clip')(wide)
    warp = build_transform(encoder, 'warp')(wide)
    assert clip.shape == warp.shape == (3, 32, 32)
    assert clip[0].std() < 1e-6, 'the white part lies outside the centre'
    assert warp[0, :, :10].mean() > warp[0, :, 12:].mean()

"""tools/infer.py as a batch job: bad images, names, stopping, resuming, memory."""

import json
import os
import shutil
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from dsnet_mm.inference import Predictor, predictor
from dsnet_mm.inference.__main__ import drawn_names
from tests.conftest import draw, tool
from tests.test_files import full_disk

from .conftest import SIZE


def run(*args: object) -> int:
    """Calls the tool. Returns its exit status."""
    try:
        tool('infer.py').main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the lines, which may repeat an image."""
    files = (p for p in folder.rglob('*') if p.is_file() and p.suffix != '.jsonl')
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def classify(folder: Path, checkpoints: dict[str, str]) -> list[str]:
    return [str(folder / 'classifier.py'), checkpoints['classifier']]


@pytest.fixture
def detect(folder: Path, checkpoints: dict[str, str]) -> list[str]:
    options = ['--score-thr=0.02', '--batch-size=2', '--cfg-options', *SIZE]
    return [str(folder / 'mask_rcnn.py'), checkpoints['mask_rcnn'], *options]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of three shapes, and one without bytes."""
    root = tmp_path / 'photos'
    root.mkdir()
    for i, height in enumerate((64, 40, 50, 64, 40, 50)):
        image = draw(np.random.default_rng(i), i % 2)[0]
        cv2.imwrite(str(root / f'{i}.png'), image[:height])
    (root / '1b.png').touch()
    return root


def test_a_bad_image_ends_nothing(
    classify: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (photos / 'folder.jpg').mkdir()
    shutil.copy(photos / '0.png', photos / 'folder.jpg')
    (photos / 'io.png').symlink_to('/proc/self/mem')  # its first byte is an I/O error
    (photos / 'text.png').write_text('no image')
    wide = np.zeros((1, 2, 3), np.uint8)
    _, png = cv2.imencode('.png', wide)
    bomb = png.tobytes()[:16] + (40_000).to_bytes(4, 'big') * 2 + png.tobytes()[24:29]
    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, 'big') + png.tobytes()[33:]
    (photos / 'bomb.png').write_bytes(bomb)
    cv2.imwrite(str(photos / 'hard.png'), np.zeros((7, 7, 3), np.uint8))
    forward = Predictor._forward

    def fail(self, parts, track):
        if any(image.shape[0] == 7 for image, _ in parts):
            raise MemoryError('7 rows are too many')
        return forward(self, parts, track)

    monkeypatch.setattr(Predictor, '_forward', fail)
    out = tmp_path / 'out'
    assert run(*classify, photos, f'--out={out}', '--batch-size=3') == 1
    found = json.loads((out / 'images.json').read_text())
    names = [image['file_name'] for image in found['images']]
    assert names == [*(f'{i}.png' for i in range(6)), 'folder.jpg/0.png']
    reasons = {entry['file_name']: entry['error'] for entry in found['failed']}
    facts = {
        '1b.png': 'no bytes',
        'bomb.png': 'PIXELS',
        'hard.png': '7 rows',
        'io.png': 'Input/output error',
        'text.png': 'text.png',
    }
    printed = capsys.readouterr().out
    assert reasons.keys() == facts.keys()
    for name, fact in facts.items():
        assert fact in reasons[name] and str(photos / name) in printed
    assert '7 of 12 images' in printed


@pytest.mark.parametrize('lines', [0.5, 3.5, 5])
def test_a_resumed_run_equals_one_that_was_not_stopped(
    lines: float,
    detect: list[str],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was killed after some lines, and while it wrote an image or the result."""
    out = photos / 'out'  # its images are none of the photos
    args = [*detect[:2], photos, f'--out={out}', *detect[2:]]
    assert run(*args) == 1
    whole = content(out)
    file = out / 'predictions.jsonl'
    first, *rest = file.read_bytes().splitlines(keepends=True)
    assert len(rest) == 6
    kept = rest[: int(lines)]
    half = rest[int(lines)][:40] if lines % 1 else b''
    file.write_bytes(first + b''.join(kept) + half)
    for name in ('predictions.json', 'images.json', 'images/5.png'):
        (out / name).unlink()
    (out / 'images' / '.0123456789ab.part').write_bytes(b'half an image')
    read, seen = Predictor.read, []
    monkeypatch.setattr(
        Predictor, 'read', lambda self, path: seen.append(path) or read(self, path)
    )
    assert run(*args, '--resume') == 1
    assert content(out) == whole
    # Batches are 0 1, 1b 2, 3 4 and 5. What was done is not read again.
    read_again = {Path(path).stem for path in seen}
    done = {0.5: set(), 3.5: {'0', '1'}, 5: {'0', '1', '3', '4'}}
    assert read_again == {'0', '1', '1b', '2', '3', '4', '5'} - done[lines]


def test_two_processes_in_one_folder(
    classify: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each writes lines between those of the other."""
    whole, out = tmp_path / 'whole', tmp_path / 'out'
    assert run(*classify, photos, f'--out={whole}', '--no-images') == 1
    *_, other = (whole / 'predictions.jsonl').read_bytes().splitlines(keepends=True)
    dumps = json.dumps

    def dumps_after_another(record):
        if 'found' in record:
            with (out / 'predictions.jsonl').open('ab') as lines:
                lines.write(other)
        return dumps(record)

    monkeypatch.setattr(json, 'dumps', dumps_after_another)
    assert run(*classify, photos, f'--out={out}', '--no-images') == 1
    assert content(out) == content(whole)


def test_what_resume_goes_on_with(
    classify: list[str],
    detect: list[str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (photos / '1b.png').unlink()
    out, other = tmp_path / 'out', tmp_path / 'other.pth'
    args = [*classify, photos, f'--out={out}', '--no-images']
    assert run(*args, '--resume') == 0  # with nothing to resume
    whole = content(out)
    torch.save(dict(torch.load(classify[1]), more=0), other)
    lines = out / 'predictions.jsonl'
    lines.with_name('damaged').mkdir()
    (out / 'damaged' / 'predictions.jsonl').write_text('no run')
    for change, fact in (
        ([], '--resume'),
        (['--resume', '--batch-size=2'], 'batch_size'),
        (['--resume', '--cfg-options', 'randomness.seed=1'], 'config'),
        ([f'--out={out / "damaged"}', '--resume'], 'damaged'),
        ([f'--out={photos}', '--resume'], 'photos'),
    ):
        assert run(*args, *change) == 2
        assert fact in capsys.readouterr().err.splitlines()[-1]
    assert run(classify[0], other, *args[2:], '--resume') == 2
    assert 'other checkpoint' in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(out / 'damaged')
    assert content(out) == whole

    # An image that has changed is read again, a new one is added.
    shutil.copy(photos / '3.png', photos / '0.png')
    shutil.copy(photos / '3.png', photos / '6.png')
    assert run(*args, '--resume') == 0
    entries = json.loads((out / 'predictions.json').read_text())
    of = {i: [e['score'] for e in entries if e['image_id'] == i] for i in (1, 4, 7)}
    assert of[1] == of[4] == of[7]


def test_a_full_disk_or_a_wrong_folder(
    classify: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, out = tmp_path / 'whole', tmp_path / 'out'
    assert run(*classify, photos, f'--out={whole}') == 1
    size = max(len(text) for text in content(whole).values())
    with full_disk(size - 1):
        assert run(*classify, photos, f'--out={out}') == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert str(out / 'images') in sentence and '--resume' in sentence
    assert run(*classify, photos, f'--out={out}', '--resume') == 1
    assert content(out) == content(whole)

    file = tmp_path / 'file'
    file.touch()
    assert run(*classify, photos, f'--out={file / "out"}') == 2
    assert str(file) in capsys.readouterr().err.splitlines()[-1]


def test_names_of_any_kind(classify: list[str], photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos)
    photos.mkdir()
    names = [b'a.bmp', b'a.bmp.jpg', b'\xff\xfe.png', b'x' * 250 + b'.jpg']
    names.append(b'y' * 250 + b'.bmp')
    _, png = cv2.imencode('.png', draw(np.random.default_rng(0), 0)[0])
    for name in names:
        (photos / os.fsdecode(name)).write_bytes(png.tobytes())
    out = tmp_path / 'out'
    assert run(*classify, photos, f'--out={out}') == 0
    assert len(os.listdir(out / 'images')) == len(names)
    index = COCO(out / 'images.json')
    found = {os.fsencode(image['file_name']) for image in index.imgs.values()}
    assert found == set(names)
    for image in index.imgs.values():
        assert cv2.imdecode(np.fromfile(photos / image['file_name'], np.uint8), 1).size
    (out / 'predictions.jsonl').read_bytes().decode()


def test_drawn_images_have_names_of_their_own() -> None:
    names = ['a.bmp', 'a.bmp.jpg', 'a.bmp.jpg.jpg', 'b/a.bmp', 'c.tif', 'd.JPG']
    drawn = drawn_names(names)
    assert drawn['c.tif'] == 'c.tif.jpg' and drawn['d.JPG'] == 'd.JPG'
    assert len(set(drawn.values())) == len(names)


def peak() -> int:
    """The most memory of this process since the last call, in bytes."""
    (kilobytes,) = (
        int(line.split()[1])
        for line in Path('/proc/self/status').read_text().splitlines()
        if line.startswith('VmHWM')
    )
    Path('/proc/self/clear_refs').write_text('5')
    return 1024 * kilobytes


def test_a_large_image_is_in_memory_once(detect: list[str], tmp_path: Path) -> None:
    """Of 6,000 x 6,000 pixels, cut into tiles. The drawn image has 2,048 x 2,048."""
    peaks = []
    for side in (2100, 6000):
        image = np.zeros((side, side, 3), np.uint8)
        image[::50] = 255
        file = tmp_path / f'{side}.png'
        cv2.imwrite(str(file), image)
        del image
        peak()
        out = tmp_path / f'{side}'
        run(*detect[:2], file, f'--out={out}', '--tile=1500', *detect[2:])
        peaks.append(peak())
    assert peaks[1] - peaks[0] < 1.5 * 6000**2 * 3


@pytest.mark.parametrize(
    ('suffix', 'turn'), [('.jpg', 6), ('.png', 6), ('.bmp', 1), ('.tif', 1)]
)
def test_a_large_image_is_read_as_a_small_one(
    suffix: str, turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned by its EXIF entry, and cut off."""
    monkeypatch.setattr(predictor, 'LARGE', 1)
    file, load = tmp_path / f'a{suffix}', LoadImageFromFile()
    pixels = np.random.default_rng(0).integers(0, 255, (300, 200, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    Image.fromarray(pixels).save(file, exif=exif)
    expected = load(dict(img_path=str(file)))['img']
    assert np.array_equal(predictor.read_large(str(file), load), expected)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert predictor.read_large(str(file), load) is None

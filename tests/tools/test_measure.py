"""Times, memory, benchmark.py and the page that it writes."""

import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsnet_mm
from evidence.report import fill
from measure import against, detectors, page, rows
from measure.memory import peak_in_child
from measure.rows import Panel
from measure.turns import time_in_turns
from tests.conftest import tool

PANEL = Panel('inference', (64, 64), 'float32', 1)


@pytest.fixture(scope='module')
def benchmark():
    return tool('analysis_tools/benchmark.py')


@pytest.fixture
def one_thread() -> Iterator[list[str]]:
    """Returns the option for one thread, and restores the number of threads."""
    threads = torch.get_num_threads()
    yield ['--threads', '1']
    torch.set_num_threads(threads)


# --- Parts ------------------------------------------------------------------------


def test_calls_take_turns():
    done = []
    calls = {name: lambda name=name: done.append(name) for name in 'ab'}
    times = time_in_turns(calls, range(3))
    assert done == list('ababab')
    assert {name: len(seconds) for name, seconds in times.items()} == dict(a=2, b=2)


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_memory():
    mib = 64
    peak = peak_in_child(partial, torch.ones, mib * 2**18)  # of four bytes
    assert peak == pytest.approx(mib, abs=2)
    with pytest.raises(ZeroDivisionError):
        peak_in_child(partial, divmod, 1, 0)


def test_outputs():
    """All backbones return four maps. Those of DS-Net agree with and without a cap."""
    panel = PANEL._replace(size=(64, 96), cap=256)  # which is above all maps
    first, image = None, torch.randn(1, 3, 64, 96)
    for key in rows.NAMES['backbone']:
        if rows.timm is None and key in rows.TIMM:
            continue
        with torch.inference_mode():
            outs = rows.build(key, panel)(image)
        assert len(outs) == 4 and all(torch.isfinite(out).all() for out in outs)
        first = outs if first is None else first
        if key in ('uncapped', 'plain'):  # They have the same weights.
            torch.testing.assert_close(outs, first, rtol=1e-3, atol=1e-4)


def test_cap_is_that_of_ours_alone():
    panel = PANEL._replace(cap=3, network='neck', mode='training')
    caps = {
        (network, key): {
            block.max_global_tokens
            for block in rows.build(key, panel._replace(network=network)).modules()
            if hasattr(block, 'max_global_tokens')
        }
        for network in ('backbone', 'neck')
        for key in ('ours', 'uncapped')
    }
    assert [cap for (cap,) in caps.values()] == [3, None, 3, None]


@pytest.mark.parametrize('dtype', rows.DTYPES)
def test_necks(dtype):
    pytest.importorskip('mmdet')
    panel = PANEL._replace(network='neck', mode='training', size=(96, 128), dtype=dtype)
    results = rows.measure(panel, ['ours', 'fpn'], range(2))
    assert [row['error'] for row in results] == [None, None]
    maps = [torch.ones(1, c, 9, 9) for c in rows.CHANNELS.values()]
    maps = [x.to(memory_format=torch.channels_last) for x in maps]
    assert all(x.is_contiguous() for x in rows.build('fpn', panel)(maps))


def test_parts_of_a_detector(monkeypatch):
    """All have the same proposals and detections; a step leaves no gradients."""
    pytest.importorskip('mmdet')
    monkeypatch.setattr(detectors, 'PROPOSALS', 40)
    monkeypatch.setattr(detectors, 'DETECTIONS', 6)
    built = []
    build = detectors.build_detector
    monkeypatch.setattr(
        detectors, 'build_detector', lambda *a: built.append(build(*a)) or built[-1]
    )
    panel = PANEL._replace(network='detector', cap=3)
    for mode, key in (('inference', 'ours'), ('training', 'resnet50')):
        (result,) = rows.measure(panel._replace(mode=mode), [key], range(2))
        assert result['error'] is None
        parts = [result[f'{part}_ms'] for part in rows.PARTS]
        assert min(parts) > 0 and sum(parts) == pytest.approx(result['ms'])
    fused, trained = built
    assert not fused.training and all(p.grad is None for p in trained.parameters())
    monkeypatch.setattr(detectors, 'DETECTIONS', 39)
    (result,) = rows.measure(panel, ['ours'], range(2))
    assert re.search('RuntimeError.*39', result['error'])


def test_plain_model_only_uses_operators_of_pytorch():
    namespaces = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        rows.build('plain', PANEL)(torch.randn(1, 3, 64, 64))
    assert namespaces == {'aten'}


# --- benchmark.py -----------------------------------------------------------------


def test_tables(benchmark, one_thread, monkeypatch, capsys):
    measured, peaks = [], []
    monkeypatch.setattr(benchmark, 'peak_in_child', lambda *a: peaks.append(a) or 77.0)
    measure = benchmark.measure
    monkeypatch.setattr(
        benchmark, 'measure', lambda *a: measured.extend(measure(*a)) or measured[-2:]
    )
    argv = [
        '--size',
        '64',
        '--batch',
        '1',
        '--turns',
        '2',
        '--dtype',
        'float32',
        '--models',
        'ours',
        'plain',
    ]
    benchmark.main([*argv, *one_thread])
    out = capsys.readouterr().out
    assert 'backbone, training, 1 x 64x64, float32' in out and ' 77 ' in out
    assert [row['key'] for row in measured] == ['ours', 'plain'] * 2
    assert [make for make, *_ in peaks] == [rows.prepare] * 4
    for i, row in enumerate(measured):
        assert row['us_per_pixel'] == pytest.approx(1e3 * row['ms'] / 64**2)
        ours = measured[i - i % 2]
        assert row['times_ours'] == pytest.approx(row['ms'] / ours['ms'])
        assert row['turns'] == 1 and not row['error'] and row['ms'] > 0


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        ('--models ours resnet', "'resnet'"),
        ('--network detector', '--dtype float32'),
        ('--max-global-tokens -1', '--max-global-tokens .*0.*-1'),
        ('--size 64x', 'HEIGHTxWIDTH'),
        ('--size 16', "32.*'16'"),
        ('--turns 1', '--turns .*2.*1'),
        ('--batch 0', '--batch .*1.*0'),
        ('--against nowhere', 'nowhere'),
        ('--against . --models ours', '--models'),
        ('--against . --turns 2', '3 --turns.*2'),
    ],
)
def test_wrong_arguments(benchmark, args, fact, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(args.split())
    message = ' '.join(capsys.readouterr().err.split()).partition(' error: ')[2]
    assert re.search(fact, message)


def test_without_timm(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'timm', None)
    assert benchmark.parse_args([]).models == ['ours', 'uncapped', 'plain', 'fpn']
    with pytest.raises(SystemExit):
        benchmark.parse_args(['--models', 'swin_t'])
    assert 'pip install timm' in capsys.readouterr().err


def test_error_of_a_model_is_in_the_table(monkeypatch):
    monkeypatch.setattr(rows, 'reference_net', lambda *args: 1 / 0)
    ours, plain = rows.measure(PANEL, ['ours', 'plain'], range(2))
    assert plain['ms'] is None and plain['error'].startswith('ZeroDivisionError: ')
    assert ours['ms'] > 0


# --- The page ---------------------------------------------------------------------


def test_page_is_made_from_the_record():
    text, rows = page.PAGE.read_text(), page.read_csv()
    made = fill(text, page.sections(rows))
    assert made == text, 'run tools/analysis_tools/benchmark.py --report'
    assert not rows or page.PLOT.is_file()


def test_record_goes_on_after_a_kill(
    benchmark, one_thread, tmp_path, monkeypatch, capsys
):
    pytest.importorskip('timm')
    pytest.importorskip('mmdet')
    for name in ('RECORD', 'PAGE', 'PLOT'):
        monkeypatch.setattr(page, name, tmp_path / f'speed.{name.lower()}')
    shutil.copy(page.ROOT / 'docs' / 'speed.md', page.PAGE)
    measured, kill_at = [], 2

    def measure(panel, keys, turns):
        if len(measured) == kill_at:
            raise KeyboardInterrupt
        measured.append(panel)
        results = []
        for key in (key for key in rows.NAMES[panel.network] if key in keys):
            ms = dict(swin_t=500.0, resnet50=2000.0).get(key, 1000.0)
            empty = dict.fromkeys((*rows.COLUMNS, 'layout', 'turns', 'error'))
            parts = {f'{part}_ms': ms / 4 for part in rows.PARTS}
            found = dict(ms=ms, us_per_pixel=ms / panel.size[0], times_ours=ms / 1e3)
            results.append(dict(key=key, model=key) | empty | found | parts)
        return results

    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr(benchmark, 'peak_in_child', lambda *args: 77.0)
    monkeypatch.setattr(benchmark, 'commit', lambda: 'a1')
    argv, panels = ['--record', *one_thread], page.panels_of_page()
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(argv)
    kill_at = None
    benchmark.main(argv)
    assert measured == panels, 'each panel once'
    text = page.PAGE.read_text()
    assert 'TO-MEASURE' not in text and 'commit a1' in text
    line = '| inference, float32, 448x448 | 2.23 | 1.00 | - | **0.50** | 2.00 | 1.00 |'
    assert line in text
    assert '| training, Swin-T, FPN | 0.50 | **0.50** | 25% | 25% | 25% | 25% |' in text
    assert '| training, bfloat16 | 1.00 | 1.00 |' in text
    assert '| inference | 77 | 77 | 77 |' in text
    assert page.PLOT.read_bytes().startswith(b'\x89PNG')

    monkeypatch.setattr(benchmark, 'commit', lambda: 'b2')
    benchmark.main(argv)
    assert measured == panels * 2, 'another commit is measured anew'
    record = page.read_csv()
    assert {row['commit'] for row in record} == {'b2'}
    with pytest.raises(ValueError, match='commit is a1 and b2'):
        page.sections([record[0], record[1] | dict(commit='a1')])
    monkeypatch.setattr(benchmark, 'commit', lambda: 'b2+')
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert '--record' in capsys.readouterr().err


# --- Two checkouts ----------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Returns a second checkout: a copy of this package with its compiled ops."""
    package = Path(dsnet_mm.__file__).parent
    ignored = shutil.ignore_patterns('__pycache__', 'csrc', 'few_shot', 'demo')
    shutil.copytree(package, tmp_path / 'other' / 'dsnet_mm', ignore=ignored)
    return tmp_path / 'other'


def test_against_another_checkout(benchmark, checkout, one_thread, capsys):
    """The ratio is new over old. The old checkout sleeps 1 s in each call."""
    slow = checkout / 'dsnet_mm' / 'models' / '__init__.py'
    slow.write_text(
        slow.read_text()
        + """
import time
_forward = DSNet.forward
def _slow_forward(self, x):
    time.sleep(1)
    return _forward(self, x)
DSNet.forward = _slow_forward
"""
    )
    argv = ['--against', str(checkout), '--size', '64', '--batch', '2', *one_thread]
    argv += ['--turns', '3', '--mode', 'training', '--dtype', 'bfloat16']
    benchmark.main(argv)
    line = next(r for r in capsys.readouterr().out.splitlines() if '2 x 64x64' in r)
    title, old, new, ratio, quartiles = (
        cell.strip() for cell in line.strip('│').split('│')
    )
    assert title == 'backbone, training, 2 x 64x64, bfloat16'
    assert float(old) > 1000
    low, high = map(float, quartiles.split(' to '))
    assert float(new) > 0 and low <= float(ratio) <= high


def test_workers_take_turns(monkeypatch):
    order = []

    class Worker(against.Worker):
        def __init__(self, checkout, case):
            self.checkout, self.case = checkout, case

        def check(self):
            pass

        def time(self):
            order.append(self.checkout)
            return 0.2 if self.checkout == Path('old') else 0.1

        def stop(self):
            order.append('stopped')

    monkeypatch.setattr(against, 'Worker', Worker)
    fused, unfused = against.compare(Path('old'), [PANEL], 3, 1)
    old, new = Path('old'), against.NEW
    assert order[:8] == [old, new, new, old, old, new, 'stopped', 'stopped']
    assert (fused['row'], unfused['row']) == (
        'backbone, inference, 1 x 64x64, float32, fused',
        'backbone, inference, 1 x 64x64, float32, not fused',
    )
    assert (fused['old_ms'], fused['new_ms'], fused['ratio']) == (200, 100, 0.5)


def test_error_of_a_worker(checkout, capfd):
    (checkout / 'dsnet_mm' / 'models' / '__init__.py').write_text('1 / 0')
    with pytest.raises(RuntimeError, match=f'{checkout}.*1'):
        next(against.compare(checkout, [PANEL], 3, 1))
    assert 'ZeroDivisionError' in capfd.readouterr().err


def test_only_one_of_the_checkouts_has_compiled_ops(checkout):
    against.check_checkout(checkout)
    binaries = list(checkout.glob('dsnet_mm/ops/_C.*'))
    for binary in binaries:
        binary.unlink()
    if not binaries:
        (checkout / 'dsnet_mm/ops/_C.so').touch()
    with pytest.raises(ValueError, match=f'{checkout}.*build_ext'):
        against.check_checkout(checkout)

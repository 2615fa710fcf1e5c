"""Counts, times, memory, benchmark.py and get_flops.py."""

import csv
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
from measure import against, rows
from measure.memory import peak_in_child
from measure.rows import Panel, Row
from measure.turns import time_in_turns
from tests.conftest import tool

SMALL = ['--size', '64', '--batch', '1', '--turns', '2', '--dtype', 'float32']
PANEL = Panel('inference', (64, 64), 'float32', 1)


@pytest.fixture(scope='module')
def benchmark():
    return tool('analysis_tools/benchmark.py')


@pytest.fixture(autouse=True)
def quick_product(monkeypatch):
    """Times a small matrix product instead of a large one."""
    monkeypatch.setattr(rows, 'PRODUCT', (64, 64, 64))


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
    """All models return finite logits or four feature maps. Those of DS-Net agree."""
    keys = [k for k, m in rows.MODELS.items() if rows.timm or m[1] is None]
    for panel, shapes in ((PANEL, 1), (PANEL._replace(size=(64, 96)), 4)):
        image = torch.randn(1, 3, *panel.size)
        first = None
        for row in rows.rows_of(panel, keys):
            if row.layout == 'channels_last':
                continue
            with torch.inference_mode():
                outs = rows.build(row, panel)(image)
            outs = [outs] if panel.classifies else outs
            assert len(outs) == shapes
            assert all(torch.isfinite(out).all() for out in outs)
            first = outs if first is None else first
            if row.key in ('ours', 'plain'):  # They have the same weights.
                torch.testing.assert_close(outs, first, rtol=1e-3, atol=1e-4)


def test_plain_model_only_uses_operators_of_pytorch():
    namespaces = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        rows.build(Row('plain'), PANEL)(torch.randn(1, 3, 64, 64))
    assert namespaces == {'aten'}


# --- benchmark.py -----------------------------------------------------------------


def test_table_plot_and_existing_files(
    benchmark, one_thread, tmp_path, monkeypatch, capsys
):
    peaks = []
    monkeypatch.setattr(benchmark, 'peak_in_child', lambda *a: peaks.append(a) or 5.0)
    argv = ['--models', 'ours', 'plain', *SMALL, *one_thread]
    benchmark.main([*argv, '--out', str(tmp_path), '--profile'])
    out = capsys.readouterr().out
    assert 'training, 1 x 64x64, float32' in out
    assert 'aten::mm' in out  # the profile

    with open(tmp_path / 'benchmark.csv', newline='') as file:
        results = list(csv.DictReader(file))
    assert [(row['mode'], row['model']) for row in results] == [
        ('inference', 'DS-Net-S*'),
        ('inference', 'DS-Net-S*, not fused'),
        ('inference', 'plain DS-Net-S*'),
        ('training', 'DS-Net-S*'),
        ('training', 'plain DS-Net-S*'),
    ]
    assert [make for make, *_ in peaks] == [rows.prepare] * 5
    ours = {row['mode']: row for row in results if row['model'] == 'DS-Net-S*'}
    for row in results:
        ms, gflop = float(row['ms']), float(row['gflop'])
        assert ms > 0
        assert float(row['images_per_s']) == pytest.approx(1e3 / ms)
        times_ours = ms / float(ours[row['mode']]['ms'])
        assert float(row['times_ours']) == pytest.approx(times_ours)
        floor = gflop / float(row['peak_gflops']) * 1e3
        assert float(row['floor_ms']) == pytest.approx(floor)
        assert float(row['floor_fraction']) == pytest.approx(floor / ms)
        assert (row['size'], row['dtype'], row['batch']) == ('64x64', 'float32', '1')
        assert (row['threads'], row['torch']) == ('1', torch.__version__)
        assert row['machine'] and row['date'] and not row['error']
        assert float(row['peak_mib']) == 5
        dropped = 0.1 if row['mode'] == 'training' else 0
        assert float(row['attn_drop_rate']) == dropped
    infer, train = (float(ours[mode]['gflop']) for mode in ('inference', 'training'))
    assert train == pytest.approx(3 * infer)
    # 3.546 G at 224x224, times the ratio of the pixels, and a little more.
    plain = next(row for row in results if row['model'] == 'plain DS-Net-S*')
    assert infer < float(plain['gflop']) < 2 * 3.546 * (64 / 224) ** 2
    assert (tmp_path / 'benchmark.png').read_bytes().startswith(b'\x89PNG')

    (tmp_path / 'benchmark.csv').write_text('old')
    with pytest.raises(SystemExit):
        benchmark.main([*argv, '--out', str(tmp_path)])
    assert 'benchmark.csv' in capsys.readouterr().err
    assert (tmp_path / 'benchmark.csv').read_text() == 'old'


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        ('--models ours resnet', "'resnet'"),
        ('--size 64x', 'HEIGHTxWIDTH'),
        ('--size 16', "32.*'16'"),
        ('--turns 1', '--turns .*2.*1'),
        ('--batch 0', '--batch .*1.*0'),
        ('--attn-drop-rate 1', r'--attn-drop-rate .*1\.0'),
        (f'--out {__file__}', __file__),
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
    assert benchmark.parse_args([]).models == ['ours', 'sdpa', 'plain']
    with pytest.raises(SystemExit):
        benchmark.parse_args(['--models', 'swin_t'])
    assert 'pip install timm' in capsys.readouterr().err


def test_error_of_a_model_is_in_the_table(monkeypatch):
    monkeypatch.setattr(rows, 'reference_net', lambda *args: 1 / 0)
    results = rows.measure(PANEL, rows.rows_of(PANEL, ['ours', 'plain']), range(2))
    plain = results[Row('plain')]
    assert plain['ms'] is None and plain['error'].startswith('ZeroDivisionError: ')
    assert results[Row('ours')]['ms'] > 0


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
    assert title == 'training, 2 x 64x64, bfloat16'
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
        'inference, 1 x 64x64, float32, fused',
        'inference, 1 x 64x64, float32, not fused',
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

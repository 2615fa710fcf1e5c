"""benchmark.py: tables, models, memory, and the comparison of two checkouts."""

import csv
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsnet_mm
from measure import against, models, timing
from measure.memory import peak_in_child
from measure.models import Panel, Row, Settings

TOOL = Path(__file__).resolve().parents[2] / 'tools/analysis_tools/benchmark.py'
CLEAR_REFS = Path('/proc/self/clear_refs')
SMALL = ['--size', '64', '--batch', '1', '--turns', '2', '--dtype', 'float32']


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quick_product(monkeypatch):
    """Times a small matrix product instead of a large one."""
    monkeypatch.setattr(timing, 'PRODUCT', (64, 64, 64))


def settings(*models: str, turns: int = 2) -> Settings:
    return Settings(models, False, 'cpu', 1, turns, 0.0)


@pytest.fixture
def one_thread():
    """Returns the option for one thread, and restores the number of threads."""
    threads = torch.get_num_threads()
    yield ['--threads', '1']
    torch.set_num_threads(threads)


def test_table_plot_and_existing_files(benchmark, one_thread, tmp_path, capsys):
    argv = ['--models', 'ours', 'plain', *SMALL, *one_thread, '--no-memory']
    benchmark.main([*argv, '--out', str(tmp_path), '--profile'])
    out = capsys.readouterr().out
    assert 'training, 1 x 64x64, float32' in out
    assert 'aten::mm' in out  # the profile

    with open(tmp_path / 'benchmark.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['mode'], row['model']) for row in rows] == [
        ('inference', 'DS-Net-S*'),
        ('inference', 'DS-Net-S*, not fused'),
        ('inference', 'plain DS-Net-S*'),
        ('training', 'DS-Net-S*'),
        ('training', 'plain DS-Net-S*'),
    ]
    ours = {row['mode']: row for row in rows if row['model'] == 'DS-Net-S*'}
    for row in rows:
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
        assert not row['peak_mib']
    infer, train = (float(ours[mode]['gflop']) for mode in ('inference', 'training'))
    assert train == pytest.approx(3 * infer)
    # 3.546 G at 224x224, times the ratio of the pixels, and a little more.
    plain = next(row for row in rows if row['model'] == 'plain DS-Net-S*')
    assert infer < float(plain['gflop']) < 2 * 3.546 * (64 / 224) ** 2
    assert (tmp_path / 'benchmark.png').read_bytes().startswith(b'\x89PNG')

    (tmp_path / 'benchmark.csv').write_text('old')
    with pytest.raises(SystemExit):
        benchmark.main([*argv, '--out', str(tmp_path)])
    assert 'benchmark.csv exists; replace it by --overwrite' in capsys.readouterr().err
    assert (tmp_path / 'benchmark.csv').read_text() == 'old'


@pytest.mark.parametrize(
    ('argv', 'sentence'),
    [
        (['--models', 'ours', 'resnet'], "invalid choice: 'resnet'"),
        (['--size', '64x'], 'a size is one number or HEIGHTxWIDTH'),
        (['--size', '16'], "of 32 pixels at least, got '16'"),
        (['--turns', '1'], '--turns is 2 at least, got 1.'),
        (['--batch', '0'], '--batch is 1 at least, got 0.'),
        (['--attn-drop-rate', '1'], '--attn-drop-rate lies in [0, 1), got 1.0.'),
        (['--out', __file__], '--out is a folder, but'),
        (['--against', 'nowhere'], 'there is no dsnet_mm in'),
        (['--against', '.', '--models', 'ours'], 'leave out --models.'),
        (['--against', '.', '--turns', '2'], '--against takes 3 --turns at least'),
    ],
)
def test_bad_arguments(benchmark, argv, sentence, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert sentence in capsys.readouterr().err


def test_without_timm(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'timm', None)
    assert benchmark.parse_args([]).models == ['ours', 'plain']
    with pytest.raises(SystemExit):
        benchmark.main(['--models', 'swin_t'])
    assert 'pip install timm' in capsys.readouterr().err


def test_error_of_a_model_is_in_the_table(benchmark, one_thread, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError('two\nlines')

    monkeypatch.setattr(models, 'reference_net', fail)
    argv = ['--models', 'ours', 'plain', *SMALL, *one_thread, '--no-memory']
    benchmark.main([*argv, '--mode', 'inference'])
    out = capsys.readouterr().out
    assert 'RuntimeError: two lines' in ' '.join(out.replace('│', ' ').split())


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_outputs(size):
    """All models return finite logits or four feature maps. Those of DS-Net agree."""
    panel = Panel('inference', size, 'float32', 1)
    keys = [k for k, m in models.MODELS.items() if models.timm or m[1] is None]
    rows = models.rows_of(panel, settings(*keys))
    rows = [row for row in rows if row.layout == 'contiguous']
    image = torch.randn(1, 3, *size)
    first = None
    for row in rows:
        net = models.build(row, panel, 0.1)
        with torch.inference_mode():
            outs = net(image)
        outs = [outs] if panel.classifies else outs
        assert len(outs) == (1 if panel.classifies else 4)
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

    panel = Panel('inference', (64, 64), 'float32', 1)
    net = models.build(Row('plain'), panel, 0.0)
    with torch.no_grad(), Watch():
        net(torch.randn(1, 3, 64, 64))
    assert namespaces == {'aten'}


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason='needs /proc of Linux')
def test_memory():
    """For a small image, a training step needs little more than the gradients."""
    panel = Panel('training', (64, 64), 'float32', 1)
    peak = peak_in_child(Row('plain'), panel, settings('plain'))
    net = models.build(Row('plain'), panel, 0.0)
    gradients = sum(param.nbytes for param in net.parameters()) / 2**20
    assert gradients < peak < 1.5 * gradients


# --- Two checkouts --------------------------------------------------------------

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Returns a second checkout: a copy of this package with its compiled ops."""
    package = Path(dsnet_mm.__file__).parent
    ignored = shutil.ignore_patterns('__pycache__', 'csrc')
    shutil.copytree(package, tmp_path / 'other' / 'dsnet_mm', ignore=ignored)
    return tmp_path / 'other'


def test_against_another_checkout(checkout):
    """The ratio is new over old. The old checkout sleeps 0.3 s in each call."""
    slow = checkout / 'dsnet_mm' / 'models' / '__init__.py'
    slow.write_text(
        slow.read_text()
        + """
import time
_forward = DSNet.forward
def _slow_forward(self, x):
    time.sleep(0.3)
    return _forward(self, x)
DSNet.forward = _slow_forward
"""
    )
    panels = [
        Panel('inference', (64, 96), 'bfloat16', 1),
        Panel('training', (64, 64), 'float32', 2),
    ]
    results = list(against.compare(checkout, panels, settings(turns=4), TINY))
    assert [result['row'] for result in results] == [
        'inference, 1 x 64x96, bfloat16, fused',
        'inference, 1 x 64x96, bfloat16, not fused',
        'training, 2 x 64x64, float32',
    ]
    for result in results:
        assert result['old_ms'] > 300 > result['new_ms'] > 0
        low, high = result['quartiles']
        assert 0 < low <= result['ratio'] <= high < 1


def test_table_of_a_comparison(benchmark, one_thread, checkout, capsys, monkeypatch):
    def compare(old, panels, settings):
        assert (old, settings.turns) == (checkout, 3)
        for panel in panels:
            times = dict(old_ms=200.0, new_ms=206.0)
            ratios = dict(ratio=1.03, quartiles=(1.01, 1.04))
            yield dict(row=panel.title, **times, **ratios)

    monkeypatch.setattr(benchmark, 'compare', compare)
    argv = ['--against', str(checkout), '--size', '64', '--turns', '3', *one_thread]
    benchmark.main([*argv, '--mode', 'training', '--dtype', 'float32'])
    line = next(r for r in capsys.readouterr().out.splitlines() if '8 x 64x64' in r)
    cells = [cell.strip() for cell in line.strip('│').split('│')]
    title = 'training, 8 x 64x64, float32'
    assert cells == [title, '200.0', '206.0', '1.030', '1.010 to 1.040']


def test_error_of_a_worker(checkout, capfd):
    (checkout / 'dsnet_mm' / 'models' / '__init__.py').write_text('1 / 0')
    panel = Panel('inference', (64, 64), 'float32', 1)
    with pytest.raises(RuntimeError, match=f'worker of {checkout} ended with status 1'):
        next(against.compare(checkout, [panel], settings(turns=3), TINY))
    assert 'ZeroDivisionError' in capfd.readouterr().err


def test_only_one_of_the_checkouts_has_compiled_ops(checkout, monkeypatch):
    against.check_checkout(checkout)
    binaries = list(checkout.glob('dsnet_mm/ops/_C.*'))
    for binary in binaries:
        binary.unlink()
    if not binaries:
        (checkout / 'dsnet_mm/ops/_C.so').touch()
    with pytest.raises(ValueError, match=r'are compiled in .* and not in'):
        against.check_checkout(checkout)

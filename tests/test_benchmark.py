import argparse
import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

TOOL = Path(__file__).resolve().parents[1] / 'tools/analysis_tools/benchmark.py'
CLEAR_REFS = Path('/proc/self/clear_refs')
SMALL = ['--size', '64', '--batch', '1', '--turns', '2', '--dtype', 'float32']


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PRODUCT = (64, 64, 64)  # quick; no figure is looked at here
    return module


@pytest.fixture
def one_thread():
    """The option for it; the process is left with as many as it had."""
    threads = torch.get_num_threads()
    yield ['--threads', '1']
    torch.set_num_threads(threads)


def test_table_plot_and_refusal(benchmark, one_thread, tmp_path, capsys):
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
        assert float(row['pictures_per_s']) == pytest.approx(1e3 / ms)
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
    # Of 3.546 G at 224, a little more than 224**2 / 64**2 times as many.
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


def test_a_failing_row_is_reported(benchmark, one_thread, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError('two\nlines')

    monkeypatch.setattr(benchmark, 'reference_net', fail)
    argv = ['--models', 'ours', 'plain', *SMALL, *one_thread, '--no-memory']
    benchmark.main([*argv, '--mode', 'inference'])
    out = capsys.readouterr().out
    assert 'RuntimeError: two lines' in ' '.join(out.replace('│', ' ').split())


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_outputs(benchmark, size):
    """All models give finite logits, or maps of four stages; ours agree."""
    panel = benchmark.Panel('inference', size, 'float32', 1)
    keys = [k for k, m in benchmark.MODELS.items() if benchmark.timm or m[1] is None]
    args = argparse.Namespace(models=keys, compile=False)
    rows = [r for r in benchmark.rows_of(args, panel) if r.layout == 'contiguous']
    picture = torch.randn(1, 3, *size)
    first = None
    for row in rows:
        net = benchmark.build(row, panel, 0.1)
        with torch.inference_mode():
            outs = net(picture)
        outs = [outs] if panel.classifies else outs
        assert len(outs) == (1 if panel.classifies else 4)
        assert all(torch.isfinite(out).all() for out in outs)
        first = outs if first is None else first
        if row.key in ('ours', 'plain'):  # of the same weights, as of the same seed
            torch.testing.assert_close(outs, first, rtol=1e-3, atol=1e-4)


def test_the_plain_row_is_plain(benchmark):
    """It runs PyTorch's own operators, and none of what makes ours faster."""
    namespaces = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    panel = benchmark.Panel('inference', (64, 64), 'float32', 1)
    net = benchmark.build(benchmark.Row('plain'), panel, 0.0)
    with torch.no_grad(), Watch():
        net(torch.randn(1, 3, 64, 64))
    assert namespaces == {'aten'}


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason='needs /proc of Linux')
def test_memory(benchmark):
    """A training step holds the gradients, and for a small picture little else."""
    args = benchmark.parse_args(['--models', 'plain', '--threads', '1'])
    panel = benchmark.Panel('training', (64, 64), 'float32', 1)
    result = dict(model='plain DS-Net-S*', layout='contiguous')
    peak = benchmark.peak_in_child(result, panel, args)
    net = benchmark.build(benchmark.Row('plain'), panel, 0.0)
    gradients = sum(param.nbytes for param in net.parameters()) / 2**20
    assert gradients < peak < 1.5 * gradients

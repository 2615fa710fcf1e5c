import argparse
import csv
import importlib.util
import math
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[1] / 'tools/analysis_tools/benchmark.py'
SMALL = ['--size', '64', '--batch', '1', '--turns', '2', '--dtype', 'float32']


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def all_rows(benchmark, panel, models=None):
    args = argparse.Namespace(models=models or list(benchmark.MODELS), compile=False)
    return benchmark.rows_of(args, panel)


@pytest.mark.usefixtures('keep_threads')
def test_table_plot_and_refusal(benchmark, tmp_path, capsys):
    argv = ['--models', 'ours', 'plain', *SMALL, '--no-memory', '--threads', '1']
    argv += ['--out', str(tmp_path)]
    benchmark.main([*argv, '--profile'])
    out = capsys.readouterr().out
    assert 'training, 1 x 64x64, float32' in out
    assert 'co_attention' in out  # the profile

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
        of_ours = ms / float(ours[row['mode']]['ms'])
        assert float(row['times_ours']) == pytest.approx(of_ours)
        floor = gflop / float(row['peak_gflops']) * 1e3
        assert float(row['floor_ms']) == pytest.approx(floor)
        assert float(row['floor_fraction']) == pytest.approx(floor / ms)
        assert (row['size'], row['dtype'], row['batch']) == ('64x64', 'float32', '1')
        assert row['threads'] == '1' and row['torch'] == torch.__version__
        assert row['machine'] and row['date'] and not row['error']
    infer, train = (float(ours[mode]['gflop']) for mode in ('inference', 'training'))
    assert train == pytest.approx(3 * infer, rel=0.01)
    assert (tmp_path / 'benchmark.png').read_bytes().startswith(b'\x89PNG')

    before = (tmp_path / 'benchmark.csv').stat().st_mtime_ns
    with pytest.raises(SystemExit):
        benchmark.main(argv)
    assert 'benchmark.csv exists; replace it by --overwrite' in capsys.readouterr().err
    assert (tmp_path / 'benchmark.csv').stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ('argv', 'sentence'),
    [
        (['--models', 'ours', 'resnet'], "invalid choice: 'resnet'"),
        (['--size', '64x'], "a size is one number or HEIGHTxWIDTH, of 32 pixels at "),
        (['--size', '16'], "least, got '16'"),
        (['--turns', '1'], '--turns is 2 at least, got 1.'),
        (['--batch', '0'], '--batch is 1 at least, got 0.'),
        (['--attn-drop-rate', '1'], '--attn-drop-rate lies in [0, 1), got 1.0.'),
        (['--out', __file__], 'is a file'),
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


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_outputs(benchmark, size):
    """Logits, or maps of four stages; finite, and alike however they are computed."""
    panel = benchmark.Panel('inference', size, 'float32', 1)
    models = None if benchmark.timm else ['ours', 'plain']
    picture = torch.randn(1, 3, *size)
    state = None
    for row in all_rows(benchmark, panel, models):
        net, multiply_adds = benchmark.build(row, panel, 0.1)
        assert multiply_adds > 2e8
        if row.key in ('ours', 'plain'):
            # The weights are the same: the seed is.
            with torch.inference_mode():
                outs = net(picture)
            state = state or outs
        else:
            with torch.inference_mode():
                outs = net(picture)
        outs = [outs] if panel.classifies else outs
        assert len(outs) == (1 if panel.classifies else 4)
        assert all(torch.isfinite(out).all() for out in outs)

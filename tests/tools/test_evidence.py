"""The measured tables: rows, runs, report, and the weights that come of them."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from dsnet_mm.engine.config import load_config
from dsnet_mm.files import write_atomic
from evidence import publish, report, runs, timing
from evidence.tables import TABLES, Row
from tests.conftest import tool

ROWS = (Row('ours', 'Ours', 'ours', 3), Row('theirs', 'Theirs', 'theirs', 3))
TABLE = TABLES['cifar10']._replace(title='A table', rows=ROWS, size=64)


@pytest.fixture
def table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of two rows with the small classifier, in an empty repository."""
    monkeypatch.chdir(tmp_path)
    data = (folder / 'sets' / 'folders').as_posix()
    text = (folder / 'classifier.py').read_text().replace('data/none', data)
    text += 'custom_hooks = [dict(type="dsnet_mm.CpuTimeHook")]\n'
    text += 'default_hooks = dict(logger=dict(interval=1))\n'
    for row in ROWS:
        (tmp_path / f'{row.name}.py').write_text(text)
    monkeypatch.setitem(TABLES, 'small', TABLE)
    for module in (runs, report, publish, timing):
        for name, path in (
            ('CONFIGS', tmp_path),
            ('RESULTS', tmp_path / 'results'),
            ('WEIGHTS', tmp_path / 'weights'),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, path)
    return tmp_path


def record(folder: Path, row: str, seed: int, accuracy: float) -> dict:
    """Writes a result as a run writes it."""
    result = dict(
        row=row,
        seed=seed,
        metrics={'accuracy/top1': accuracy},
        curve=[{'step': 1, 'accuracy/top1': accuracy, 'loss': 1.0}],
        train_cpu_seconds=10.0,
        model=dict(backbone_params=2_000_000, backbone_multiply_adds=3_000_000),
        machine=dict(processor='P', threads=1),
        versions=dict(torch='2'),
        commit='c0ffee',
    )
    path = folder / 'results' / 'small' / f'{row}-seed{seed}.json'
    write_atomic(path, json.dumps(result))
    return result


@pytest.mark.parametrize(
    'name', [n for n in TABLES if TABLES[n].comparable and '_rates' not in n]
)
def test_backbones_of_a_table_cost_the_same(name: str):
    differences = runs.check_cost(name)
    assert set(differences) == {row.name for row in TABLES[name].rows}


def test_unequal_backbones_are_told(table: Path):
    path = table / 'theirs.py'
    path.write_text(path.read_text() + 'model["backbone"]["mlp_ratio"] = 8.0\n')
    with pytest.raises(ValueError, match=r"the same multiply-adds .*\{'theirs': '\+"):
        runs.check_cost('small')


def test_a_run_goes_on_and_is_recorded_and_published(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    run = runs.Run('small', ROWS[0], 1, table / 'runs', None)
    # A training that ended after its first epoch.
    train = tool('train.py')
    options = ['--cfg-options', 'randomness.seed=1', 'train_cfg.max_epochs=1']
    train.main([str(table / 'ours.py'), '--work-dir', str(run.work_dir), *options])
    result = run.execute()
    assert result['config']['randomness']['seed'] == 1
    assert 0 <= result['metrics']['accuracy/top1'] <= 100
    steps = [point['step'] for point in result['curve'] if 'loss' in point]
    assert steps == [1, 2, 3, 4], 'both trainings, of two iterations an epoch'
    epochs = [point['step'] for point in result['curve'] if 'loss' not in point]
    assert epochs == [1, 2]
    assert 0 < result['train_cpu_seconds'] < 100
    assert result['model']['backbone_multiply_adds'] > 1e5
    runs.write(run, result)
    assert json.loads(run.file.read_text()) == result

    # tests/engine/test_checkpoints.py tests such weights by tools/test.py.
    monkeypatch.setattr(run, 'test', lambda *_: (result['metrics'], 0.0))
    (entry,) = yaml.safe_load(publish.publish(run, 'small'))
    with pytest.raises(FileExistsError, match=r'small\.safetensors exists'):
        publish.publish(run, 'small')
    assert entry['Results'][0]['Metrics'].keys() == {'accuracy'}
    other = table / 'other.py'
    other.write_text((table / 'ours.py').read_text() + 'train_cfg["max_epochs"] = 3\n')
    with pytest.raises(ValueError, match=r'other\.py has another train_cfg than'):
        publish.publish(run, 'small', other, overwrite=True)
    with safe_open(str(table / entry['Weights']), 'pt') as file:
        assert file.metadata()['seed'] == '1'
        assert file.get_tensor('head.fc.weight').dtype == torch.float16
    assert 'seed 1, commit' in (table / 'weights' / 'small.md').read_text()


def test_a_check_has_the_threads_of_the_record(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    record(table, 'ours', 0, 50)  # with one thread
    first, second = (runs.Run('small', ROWS[0], seed, table, None) for seed in (0, 1))
    assert (first.threads, second.threads) == (1, torch.get_num_threads())
    script = 'import torch; assert torch.get_num_threads() == 1'
    runs._call(['-c', script], 1)

    def call(arguments: list[str], threads: int) -> None:
        raise RuntimeError(f'{arguments[0]} with {threads} threads')

    monkeypatch.setattr(runs, '_call', call)
    with pytest.raises(RuntimeError, match=r'train\.py with 1 threads'):
        first.execute()
    with pytest.raises(RuntimeError, match=r'test\.py with 1 threads'):
        first.test('weights.safetensors', table)


def test_a_tool_stops_with_its_caller():
    """Also if it ignores SIGINT, as what a shell starts in the background does."""
    script = 'import time, signal as s; s.signal(s.SIGINT, s.SIG_IGN); time.sleep(60)'
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    # These tests, too, may have been started in the background.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            runs._call(['-c', script], 1)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.perf_counter() - start < 30


def test_rows_are_timed_in_turns(table: Path, monkeypatch: pytest.MonkeyPatch):
    config = str(table / 'ours.py')
    mib = timing.peak_in_child('train', config, {}, 64, None)
    assert 0.1 < mib < 500
    options = {'train_dataloader.batch_size': 2}
    assert timing.peak_in_child('train', config, options, 64, None) < mib
    monkeypatch.setattr(timing, 'peak_in_child', lambda *_: mib)
    rows = timing.time_rows('small', 2, None)['rows']
    assert rows['ours']['train']['ratio'] == 1
    assert rows['theirs']['predict']['seconds'] > 0


def test_missing_data_says_where_to_get_it(table: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        tool('reproduce.py').main(
            ['small', 'ours', '--data-root', str(table / 'nothing')]
        )
    assert 'cifar10_to_folders.py' in capsys.readouterr().err


def test_timings_are_those_of_all_rows(table: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        tool('reproduce.py').main(['small', 'ours', '--time'])
    assert "leave out ['ours']" in capsys.readouterr().err


def test_what_is_missing_runs_first_seeds_first(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []
    reproduce = tool('reproduce.py')
    monkeypatch.setattr(reproduce, 'RESULTS', table / 'results')
    monkeypatch.setattr(reproduce, 'report', lambda: None)
    monkeypatch.setattr(
        runs.Run, 'execute', lambda run: done.append((run.row.name, run.seed)) or {}
    )
    record(table, 'theirs', 0, 50)
    reproduce.main(['small'])
    assert done == [('ours', 0), ('ours', 1), ('theirs', 1), ('ours', 2), ('theirs', 2)]
    done.clear()
    reproduce.main(['small'])
    assert not done, 'all are recorded'


def test_report(table: Path):
    for seed, ours, theirs in ((0, 60, 50), (1, 62, 54), (2, 61, 52)):
        result = record(table, 'ours', seed, ours)
        record(table, 'theirs', seed, theirs)
    results = report.read_results('small')
    text = report.section('small', results)
    # Student's t for three values: 4.303 standard errors. The gaps are -10, -8, -9.
    assert '| Ours | 3 | 3.0 | 61.0 ± 2.5 | - |' in text
    assert '| Theirs | 3 | 3.0 | 52.0 ± 5.0 | -9.0 ± 2.5 |' in text
    assert '6 of 6 runs' in text
    assert report.plot('small', results)[1:4] == b'PNG'

    page = 'a\n<!-- table: small -->\nold\n<!-- end -->\nb\n'
    assert report.fill(page, {'small': 'new'}) == page.replace('old', 'new')
    with pytest.raises(ValueError, match='table: other'):
        report.fill(page, {'other': 'new'})

    close = {**result, 'metrics': {'accuracy/top1': 61.5}}
    compare = (TABLE.rows[0], 2, close, result)
    assert report.compare('small', *compare).endswith('reproduced')
    close['metrics'] = {'accuracy/top1': 59.0}
    with pytest.raises(ValueError, match=r'59\.0, recorded 61\.0.*not reproduced'):
        report.compare('small', *compare)


def test_page_is_made_from_the_results():
    """No number of its tables is typed, and every plot is there."""
    page = report.PAGE.read_text()
    sections = {n: report.section(n, report.read_results(n)) for n in TABLES}
    assert report.fill(page, sections) == page, 'run tools/reproduce.py --report'
    for path in re.findall(r'\]\((images/\S+)\)', page):
        assert (report.PAGE.parent / path).is_file()


def test_recorded_results_are_of_the_rows_as_they_are_now():
    """A configuration that has changed needs another run."""
    recorded = 0
    for run in (
        runs.Run(name, row, seed, Path('runs'), None)
        for name, table in TABLES.items()
        for row in table.rows
        for seed in range(row.seeds)
    ):
        if not run.file.is_file():
            continue
        result = json.loads(run.file.read_text())
        cfg = load_config(str(runs.ROOT / run.config), run.options)
        now = runs.as_json(cfg)
        for key in (*publish.TRAINING, 'test_dataloader', 'randomness'):
            assert result['config'].get(key) == now.get(key), (run.file, key)
        assert result['model'] == runs.count(cfg, TABLES[run.table].size), run.file
        recorded += 1
    files = [f for f in runs.RESULTS.glob('*/*.json') if f.name != 'timing.json']
    assert recorded == len(files) > 0


def test_weights_are_small_and_have_cards_and_entries():
    metafile = runs.ROOT / 'configs' / 'dsnet' / 'metafile.yml'
    entries = {
        entry['Weights']: entry
        for entry in yaml.safe_load(metafile.read_text())['Models']
        if 'Weights' in entry
    }
    weights = sorted(publish.WEIGHTS.glob('*.safetensors'))
    assert sum(path.stat().st_size for path in weights) < 12e6
    assert set(entries) == {f'weights/{path.name}' for path in weights}
    for path in weights:
        entry = entries[f'weights/{path.name}']
        assert (runs.ROOT / entry['Config']).is_file()
        card = path.with_suffix('.md').read_text()
        with safe_open(str(path), 'pt') as file:
            meta = file.metadata()
        assert meta['configuration'] in card and meta['commit'] in card
        assert meta['configuration'] == entry['Config']
        run = re.search(r'reproduce\.py (\S+) (\S+) --seed (\d+)', card).groups()
        result = runs.RESULTS / run[0] / f'{run[1]}-seed{run[2]}.json'
        publish.check_training(Path(entry['Config']), json.loads(result.read_text()))
        measured = re.findall(r'\| .* \| (\S+) \|\n', card)
        for value in entry['Results'][0]['Metrics'].values():
            assert str(value) in measured, 'the figure of the file itself'

"""The measured tables: rows, runs, report, and the weights that come of them."""

import json
import re
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from safetensors import safe_open

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.engine.config import load_config, set_data_root
from dsnet_mm.files import sha256, write_atomic
from evidence import publish, report, runs, timing
from evidence.tables import TABLES, Row
from tests.conftest import tool

ROWS = (Row('ours', 'Ours', 'ours', 3), Row('theirs', 'Theirs', 'theirs', 3))
TABLE = TABLES['cifar10']._replace(title='A table', rows=ROWS, size=64)
# The module of recorded configurations -> where it is now.
MOVED = ('dsnet_mm.cli.evidence.stems', 'evidence.stems')


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


# --- Recorded results -------------------------------------------------------------


@cache
def load(config: Path) -> Config:
    return load_config(str(runs.ROOT / config), {})


def test_recorded_results_are_of_the_rows_as_they_are_now(
    monkeypatch: pytest.MonkeyPatch,
):
    """A configuration that has changed needs another run.

    What our files set is compared. The bases of mmdet differ between its versions.
    """
    counts, recorded = {}, 0
    for name, table in TABLES.items():
        for row in table.rows:
            for seed in range(row.seeds):
                run = runs.Run(name, row, seed, Path('runs'), None)
                if not run.file.is_file():
                    continue
                cfg = deepcopy(load(run.config))
                options = dict(run.options)
                if root := options.pop('data_root', None):
                    set_data_root(cfg, root)
                cfg.merge_from_dict(options)
                now = runs.as_json(cfg)
                result = json.loads(run.file.read_text().replace(*MOVED))
                tops = (*publish.TRAINING, 'test_dataloader', 'custom_imports')
                keys = {key for key in run.keys if key[0] in (*tops, 'randomness')}
                assert len(keys) > 40
                assert not runs.differing(result['config'], now, keys), run.file
                model = (json.dumps(now['model']), table.size)
                if model not in counts:
                    counts[model] = runs.count(cfg, table.size)
                assert result['model'] == counts[model], run.file
                recorded += 1
    files = [f for f in runs.RESULTS.glob('*/*.json') if f.name != 'timing.json']
    assert recorded == len(files) > 0

    # The backbones of a table need the same multiply-adds.
    def count(cfg: Config, size: int) -> dict:
        model = (json.dumps(runs.as_json(cfg)['model']), size)
        return counts.get(model) or original(cfg, size)

    original = runs.count
    monkeypatch.setattr(runs, 'count', count)
    monkeypatch.setattr(runs, 'load_config', lambda path, _: load(Path(path)))
    for name in ('nuclei', 'nuclei_long', 'scenes', 'cifar10', 'cifar10_long'):
        costs = runs.check_cost(name)
        assert set(costs) == {row.name for row in TABLES[name].rows}


def test_keys_are_those_of_our_files(tmp_path: Path):
    (tmp_path / 'base.py').write_text(
        "_base_ = ['mmdet::_base_/default_runtime.py']\n"
        "model = dict(neck=dict(type='FPN', num_outs=4), head=dict(_delete_=True, a=1))"
    )
    (tmp_path / 'own.py').write_text(
        "_base_ = 'base.py'\nlr = 1\nlist_ = [dict(a=1)]\noptim = dict(lr=lr, x=dict())"
    )
    keys = {'.'.join(key) for key in runs.own_keys(tmp_path / 'own.py')}
    expected = {'model.neck.type', 'model.neck.num_outs', 'model.head'}
    assert keys == expected | {'lr', 'list_', 'optim.lr', 'optim.x'}
    one, other = {'a': {'b': [1, 2]}, 'c': 3}, {'a': {'b': [1, 5]}, 'c': 3}
    keys = {('a', 'b', '0'), ('a', 'b', '1'), ('c',), ('d', 'e')}
    assert runs.differing(one, other, keys) == ['a.b.1']


def test_options_of_a_draw_and_of_another_test(tmp_path: Path):
    table = TABLES['nuclei_stained']
    run = runs.Run('nuclei_stained', table.row('lora_5'), 3, tmp_path, 'sets')
    draw = 'train_dataloader.dataset.ann_file=annotations/few_shot/5images_draw3.json'
    assert draw in run.arguments('train.py')
    options = runs._filled(table.others['fluorescence'], data_root='sets/')
    file = 'test_evaluator.ann_file=sets/annotations/instances_val_fluorescence.json'
    assert file in run.arguments('test.py', options=options)
    assert file not in run.arguments('test.py')


def test_page_is_made_from_the_results():
    """No number of a table is typed wrong, and every plot is there."""
    sections = {n: report.section(n, report.read_results(n)) for n in TABLES}
    named = set()
    for path in report.PAGES:
        page = path.read_text()
        assert report.fill(page, sections) == page, 'run tools/reproduce.py --report'
        named |= {name for _, name, _ in report.PLACE.findall(page)}
        for name, text in re.findall(r'^\| `(\w+)` \| (.+) \|$', page, re.M):
            named |= {name} & {*TABLES}
            for number in re.findall(r'\d+\.\d ± \d+\.\d', text):
                assert number in sections[name], name
        for image in re.findall(r'\]\((images/\S+)\)', page):
            assert (path.parent / image).is_file()
    assert named == {*TABLES}


def test_weights_are_small_and_have_cards_and_entries():
    metafile = runs.ROOT / 'configs' / 'dsnet' / 'metafile.yml'
    entries = {
        entry['Weights']: entry
        for entry in yaml.safe_load(metafile.read_text())['Models']
        if 'Weights' in entry
    }
    weights = sorted(publish.WEIGHTS.glob('*.safetensors'))
    assert sum(path.stat().st_size for path in weights) < 17e6
    assert set(entries) == {f'weights/{path.name}' for path in weights}
    for path in weights:
        entry = entries[f'weights/{path.name}']
        assert entry['Metadata']['SHA-256'] == sha256(path)
        assert (runs.ROOT / entry['Config']).is_file()
        card = path.with_suffix('.md').read_text()
        assert f'`{sha256(path)}`' in card
        with safe_open(str(path), 'pt') as file:
            meta = file.metadata()
        assert meta['configuration'] in card and meta['commit'] in card
        assert meta['configuration'] == entry['Config']
        found = re.search(r'reproduce\.py (\S+) (\S+) --seed (\d+)', card).groups()
        row = TABLES[found[0]].row(found[1])
        run = runs.Run(found[0], row, int(found[2]), Path('runs'), None)
        result = json.loads(run.file.read_text())
        publish.check_training(run, Path(entry['Config']), result)
        measured = re.findall(r'\| .* \| (\S+) \|\n', card)
        for value in entry['Results'][0]['Metrics'].values():
            assert str(value) in measured, 'the figure of the file itself'


def test_weights_that_are_not_those_of_their_card_are_refused(tmp_path: Path, capsys):
    weights = publish.WEIGHTS / 'dsnet_cifar10.safetensors'
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    changed = tmp_path / weights.name
    changed.write_bytes(content)
    read_checkpoint(str(changed))  # without a card it is not checked
    shutil.copy(weights.with_suffix('.md'), tmp_path)
    image = runs.ROOT / 'docs' / 'images' / 'nuclei.jpg'
    arguments = ['dsnet_cifar10', changed, image, '--out', tmp_path / 'out']
    with pytest.raises(SystemExit):
        tool('infer.py').main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert str(changed) in message
    assert sha256(changed) in message and sha256(weights) in message
    assert not (tmp_path / 'out').exists()


# --- Runs -------------------------------------------------------------------------


def test_unequal_backbones_are_told(table: Path):
    path = table / 'theirs.py'
    path.write_text(path.read_text() + 'model["backbone"]["mlp_ratio"] = 8.0\n')
    with pytest.raises(ValueError, match=r"\{'theirs': '\+"):
        runs.check_cost('small')


def test_a_run_goes_on_and_is_recorded_and_published(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    def call(arguments: list[str], threads: int) -> float:
        tool(arguments[0].removeprefix('tools/')).main(arguments[1:])
        return 1.0

    monkeypatch.setattr(runs, '_call', call)
    run = runs.Run('small', ROWS[0], 1, table / 'runs', None)
    # A training that ended after its first epoch.
    options = ['--cfg-options', 'randomness.seed=1', 'train_cfg.max_epochs=1']
    work_dir = ['--work-dir', str(run.work_dir)]
    tool('train.py').main([str(table / 'ours.py'), *work_dir, *options])
    result = run.execute()
    assert result['config']['randomness']['seed'] == 1
    assert 0 <= result['metrics']['accuracy/top1'] <= 100
    steps = [point['step'] for point in result['curve'] if 'loss' in point]
    assert steps == [1, 2, 3, 4], 'both trainings, of two iterations an epoch'
    epochs = [point['step'] for point in result['curve'] if 'loss' not in point]
    assert epochs == [1, 2]
    assert 0 < result['train_cpu_seconds'] < 100
    assert result['model']['backbone_multiply_adds'] > 1e5
    run.record(result)
    assert json.loads(run.file.read_text()) == result

    # tests/engine/test_checkpoints.py tests such weights by tools/test.py.
    monkeypatch.setattr(run, 'test', lambda *_: (result['metrics'], 0.0))
    (entry,) = yaml.safe_load(publish.publish(run, 'small'))
    with pytest.raises(FileExistsError, match=r'small\.safetensors'):
        publish.publish(run, 'small')
    assert entry['Results'][0]['Metrics'].keys() == {'accuracy'}
    other = table / 'other.py'
    other.write_text((table / 'ours.py').read_text() + 'train_cfg["max_epochs"] = 3\n')
    with pytest.raises(ValueError, match=r'other\.py .*train_cfg\.max_epochs'):
        publish.publish(run, 'small', other, overwrite=True)
    with safe_open(str(table / entry['Weights']), 'pt') as file:
        assert file.metadata()['seed'] == '1'
        assert file.get_tensor('head.fc.weight').dtype == torch.float16
    card = (table / 'weights' / 'small.md').read_text()
    assert 'seed 1, commit' in card and entry['Metadata']['SHA-256'] in card


def test_a_check_has_the_threads_of_the_record(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    record(table, 'ours', 0, 50)  # with one thread
    first, second = (runs.Run('small', ROWS[0], seed, table, None) for seed in (0, 1))
    assert (first.threads, second.threads) == (1, torch.get_num_threads())
    script = 'import os, sys; sys.exit(os.environ["OMP_NUM_THREADS"] != "1")'
    assert 0 < runs._call(['-c', script], 1) < 10
    with pytest.raises(RuntimeError, match='import os, sys'):
        runs._call(['-c', script], 2)
    called = []
    monkeypatch.setattr(runs, '_call', lambda *call: called.append(call) or 1 / 0)
    for call in (first.execute, lambda: first.test('weights.safetensors', table)):
        with pytest.raises(ZeroDivisionError):
            call()
        arguments, threads = called.pop()
        assert (arguments[0][:8], threads) in (('tools/tr', 1), ('tools/te', 1))


def test_rows_are_timed_in_turns(table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, 'peak_in_child', lambda make, *args: 7.0)
    rows = timing.time_rows('small', 2, None)['rows']
    assert rows['ours']['train']['ratio'] == 1
    for kind in timing.KINDS:
        assert rows['theirs'][kind]['seconds'] > 0
        assert rows['theirs'][kind]['mib'] == 7


@pytest.mark.parametrize(
    ('args', 'fact'),
    [
        (['ours', '--data-root', 'nothing'], 'cifar10_to_folders.py'),
        (['ours', '--time'], "['ours']"),
        (['other'], "['other']"),
    ],
)
def test_errors(args: list[str], fact: str, table: Path, capsys: pytest.CaptureFixture):
    """Missing data says where to get it; all rows are timed together."""
    with pytest.raises(SystemExit, match='2'):
        tool('reproduce.py').main(['small', *args])
    assert fact in capsys.readouterr().err


def test_what_is_missing_runs_first_seeds_first(
    table: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []
    reproduce = tool('reproduce.py')
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
    assert '\n6 of 6 ' in text
    assert report.summary([60.0, 62.0]) == '61.0', 'two values have no interval'
    assert report.plot('small', results)[1:4] == b'PNG'

    page = 'a\n<!-- table: small -->\nold\n<!-- end -->\nb\n'
    assert report.fill(page, {'small': 'new'}) == page.replace('old', 'new')
    with pytest.raises(ValueError, match='small'):
        report.fill(page, {'other': 'new'})

    close = {**result, 'metrics': {'accuracy/top1': 61.5}}
    compare = (TABLE.rows[0], 2, close, result)
    assert re.search(r'61\.5.*61\.0', report.compare('small', *compare))
    close['metrics'] = {'accuracy/top1': 59.0}
    with pytest.raises(ValueError, match=r'59\.0.*61\.0'):
        report.compare('small', *compare)

"""A whole run: order of events, resuming, table, plot, classifier files, errors."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsnet_mm.few_shot import (
    FeatureCache,
    FewShotConfig,
    load_classifier,
    run,
    transfer,
)
from dsnet_mm.few_shot import runner as runner_module
from dsnet_mm.few_shot.report import half_interval, write_report
from dsnet_mm.tasks import load_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tiny_clip, picture_folder, tmp_path):
    return FewShotConfig(
        dataset=str(picture_folder),
        **tiny_clip,
        methods=('tip_adapter', 'clip_adapter'),
        oracle=('tip_adapter',),
        shots=(1, 4),
        overrides={'clip_adapter': dict(alpha=0.5, lr=0.01, epochs=20)},
        views=2,
        cache_dir=str(tmp_path / 'cache'),
    )


def test_run_opens_the_test_split_once_and_last(config, tmp_path, monkeypatch):
    test_paths = {item[0] for item in load_task(config.dataset).split['test']}
    opened = []
    images = FeatureCache.images

    def spy(self, items, views=0):
        opened.append(bool(test_paths & {item[0] for item in items}))
        return images(self, items, views)

    monkeypatch.setattr(FeatureCache, 'images', spy)
    work_dir = tmp_path / 'run'
    records = run(config, work_dir, quiet=True)
    assert opened.count(True) == 1

    log = (work_dir / 'run.log').read_text().splitlines()
    kinds = [re.search(r'INFO (\w+ \w+)', line).group(1) for line in log]
    (at,) = (i for i, kind in enumerate(kinds) if kind == 'test split')
    assert '13 classifiers are fixed' in log[at]
    oracle = [i for i, line in enumerate(log) if 'fitted' in line and 'oracle' in line]
    assert all(i > at for i in oracle) and len(oracle) == 6
    others = [i for i, kind in enumerate(kinds) if kind.startswith('fitted')]
    assert all(i < at for i in set(others) - set(oracle))
    assert len(records) == 1 + 2 * 3 * 3

    text = write_report(work_dir, records)
    assert (work_dir / 'results.md').read_text() == text
    assert (work_dir / 'accuracy.png').read_bytes().startswith(b'\x89PNG')
    assert 'Tip-Adapter (oracle)' in text and 'not a result' in text
    assert re.search(r'\| CLIP-Adapter \| \d+\.\d\d ± \d+\.\d\d \|', text)
    assert '24 test pictures, seeds 1, 2, 3' in text
    about = json.loads((work_dir / 'run.json').read_text())
    assert about['class_names'] == ['blue', 'green sea', 'red']


def test_interrupted_run_continues(config, tmp_path, monkeypatch):
    work_dir = tmp_path / 'run'
    select, calls = runner_module.select, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return select(*args)

    monkeypatch.setattr(runner_module, 'select', failing)
    with pytest.raises(KeyboardInterrupt):
        run(config, work_dir, quiet=True)
    assert len(list((work_dir / 'runs').iterdir())) == 3
    calls.clear()
    monkeypatch.setattr(
        runner_module, 'select', lambda *a: calls.append(1) or select(*a)
    )
    records = run(config, work_dir, quiet=True)
    assert len(calls) == len(records) - 3
    calls.clear()
    assert run(config, work_dir, quiet=True) == records
    assert not calls


def test_classifier_on_another_data_set(config, encoder, picture_folder, tmp_path):

    small = replace(config, methods=('clip_adapter',), oracle=(), shots=(4,))
    (_, first, *_) = run(small, tmp_path / 'run', quiet=True)
    file = tmp_path / 'run' / 'classifiers' / 'clip_adapter_4shot_seed1.safetensors'
    options = dict(cache_dir=tmp_path / 'cache', encoder=encoder)
    same = transfer(file, picture_folder, **options)
    assert same.accuracy == pytest.approx(first['test']['accuracy'])

    for name in ('red', 'blue'):
        shutil.copytree(picture_folder / name, tmp_path / 'two' / name)
    test = load_task(tmp_path / 'two').split['test']
    features = FeatureCache(tmp_path / 'cache', encoder).images(test)
    logits = load_classifier(file, encoder).classifier(features.features[0])
    expected = (logits[:, [0, 2]].argmax(1) == features.labels).float().mean()
    two = transfer(file, tmp_path / 'two', **options)
    assert two.accuracy == pytest.approx(100 * expected.item())
    (tmp_path / 'two' / 'blue').rename(tmp_path / 'two' / 'mauve')
    with pytest.raises(ValueError, match=r"does not know 1 of .* such as 'mauve'"):
        transfer(file, tmp_path / 'two', **options)


def test_skipped_pictures_are_in_the_log(config, picture_folder, tmp_path):
    options = dict(methods=(), oracle=(), shots=(16,), seeds=(1,), on_bad_image='skip')
    for part in ('train', 'test'):
        shutil.copytree(picture_folder, tmp_path / 'split' / part)
    config = replace(config, dataset=str(tmp_path / 'split'), **options)
    bad = tmp_path / 'split' / 'test' / 'red' / '99.png'
    bad.write_bytes(b'no picture')
    (record,) = run(config, tmp_path / 'run', quiet=True)
    assert record['test']['pictures'] == 72
    log = (tmp_path / 'run' / 'run.log').read_text()
    assert f'WARNING skipped: the picture {bad} cannot be read' in log


def test_folder_of_another_run(config, tmp_path):
    small = replace(config, methods=(), oracle=(), shots=(1,), seeds=(1,))
    run(small, tmp_path / 'run', quiet=True)
    with pytest.raises(FileExistsError, match='contains another run, with other seeds'):
        run(replace(small, seeds=(2,)), tmp_path / 'run', quiet=True)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='not a few-shot run'):
        run(small, tmp_path / 'other', quiet=True)


def test_too_many_shots_fail_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match='fewer than the 16 shots'):
        run(replace(config, shots=(1, 16)), tmp_path / 'run', quiet=True)
    assert not (tmp_path / 'run').exists()


def test_bad_arguments_of_the_configuration(config):
    with pytest.raises(ValueError, match="unknown method 'tip'"):
        replace(config, methods=('tip',))
    with pytest.raises(ValueError, match='name methods in oracle'):
        replace(config, selection='oracle')
    with pytest.raises(ValueError, match='each have at least one value'):
        replace(config, seeds=())


def test_confidence_interval():
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)
    assert half_interval([1.0, 2.0]) is None


@pytest.fixture
def tool(monkeypatch):
    """Calls tools/few_shot.py with arguments."""
    path = ROOT / 'tools' / 'few_shot.py'
    spec = importlib.util.spec_from_file_location('few_shot_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['few_shot.py', *map(str, arguments)])
        module.main()

    return call


def test_command_line_and_code_of_the_docs(
    tool, config, picture_folder, tmp_path, capsys
):
    work_dir = tmp_path / 'run'
    command = [
        *('run', '--dataset', config.dataset, '--model', config.model),
        *('--pretrained', config.pretrained, '--methods', 'clip_adapter'),
        *('--shots', '4', '--work-dir', work_dir),
        *('--cfg-options', 'views=0', f'cache_dir={tmp_path / "cache"}', '--seeds'),
    ]
    tool(*command, '1')
    assert 'CLIP-Adapter' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        tool(*command, '2')
    assert stopped.value.code == (
        f'error: {work_dir} contains another run, with other seeds; choose another '
        f'folder.'
    )

    docs = (ROOT / 'docs' / 'clip_adapter.md').read_text()
    (snippet,) = re.findall(r'```python\n(from [^`]*load_classifier.*?)```', docs, re.S)
    assert len(snippet.strip().splitlines()) <= 10
    file = work_dir / 'classifiers' / 'clip_adapter_4shot_seed1.safetensors'
    assert file.stat().st_size < 50_000
    for suffix, path in (('safetensors', file), ('jpg', picture_folder / 'red/0.png')):
        snippet = re.sub(rf"'[^']*\.{suffix}'", repr(str(path)), snippet)
    capsys.readouterr()
    exec(snippet, {})
    printed = capsys.readouterr().out
    classifier = load_classifier(file)
    (probabilities,) = classifier([picture_folder / 'red' / '0.png'])
    best = classifier.class_names[probabilities.argmax()]
    assert printed == f'{best} {round(probabilities.max().item(), 3)}\n'


def test_doctor_command(tool, picture_folder, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        tool('doctor', picture_folder, '--decode')
    assert stopped.value.code is None
    with pytest.raises(SystemExit, match=r'split_zhou_DescribableTextures\.json'):
        tool('doctor', 'dtd', '--data-root', tmp_path)


def test_bad_arguments_of_the_command_line(tool, tmp_path):
    (tmp_path / 'other.py').write_text('model = dict()')
    with pytest.raises(SystemExit, match='has no few_shot'):
        tool('run', tmp_path / 'other.py')
    with pytest.raises(SystemExit, match='name the dataset and the model'):
        tool('run')
    with pytest.raises(SystemExit, match='unknown option'):
        tool('run', '--dataset', 'x', '--model', 'y', '--cfg-options', 'shot=1')

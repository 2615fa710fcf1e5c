"""A whole run: order of events, resuming, table, plot, classifier files, errors."""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dsnet_mm.datasets import load_task, sample_few_shot
from dsnet_mm.few_shot import (
    METHODS,
    FeatureCache,
    FewShotConfig,
    load_classifier,
    run,
)
from dsnet_mm.few_shot import runner as runner_module
from dsnet_mm.few_shot.choice import choose
from dsnet_mm.few_shot.deployment import read_classifier
from dsnet_mm.few_shot.report import half_interval, holm, write_report
from dsnet_mm.few_shot.selection import _folds

ROOT = Path(__file__).resolve().parents[2]
# CLIP-Adapter with a short training, and nothing to select.
CHEAP = {key: values[0] for key, values in METHODS['clip_adapter'].grid.items()} | {
    'lr': 0.01,
    'iterations': 5,
}


@pytest.fixture
def config(tiny_clip, image_folder, tmp_path):
    return FewShotConfig(
        dataset=str(image_folder),
        **tiny_clip,
        methods=('tip_adapter', 'clip_adapter'),
        oracle=('tip_adapter',),
        shots=(1, 4),
        overrides={'clip_adapter': CHEAP},
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
    assert re.search(r'\| CLIP-Adapter \| \d+\.\d\d ± \d+\.\d\d f \|', text)
    assert 'f: nothing was selected' in text, 'all options are set by overrides'
    assert 'Set, not selected: CLIP-Adapter alpha=0.2, CLIP-Adapter keep=1.0' in text
    assert re.search(
        r'Made with dsnet_mm .* at commit \w+\+?, torch .*, 1 thread', text
    )
    assert '"1 shot" is two labels a class' in text
    assert '24 test images, seeds 1, 2, 3' in text
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


def test_skipped_images_are_in_the_log(config, image_folder, tmp_path):
    options = dict(methods=(), oracle=(), shots=(16,), seeds=(1,), on_bad_image='skip')
    for file in image_folder.glob('*/*.png'):
        part = 'train' if int(file.stem) < 16 else 'test'
        to = tmp_path / 'split' / part / file.parent.name / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    config = replace(config, dataset=str(tmp_path / 'split'), **options)
    bad = tmp_path / 'split' / 'test' / 'red' / '99.png'
    bad.write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'99\.png cannot be read'):
        run(replace(config, on_bad_image='error'), tmp_path / 'run', quiet=True)
    (record,) = run(config, tmp_path / 'run', quiet=True)
    assert record['test']['pictures'] == 24
    text = write_report(tmp_path / 'run', [record])
    assert f'| Zero-shot CLIP | {record["test"]["accuracy"]:.2f} |\n' in text
    log = (tmp_path / 'run' / 'run.log').read_text()
    assert f'WARNING skipped: the image {bad} cannot be read' in log


def test_a_class_without_readable_training_images(config, tmp_path):
    for cls, colour in (('day', 250), ('night', 5), ('noon', 255)):
        for part, count in (('train', 1), ('test', 2)):
            (tmp_path / 'sky' / part / cls).mkdir(parents=True)
            for i in range(count):
                image = Image.new('RGB', (8, 8), (colour, i, len(part)))
                image.save(tmp_path / 'sky' / part / cls / f'{i}.png')
    (tmp_path / 'sky' / 'train' / 'night' / '0.png').write_bytes(b'no image')
    config = replace(
        config,
        dataset=str(tmp_path / 'sky'),
        methods=('gda',),
        shots=(1,),
        on_bad_image='skip',
    )
    with pytest.raises(ValueError, match="none of the training images of 'night'"):
        run(config, tmp_path / 'run', quiet=True)
    assert not (tmp_path / 'run' / 'runs').exists()


def test_methods_shots_and_seeds_are_added_to_a_run(config, tmp_path):
    first = replace(config, methods=('tip_adapter',), oracle=(), shots=(1,), seeds=(1,))
    work_dir = tmp_path / 'run'
    before = run(first, work_dir, quiet=True)
    added = replace(
        first, methods=('linear_probe',), shots=(4,), seeds=(2,), on_bad_image='skip'
    )
    records = run(added, work_dir, quiet=True)
    assert len(records) == 1 + 2 * 2 * 2
    assert [r for r in records if r in before] == before
    assert '2 test' not in write_report(work_dir, records)
    assert run(first, work_dir, quiet=True) == records


def test_folder_of_another_run(config, tmp_path, monkeypatch):
    small = replace(
        config, methods=('clip_adapter',), oracle=(), shots=(1,), seeds=(1,)
    )
    run(small, tmp_path / 'run', quiet=True)
    for change, what in (
        (dict(views=0), 'views'),
        (
            dict(overrides={'clip_adapter': dict(alpha=0.1)}),
            'overrides of clip_adapter',
        ),
    ):
        with pytest.raises(FileExistsError, match=f'another run, with other {what}'):
            run(replace(small, **change), tmp_path / 'run', quiet=True)
    changed = replace(METHODS['clip_adapter'], defaults=dict(alpha=0.9))
    monkeypatch.setitem(METHODS, 'clip_adapter', changed)
    with pytest.raises(FileExistsError, match='other hyper-parameters of clip_adapter'):
        run(small, tmp_path / 'run', quiet=True)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='not a few-shot run'):
        run(small, tmp_path / 'other', quiet=True)


@pytest.mark.parametrize('change', ['image', 'replaced', 'class', 'weights'])
def test_run_is_not_continued_with_other_data(
    config, tmp_path, image_folder, tiny_clip, change
):
    images, weights = tmp_path / 'images', tmp_path / 'weights.pt'
    shutil.copytree(image_folder, images)
    shutil.copy(tiny_clip['pretrained'], weights)
    options = dict(methods=(), oracle=(), shots=(1,), seeds=(1,))
    small = replace(config, dataset=str(images), pretrained=str(weights), **options)
    run(small, tmp_path / 'run', quiet=True)
    if change == 'image':
        Image.new('RGB', (40, 40), 'red').save(images / 'red' / 'new.png')
    elif change == 'replaced':  # by an image of the same size in bytes
        old, new = (images / 'red' / f'{i}.png' for i in (0, 1))
        content = new.read_bytes()[: old.stat().st_size]
        old.write_bytes(content.ljust(old.stat().st_size, b'\0'))
    elif change == 'class':
        (images / 'white').mkdir()
        for i in range(6):
            colour = (255, 255, 250 + i)
            Image.new('RGB', (40, 40), colour).save(images / 'white' / f'{i}.png')
    else:
        state = torch.load(weights)
        torch.save({k: v + 1 if 'ln' in k else v for k, v in state.items()}, weights)
    what = {
        'image': 'images changed',
        'replaced': 'images changed',
        'class': 'images, class names',
        'weights': 'weights',
    }
    with pytest.raises(FileExistsError, match=f'other data: {what[change]}'):
        run(small, tmp_path / 'run', quiet=True)


def test_copies_of_test_images_are_refused(config, tmp_path, image_folder, tool):
    images = tmp_path / 'images'
    shutil.copytree(image_folder, images / 'train')
    shutil.copytree(image_folder / 'red', images / 'test' / 'red')
    for i in range(1, 24):
        (images / 'test' / 'red' / f'{i}.png').unlink()
    with Image.open(image_folder / 'blue' / '3.png') as image:
        image.save(images / 'test' / 'red' / 'blue3.bmp')
    options = dict(methods=(), oracle=(), shots=(16,), seeds=(1,), views=0)
    config = replace(config, dataset=str(images), **options)
    found = r'test images are also training or validation images.*0\.png'
    with pytest.raises(ValueError, match=rf'[12] {found}'):
        run(config, tmp_path / 'run', quiet=True)
    with pytest.raises(SystemExit, match=rf'1 {found}'):
        tool('doctor', images)
    with pytest.raises(SystemExit, match=rf'2 {found}'):
        tool('doctor', images, '--decode')
    (images / 'test' / 'red' / '0.png').unlink()
    with Image.open(images / 'train' / 'red' / '0.png') as image:
        for i in range(24):
            image.save(images / 'train' / 'red' / f'{i}.png')
        image.save(images / 'test' / 'red' / 'copy.bmp')
    with pytest.raises(ValueError, match=r'same pixels, such as .*(copy|blue3)\.bmp'):
        run(config, tmp_path / 'run', quiet=True)


def test_classifier_to_use_and_final(config, encoder, tmp_path):
    small = replace(config, methods=('tip_adapter', 'clip_adapter'), seeds=(1, 2))
    work_dir = tmp_path / 'run'
    records = run(small, work_dir, quiet=True, final=True)
    chosen = choose(records)
    assert chosen.record['shots'] == 4 and chosen.record['selection'] != 'oracle'
    assert (work_dir / chosen.file).is_file()
    assert f'Classifier to use: `{chosen.file}`' in write_report(work_dir, records)
    for record in records:  # what is chosen does not depend on the test split
        record['test']['accuracy'] *= -1
    assert choose(records) == chosen

    def about(name):
        return read_classifier(work_dir / 'classifiers' / f'{name}.safetensors')[1]

    assert about('tip_adapter_oracle_4shot_seed1')['record']['selection'] == 'oracle'
    final = about('final')['record']
    assert final['pictures'] == 72 and final['method'] == chosen.record['method']
    assert load_classifier(work_dir / 'classifiers' / 'final.safetensors', encoder)


def test_choice():
    def record(method, accuracy, zero_shot=50.0, loss=1.0, shots=4, **other):
        return dict(
            method=method,
            shots=shots,
            val_accuracy=accuracy,
            val_loss=loss,
            val_zero_shot=zero_shot,
            selection='val',
            **other,
        )

    zero_shot = record('zero_shot', None, shots=0)
    tip, adapter = record('tip_adapter', 60.0), record('clip_adapter', 60.0, loss=0.5)
    few = record('task_res', 90.0, shots=1)
    oracle = {**record('task_res', 90.0), 'selection': 'oracle'}
    assert choose([zero_shot, few, tip, adapter, oracle]).record is adapter
    below = [zero_shot, record('clip_adapter', 50.0)]
    assert choose(below).record is zero_shot
    unknown = [zero_shot, record('tip_adapter', None), record('clip_adapter', None)]
    assert choose(unknown).record is unknown[2]
    assert 'no validation images' in choose(unknown).why


def test_holm():
    nan = float('nan')
    # As R's p.adjust(c(0.01, 0.04, 0.03), 'holm').
    corrected = holm([0.01, nan, 0.04, 0.03])
    assert corrected[:1] + corrected[2:] == pytest.approx([0.03, 0.06, 0.06])
    assert corrected[1] != corrected[1]


def test_what_selection_is_given(config, encoder, tmp_path, monkeypatch):
    select, given = runner_module.select, []
    monkeypatch.setattr(
        runner_module, 'select', lambda *a: given.append(a) or select(*a)
    )
    config = replace(
        config,
        methods=('tip_adapter', 'lp++'),
        oracle=(),
        shots=(4,),
        seeds=(3, 5),
        selection='cv',
    )
    records = run(config, tmp_path / 'run', quiet=True)
    assert [r['selection'] for r in records] == ['fixed', *2 * ['cv', 'fixed']]
    # Methods with nothing to search are compared with the others and with zero-shot.
    for key in ('val_accuracy', 'val_loss', 'val_zero_shot'):
        assert all(r[key] is not None for r in records[1:])
    assert (
        'highest mean validation accuracy'
        in choose(
            [
                {**r, 'val_accuracy': 100.0} if r['method'] == 'lp++' else r
                for r in records
            ]
        ).why
    )
    _, third, _, fifth, _ = (data for _, data, *_ in given)
    assert (third.seed, fifth.seed) == (3, 5)
    items = sample_few_shot(load_task(config.dataset).split, 4, 5)['train']
    plain = FeatureCache(config.cache_dir, encoder).images(items)
    assert torch.equal(fifth.plain.features, plain.features)
    assert len(fifth.train.features) == 2, 'augmented views'
    known = {row.numpy().tobytes() for row in plain.features[0]}
    for part, held_out in _folds(fifth, 4):
        rows = {row.numpy().tobytes() for row in held_out.features[0]}
        assert rows <= known, 'prepared as test images are'
        assert not rows & {row.numpy().tobytes() for row in part.plain.features[0]}


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


def test_a_run_of_oracles_alone_has_no_results(config, tmp_path):
    config = replace(config, methods=(), oracle=('gda',), shots=(1,))
    text = write_report(tmp_path / 'run', run(config, tmp_path / 'run', quiet=True))
    assert '## At 1 shot\n' in text and 'GDA (oracle)' in text
    assert 'above zero-shot' not in text
    assert 'No other method was fitted without the test split' in text


def test_types_of_the_configuration(config):
    one = replace(config, shots=4, seeds=1, methods='gda')
    assert (one.shots, one.seeds, one.methods) == ((4,), (1,), ('gda',))
    for options, sentence in (
        (dict(shots=['a']), 'shots must be integers'),
        (dict(shots=(0,)), 'shots must be at least 1, got 0'),
        (dict(views='ten'), "views must be an integer from 0 on, got 'ten'"),
        (dict(crop_scale=0.5), 'crop_scale must be the least and the most'),
        (dict(overrides={'gda': 3}), 'overrides must have a dict for each method'),
        (dict(overrides={'gda': {'alpha': 'x'}}), 'alpha of gda must be a number, got'),
    ):
        with pytest.raises(ValueError, match=sentence):
            replace(config, **options)


def test_damaged_description_of_a_run(config, tmp_path):
    config = replace(config, methods=(), oracle=(), shots=(1,))
    run(config, tmp_path / 'run', quiet=True)
    (tmp_path / 'run' / 'run.json').write_text('{')
    with pytest.raises(ValueError, match=r'run\.json is damaged'):
        run(config, tmp_path / 'run', quiet=True)


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
    tool, config, image_folder, tmp_path, capsys, monkeypatch
):
    """The paths in the docs are those that the command above them writes."""
    monkeypatch.chdir(tmp_path)
    Path('my_images').symlink_to(image_folder)
    Path('image.jpg').symlink_to(image_folder / 'red' / '0.png')
    command = [
        *('run', '--dataset', 'my_images', '--model', config.model),
        *('--pretrained', config.pretrained, '--methods', 'clip_adapter'),
        *('--shots', '4', '--seeds', '1', '--cfg-options', 'views=0'),
        *(f'overrides.clip_adapter.{key}={value}' for key, value in CHEAP.items()),
    ]
    tool(*command)
    printed = capsys.readouterr().out
    assert 'CLIP-Adapter' in printed
    (named,) = re.findall(r'few_shot.py predict (\S+) IMAGES', printed)
    assert Path(named).is_file()
    with pytest.raises(SystemExit) as stopped:
        tool(*command, '--selection', 'fixed')
    assert stopped.value.code == (
        'error: work_dirs/few_shot_my_images contains another run, with other '
        'selection; choose another folder.'
    )

    file = 'work_dirs/few_shot_my_images/classifiers/clip_adapter_4shot_seed1'
    classifier = load_classifier(f'{file}.safetensors')
    (probabilities,) = classifier(['image.jpg'])
    best = classifier.class_names[probabilities.argmax()]
    text = (ROOT / 'docs/clip_adapter.md').read_text()
    pattern = r'--shots 1 4 16\n.*?```python\n(from [^`]*load_classifier.*?)```'
    (snippet,) = re.findall(pattern, text, re.S)
    assert len(snippet.strip().splitlines()) <= 10
    capsys.readouterr()
    exec(snippet.replace('16shot', '4shot'), {})
    printed = capsys.readouterr().out
    assert printed == f'{best} {round(probabilities.max().item(), 3)}\n'


def test_doctor_command(tool, image_folder, tmp_path):
    tool('doctor', image_folder, '--decode')  # exit status 0
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

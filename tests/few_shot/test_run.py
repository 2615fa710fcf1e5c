"""A whole run: order of events, resuming, table, classifier files, errors, commands."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

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
from dsnet_mm.few_shot.fit import fit
from dsnet_mm.few_shot.intervals import difference, holm
from dsnet_mm.few_shot.report import write_report
from dsnet_mm.few_shot.selection import _folds
from tests.datasets.test_feature_files import METADATA, made_tensors

# CLIP-Adapter with a short training, and nothing to select.
CHEAP = dict(alpha=0.2, keep=1.0, lr=0.01, iterations=5)
NOTHING = dict(methods=(), oracle=(), shots=(1,), seeds=(1,))


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


@pytest.fixture
def work_dir(tmp_path):
    return tmp_path / 'run'


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_run_opens_the_test_split_once_and_last(config, work_dir, monkeypatch):
    test_paths = {item[0] for item in load_task(config.dataset).split['test']}
    opened = []
    images = FeatureCache.images

    def spy(self, items, views=0):
        opened.append(bool(test_paths & {item[0] for item in items}))
        return images(self, items, views)

    monkeypatch.setattr(FeatureCache, 'images', spy)
    records = run(config, work_dir, quiet=True)
    assert opened.count(True) == 1

    log = (work_dir / 'run.log').read_text().splitlines()
    kinds = [re.search(r'INFO (\w+ \w+)', line).group(1) for line in log]
    (at,) = (i for i, kind in enumerate(kinds) if kind == 'test split')
    assert '13 classifiers' in log[at]
    oracle = [i for i, line in enumerate(log) if 'fitted' in line and 'oracle' in line]
    assert all(i > at for i in oracle) and len(oracle) == 6
    others = [i for i, kind in enumerate(kinds) if kind.startswith('fitted')]
    assert all(i < at for i in set(others) - set(oracle))
    assert len(records) == 1 + 2 * 3 * 3

    text = write_report(work_dir, records)
    assert (work_dir / 'results.md').read_text() == text
    assert (work_dir / 'accuracy.png').read_bytes().startswith(b'\x89PNG')
    assert re.search(r'\| Tip-Adapter \(oracle\) \|.*\nOracle: ', text, re.S)
    # All options are set by overrides.
    assert re.search(r'\| CLIP-Adapter \| \d+\.\d\d f \|.*\nf: ', text, re.S)
    # 12 training images of each class.
    assert re.search(r'share.* 8 % at 1 shot, 33 % at 4 shots', text)
    assert 'opened once, after all fits' in text
    assert 'CLIP-Adapter alpha=0.2, CLIP-Adapter keep=1.0' in text
    assert re.search(r'commit \w+\+?, torch .*, 1 thread', text)
    assert re.search(r'\n3 classes, 24 .*seeds 1, 2, 3;', text)
    assert re.search(r'`val`.*two labels', text)
    about = json.loads((work_dir / 'run.json').read_text())
    assert about['class_names'] == ['blue', 'green sea', 'red']


def test_interrupted_run_continues(config, work_dir, monkeypatch):
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
    records = run(config, work_dir, quiet=True)
    assert len(calls) == 4 + len(records) - 3
    assert run(config, work_dir, quiet=True) == records
    assert len(calls) == 4 + len(records) - 3


def test_skipped_images_are_in_the_log(config, image_folder, work_dir, tmp_path):
    for file in image_folder.glob('*/*.png'):
        part = 'train' if int(file.stem) < 16 else 'test'
        to = tmp_path / 'split' / part / file.parent.name / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    config = replace(config, dataset=str(tmp_path / 'split'), **NOTHING)
    bad = tmp_path / 'split' / 'test' / 'red' / '99.png'
    bad.write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'99\.png'):
        run(config, work_dir, quiet=True)
    (record,) = run(replace(config, on_bad_image='skip'), work_dir, quiet=True)
    assert record['test']['pictures'] == 24
    text = write_report(work_dir, [record])
    assert f'| Zero-shot CLIP | {record["test"]["accuracy"]:.2f} |\n' in text
    assert f'{bad} cannot be read' in (work_dir / 'run.log').read_text()


def test_a_class_without_readable_training_images(config, work_dir, tmp_path):
    for cls, colour in (('day', 250), ('night', 5), ('noon', 255)):
        for part, count in (('train', 1), ('test', 2)):
            (tmp_path / 'sky' / part / cls).mkdir(parents=True)
            for i in range(count):
                image = Image.new('RGB', (8, 8), (colour, i, len(part)))
                image.save(tmp_path / 'sky' / part / cls / f'{i}.png')
    (tmp_path / 'sky' / 'train' / 'night' / '0.png').write_bytes(b'no image')
    options = dict(NOTHING, methods=('gda',), on_bad_image='skip')
    config = replace(config, dataset=str(tmp_path / 'sky'), **options)
    with pytest.raises(ValueError, match=r"'night'.*\b1 shots.*seed 1"):
        run(config, work_dir, quiet=True)
    assert not (work_dir / 'runs').exists()


def test_methods_shots_and_seeds_are_added_to_a_run(config, work_dir):
    first = replace(config, **{**NOTHING, 'methods': ('tip_adapter',)})
    before = run(first, work_dir, quiet=True)
    text = write_report(work_dir, before)
    assert 'no verdict' in text and 'Undecided' not in text, 'one draw'
    added = dict(methods=('linear_probe',), shots=(4,), seeds=(2,), on_bad_image='skip')
    records = run(replace(first, **added), work_dir, quiet=True)
    assert len(records) == 1 + 2 * 2 * 2
    assert [r for r in records if r in before] == before
    assert run(first, work_dir, quiet=True) == records
    text = write_report(work_dir, records)
    for fact in ('opened 2 times', 'Linear probe (4 of 4', 'Tip-Adapter (3 of 4'):
        assert fact in text
    records = run(replace(first, methods=('gda',)), work_dir, quiet=True)
    new = 'correct', 'opening'
    assert 'opened 3 times' in write_report(work_dir, records)
    for file in (work_dir / 'runs').glob('*.json'):
        if not file.name.startswith(('gda', 'zero')):  # as an older version wrote them
            change_json(file, lambda record: [record['test'].pop(k) for k in new])
    text = write_report(work_dir, run(first, work_dir, quiet=True))
    assert 'opened' not in text and 'run.log' in text
    assert 'No interval: Tip-Adapter, Linear probe.' in text
    assert re.search(r'- 1 shot\. .*Undecided: .*Tip-Adapter; Linear probe', text)
    gain = r'[+-]\d+\.\d\d'
    assert re.search(rf'\n\| Tip-Adapter \| {gain} \| {gain} \|\n', text)
    assert re.search(rf'\n\| GDA \| {gain} ± \d.* \|\n', text)


def test_folder_of_another_run(config, work_dir, tmp_path, monkeypatch):
    small = replace(config, **{**NOTHING, 'methods': ('clip_adapter',)})
    run(small, work_dir, quiet=True)
    for change, what in (
        (dict(views=0), 'views'),
        (dict(overrides={'clip_adapter': dict(alpha=0.1)}), 'clip_adapter'),
    ):
        with pytest.raises(FileExistsError, match=what):
            run(replace(small, **change), work_dir, quiet=True)

    def as_of_an_older_version(about):
        """Only a part of the hyper-parameters, and two grids."""
        defaults, grid = about['recipes']['clip_adapter']
        part = {key: defaults[key] for key in ('alpha', 'keep')}
        about['recipes']['clip_adapter'] = [part, {'alpha': grid.pop('alpha')}, grid]

    change_json(work_dir / 'run.json', as_of_an_older_version)
    run(small, work_dir, quiet=True)
    defaults = dict(METHODS['clip_adapter'].defaults, alpha=0.9)
    changed = replace(METHODS['clip_adapter'], defaults=defaults)
    monkeypatch.setitem(METHODS, 'clip_adapter', changed)
    with pytest.raises(FileExistsError, match='clip_adapter'):
        run(small, work_dir, quiet=True)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='other'):
        run(small, tmp_path / 'other', quiet=True)


@pytest.mark.parametrize('change', ['image', 'replaced', 'class', 'weights'])
def test_run_is_not_continued_with_other_data(
    config, work_dir, tmp_path, image_folder, tiny_clip, change
):
    images, weights = tmp_path / 'images', tmp_path / 'weights.pt'
    shutil.copytree(image_folder, images)
    shutil.copy(tiny_clip['pretrained'], weights)
    small = replace(config, dataset=str(images), pretrained=str(weights), **NOTHING)
    run(small, work_dir, quiet=True)
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
    what = {'class': 'images.*class', 'weights': 'weights'}
    with pytest.raises(FileExistsError, match=what.get(change, 'images')):
        run(small, work_dir, quiet=True)


def test_touched_images_do_not_stop_a_run(config, work_dir, tmp_path, image_folder):
    shutil.copytree(image_folder, tmp_path / 'images')
    file = tmp_path / 'list.csv'
    rows = [f'images/{c}/{i}.png,{c}' for c in ('red', 'blue') for i in range(24)]
    file.write_text('\n'.join(['path,class', *rows]))
    small = replace(config, dataset=str(file), **NOTHING)
    run(small, work_dir, quiet=True)
    for path in (tmp_path / 'images').rglob('*.png'):
        path.touch()
    more = replace(small, methods=('tip_adapter',))
    assert len(run(more, work_dir, quiet=True)) == 2
    rows[0] = rows[0].replace(',red', ',blue')
    file.write_text('\n'.join(['path,class', *rows]))
    with pytest.raises(FileExistsError, match='images'):
        run(more, work_dir, quiet=True)


def split_folder(image_folder, root):
    """Copies images into train and test, 4 of red and 8 of blue into train."""
    for part, name, numbers in (
        ('train', 'red', range(4)),
        ('train', 'blue', range(8)),
        ('test', 'red', range(10, 13)),
        ('test', 'blue', range(10, 13)),
    ):
        (root / part / name).mkdir(parents=True)
        for i in numbers:
            shutil.copy(image_folder / name / f'{i}.png', root / part / name)
    return root


def test_copies_under_two_classes_are_refused(config, work_dir, tmp_path, image_folder):
    images = split_folder(image_folder, tmp_path / 'images')
    small = replace(config, dataset=str(images), **NOTHING)
    shutil.copy(images / 'train/red/0.png', images / 'train/blue/copy.png')
    fact = r'red/0\.png \(red\) and .*copy\.png \(blue\)|copy.*blue.*0\.png \(red\)'
    with pytest.raises(ValueError, match=fact):
        run(small, work_dir, quiet=True)
    with pytest.raises(ValueError, match=fact):
        fit(small, tmp_path / 'fit.safetensors', 'gda', quiet=True)


def test_fit_of_all_images(config, tool, tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    split_folder(image_folder, tmp_path / 'mine')
    Path('plain').symlink_to('mine/train')
    encoder = ('--model', config.model, '--pretrained', config.pretrained)
    for data in ('mine', 'plain'):  # the part test of the first is left alone
        fit_it = ('fit', data, *encoder, '--cfg-options', 'views=0')
        tool(*fit_it, '--method', 'tip_adapter')
        printed = ' '.join(capsys.readouterr().out.split())
        assert '2 classes, 4 to 8 of each' in printed and 'not known' in printed
        classifier, about = read_classifier(f'work_dirs/fit_{data}.safetensors')
        assert about['record']['pictures'] == 12
        assert classifier.labels.bincount().tolist() == [8, 8], 'classes are balanced'
        with pytest.raises(SystemExit, match=f'fit_{data}.safetensors exists'):
            tool(*fit_it)


def test_fit_of_features(tmp_path):
    save_file(made_tensors(), file := tmp_path / 'birds.safetensors', METADATA)
    config = FewShotConfig(features=str(file))
    counts = fit(config, tmp_path / 'gda.safetensors', 'gda', quiet=True)
    assert counts == dict.fromkeys(('cat', 'dog', 'emu'), 4 + 6), 'train_4 and val'


def test_copies_of_test_images_are_refused(
    config, work_dir, tmp_path, image_folder, tool
):
    images = tmp_path / 'images'
    shutil.copytree(image_folder, images / 'train')
    (images / 'test' / 'red').mkdir(parents=True)
    shutil.copy(image_folder / 'red' / '0.png', images / 'test' / 'red')
    with Image.open(image_folder / 'blue' / '3.png') as image:
        image.save(images / 'test' / 'red' / 'blue3.bmp')
    options = dict(NOTHING, shots=(16,), views=0)
    config = replace(config, dataset=str(images), **options)
    bad = images / 'test' / 'red' / 'bad.png'
    for on_bad_image in ('error', 'skip'):
        with pytest.raises(ValueError, match=r'\b[12] .*0\.png'):
            run(replace(config, on_bad_image=on_bad_image), work_dir, quiet=True)
        bad.write_bytes(b'no image')
    bad.unlink()
    for decode, count in (((), 1), (('--decode',), 2)):
        with pytest.raises(SystemExit, match=rf'\b{count} .*0\.png'):
            tool('check', images, *decode)
    (images / 'test' / 'red' / '0.png').unlink()
    with Image.open(images / 'train' / 'red' / '0.png') as image:
        for i in range(24):
            image.save(images / 'train' / 'red' / f'{i}.png')
        image.save(images / 'test' / 'red' / 'copy.bmp')
    with pytest.raises(ValueError, match=r'(copy|blue3)\.bmp'):
        run(config, work_dir, quiet=True)


def test_classifier_to_use_and_final(config, encoder, work_dir):
    records = run(replace(config, seeds=(1, 2)), work_dir, quiet=True, final=True)
    chosen = choose(records)
    assert chosen.record['shots'] == 4 and chosen.record['selection'] != 'oracle'
    assert (work_dir / chosen.file).is_file()
    assert f'`{chosen.file}`' in write_report(work_dir, records)
    for record in records:  # what is chosen does not depend on the test split
        record['test']['accuracy'] *= -1
    assert choose(records) == chosen

    def record_of(name):
        file = work_dir / 'classifiers' / f'{name}.safetensors'
        return read_classifier(file)[1]['record']

    assert record_of('tip_adapter_oracle_4shot_seed1')['selection'] == 'oracle'
    final = record_of('final')
    assert final['pictures'] == 72 and final['method'] == chosen.record['method']
    assert load_classifier(work_dir / 'classifiers' / 'final.safetensors', encoder)


def test_choice():
    def record(method, accuracy, zero_shot=50.0, loss=1.0, shots=4, seed=1):
        return dict(
            method=method,
            shots=shots,
            seed=seed,
            val_accuracy=accuracy,
            val_loss=loss,
            val_zero_shot=zero_shot,
            selection='val',
        )

    zero_shot = record('zero_shot', None, shots=0)
    tip, adapter = record('tip_adapter', 60.0), record('clip_adapter', 60.0, loss=0.5)
    few = record('task_res', 90.0, shots=1)
    oracle = {**record('task_res', 90.0), 'selection': 'oracle'}
    assert choose([zero_shot, few, tip, adapter, oracle]).record is adapter
    # Seeds have other validation images: the second is not better for its 90 %.
    again = record('clip_adapter', 90.0, seed=2)
    assert choose([zero_shot, tip, again, adapter]).record is adapter
    below = [zero_shot, record('clip_adapter', 50.0)]
    assert choose(below).record is zero_shot
    unknown = [zero_shot, record('tip_adapter', None), record('clip_adapter', None)]
    assert choose(unknown).record is unknown[2]
    assert 'validation' in choose(unknown).why


def test_what_selection_is_given(config, encoder, work_dir, monkeypatch):
    select, given = runner_module.select, []
    monkeypatch.setattr(
        runner_module, 'select', lambda *a: given.append(a) or select(*a)
    )
    options = dict(oracle=(), shots=(4,), seeds=(3, 5), selection='cv')
    config = replace(config, methods=('tip_adapter', 'lp++'), **options)
    records = run(config, work_dir, quiet=True)
    assert [r['selection'] for r in records] == ['fixed', *2 * ['cv', 'fixed']]
    # Methods with nothing to search are compared with the others and with zero-shot.
    for key in ('val_accuracy', 'val_loss', 'val_zero_shot'):
        assert all(r[key] is not None for r in records[1:])
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


def test_a_run_of_oracles_alone_has_no_results(config, work_dir):
    config = replace(config, **{**NOTHING, 'oracle': ('gda',)})
    text = write_report(work_dir, run(config, work_dir, quiet=True))
    assert '## At 1 shot\n' in text and 'GDA (oracle)' in text
    assert 'Above zero-shot' not in text and 'Undecided' not in text


def test_damaged_description_of_a_run(config, work_dir):
    config = replace(config, **NOTHING)
    run(config, work_dir, quiet=True)
    (work_dir / 'run.json').write_text('{')
    with pytest.raises(ValueError, match=r'run\.json'):
        run(config, work_dir, quiet=True)


def test_statistics():
    won = np.zeros((1, 1307))
    won[0, :17] = [1] * 12 + [-1] * 5
    for gaps in (won, won.repeat(5, 0)):  # seeds of one set of training images
        found = difference(gaps, 1.0)
        assert found.mean == pytest.approx(700 / 1307) and found.sign == 0
        assert 0.05 < found.p < 0.144, "not above McNemar's exact test"
    # Without differences of draws: Bonett and Price, 1 won and 1 lost image added.
    assert found.half == pytest.approx(196.2 * (19 - 49 / 1309) ** 0.5 / 1309, rel=1e-3)
    assert difference(np.zeros((3, 100)), 0.0).half > 0
    # Draws alone: Student's t of 0, 0.1, 0.2 in a test split without end.
    gaps = np.stack([np.tile(np.arange(10) < k, 10**5) for k in (0, 1, 2)]).astype(int)
    assert difference(gaps, 0.0).half == pytest.approx(24.84, abs=0.05)
    # Nadeau and Bengio: 1/3 + 1 instead of 1/3.
    assert difference(gaps, 0.5).half == pytest.approx(2 * 24.84, abs=0.1)
    assert difference(gaps, 1.0).sign == 0 and difference(1 - gaps, 0.0).sign == 1
    nan = float('nan')
    # As R's p.adjust(c(0.01, 0.04, 0.03), 'holm').
    corrected = holm([0.01, nan, 0.04, 0.03])
    assert corrected[:1] + corrected[2:] == pytest.approx([0.03, 0.06, 0.06])
    assert corrected[1] != corrected[1]


def test_options(config, work_dir):
    one = replace(config, shots=4, seeds=1, methods='gda')
    assert (one.shots, one.seeds, one.methods) == ((4,), (1,), ('gda',))
    for options, fact in (
        (dict(methods=('tip',)), "'tip'"),
        (dict(selection='oracle'), "'oracle'"),
        (dict(seeds=()), 'seeds'),
        (dict(shots=['a']), 'shots'),
        (dict(shots=(0,)), 'shots.*0'),
        (dict(views='ten'), "views.*'ten'"),
        (dict(crop_scale=0.5), 'crop_scale.*0.5'),
        (dict(overrides={'gda': 3}), 'gda'),
        (dict(overrides={'gda': {'alpha': 'x'}}), "alpha of gda.*'x'"),
        (dict(model=None), 'model'),
        (dict(features='x'), 'features'),
    ):
        with pytest.raises(ValueError, match=fact):
            replace(config, **options)
    with pytest.raises(ValueError, match=r'\b12\b.*\b16\b'):
        run(replace(config, shots=(16,)), work_dir, quiet=True)
    assert not work_dir.exists(), 'nothing is written'
    few = run(replace(config, **{**NOTHING, 'shots': (1, 16)}), work_dir, quiet=True)
    assert len(few) == 1  # zero-shot
    about = json.loads((work_dir / 'run.json').read_text())
    assert about['config']['shots'] == [1] and '12 training' in about['notes'][0]


# --- Commands ---------------------------------------------------------------------


def test_run_command(tool, config, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('my_images').symlink_to(image_folder)
    command = [
        *('run', 'my_images', '--model', config.model, '--methods', 'clip_adapter'),
        *('--pretrained', config.pretrained, '--shots', '4', '--seeds', '1'),
        *('--cfg-options', 'views=0', 'cache_dir=my_cache'),
        *(f'overrides.clip_adapter.{key}={value}' for key, value in CHEAP.items()),
    ]
    tool(*command)
    printed = capsys.readouterr().out
    assert 'CLIP-Adapter' in printed
    named = re.search(r'few_shot.py predict \\\s+(\S+) IMAGES \\\n', printed)[1]
    assert Path(named).parent == Path('work_dirs/few_shot_my_images/classifiers')
    assert Path(named).is_file()
    encoder = ('--model', config.model, '--pretrained', config.pretrained)
    tool('test', named, 'my_images', *encoder)
    assert not Path('work_dirs/few_shot_features').exists(), 'the cache of the run'
    with pytest.raises(SystemExit, match=r'work_dirs/few_shot_my_images.*selection'):
        tool(*command, '--selection', 'fixed')


def test_run_of_a_configuration(tool, config, tmp_path, monkeypatch):
    pytest.importorskip('mmpretrain', reason='the configuration inherits from it')
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(config, work_dir, final):
        seen.extend((config, work_dir))
        raise ValueError('stop')

    monkeypatch.setattr('dsnet_mm.few_shot.cli.run', stop)
    for options in (
        ('--cfg-options', 'task=dtd', 'views=3'),
        ('--dataset', 'dtd', '--cfg-options', 'views=3'),
    ):
        seen.clear()
        with pytest.raises(SystemExit, match='stop'):
            tool('run', 'clip-adapter_rn50', '--seeds', '4', *options)
        found, work_dir = seen
        assert (found.dataset, found.seeds, found.views) == ('dtd', (4,), 3)
        assert found.prompts is None, 'not those of ImageNet'
        assert work_dir == Path('work_dirs/clip-adapter_rn50_dtd')


def test_check_command(tool, image_folder, tmp_path, capsys):
    tool('check', image_folder, '--decode')  # exit status 0
    with pytest.raises(SystemExit, match=r'split_zhou_DescribableTextures\.json'):
        tool('check', 'dtd', '--data-root', tmp_path)
    tool('doctor', image_folder)
    assert 'check' in capsys.readouterr().err


def test_bad_arguments_of_the_command_line(tool, tmp_path, image_folder):
    (tmp_path / 'other.py').write_text('model = dict()')
    (tmp_path / 'x.safetensors').touch()
    for arguments, fact in (
        ((tmp_path / 'other.py',), r'other\.py.*few_shot'),
        ((), 'dataset.*model'),
        ((image_folder,), 'model'),
        ((image_folder, '--dataset', 'x'), 'images.*x'),
        (('my_imges',), 'my_imges.*folder'),
        (('none.safetensors',), r'none\.safetensors.*folder'),
        ((tmp_path / 'x.safetensors',), r'x\.safetensors is not a safetensors file'),
        ((image_folder, '--model', 'y', '--cfg-options', 'shot=1'), 'shot'),
        (('clip-adapter_rn50_dtd',), 'clip-adapter_rn50 .*task=dtd'),
    ):
        with pytest.raises(SystemExit, match=rf'^error: .*{fact}'):
            tool('run', *arguments)

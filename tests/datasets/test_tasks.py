"""Splits, few-shot draws, the layouts of data sets, and the check of a data set."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from PIL import Image

from dsnet_mm.datasets import PUBLIC_DATASETS, load_task, read_split, sample_few_shot
from dsnet_mm.datasets.check import diagnose
from tests.damage import damaged_json, quick, read_or_refuse

SHARED = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'few_shot'
PARTS = ('train', 'val', 'test')
PUBLISHED = sorted(SHARED.glob('*-shot_*-seed_*.json'))


@pytest.mark.skipif(not PUBLISHED, reason='the published index files are missing')
@pytest.mark.parametrize('index_file', PUBLISHED, ids=lambda p: p.stem)
def test_draw_equals_published_index_file(index_file):
    name, shots, seed = re.fullmatch(
        r'(\w+)-shot_(\d+)-seed_(\d+)', index_file.stem
    ).groups()
    drawn = sample_few_shot(SHARED / f'split_zhou_{name}.json', int(shots), int(seed))
    published = json.loads(index_file.read_text())
    for part in ('train', 'val'):
        data = published[part]
        data = data['data'] if isinstance(data, dict) else data
        assert len(drawn[part]) == len(data)
        for (path, label, class_name), entry in zip(drawn[part], data, strict=True):
            assert entry['impath'].endswith('/' + path)
            assert (label, class_name) == (entry['label'], entry['classname'])


def write_split(path, per_class=6):
    split = {
        part: [
            [f'{cls}/{part}_{i}.jpg', label, cls]
            for cls, label in (('hare', 1), ('red_fox', 0))
            for i in range(per_class)
        ]
        for part in ('train', 'val', 'test')
    }
    path.write_text(json.dumps(split))
    return path


def test_all_classes_share_one_random_stream(tmp_path):
    split_file = write_split(tmp_path / 'split_zhou_X.json')
    drawn = sample_few_shot(split_file, 5, 1)
    rng = random.Random(1)
    for part, count in (('train', 5), ('val', 4)):
        assert drawn[part] == [
            (f'{cls}/{part}_{i}.jpg', label, cls)
            for cls, label in (('hare', 1), ('red_fox', 0))  # order of the file
            for i in rng.sample(range(6), count)
        ]
    assert drawn == sample_few_shot(read_split(split_file), 5, 1)
    assert drawn != sample_few_shot(split_file, 5, 2)


def test_bad_arguments_of_a_draw(tmp_path):
    split_file = write_split(tmp_path / 'split_zhou_X.json')
    for shots, error, fact in (
        (7, ValueError, "'hare' has 6"),
        (0, ValueError, 'got 0'),
        (1.5, TypeError, 'shots'),
    ):
        with pytest.raises(error, match=fact):
            sample_few_shot(split_file, shots, 1)
    with pytest.raises(FileNotFoundError, match=r'none\.json'):
        sample_few_shot(tmp_path / 'none.json', 1, 1)
    split_file.write_text('{"train": []}')
    with pytest.raises(ValueError, match='split_zhou_X'):
        sample_few_shot(split_file, 1, 1)


SPLIT = {part: [['a/1.jpg', 0, 'a'], ['b/2.jpg', 1, 'b']] for part in PARTS}


@quick
@given(damaged_json(SPLIT))
def test_damaged_split_file(tmp_path, content):
    file = tmp_path / 'dtd' / PUBLIC_DATASETS['dtd'].split_file
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    if task := read_or_refuse(lambda: load_task('dtd', tmp_path), file.name, 'dtd:'):
        images = file.parent / 'images'
        assert task.split == {
            part: [
                (str(images / path), label, cls) for path, label, cls in content[part]
            ]
            for part in PARTS
        }
        assert all(
            type(label) is int for items in task.split.values() for _, label, _ in items
        )


def make_folder(root, counts):
    for cls, count in counts.items():
        (root / cls).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (8, 8), (i, ord(cls[0]), 0)).save(root / cls / f'{i}.png')
    return root


def sizes(task):
    return {part: len(items) for part, items in task.split.items()}


def test_folder_without_split(tmp_path):
    task = load_task(make_folder(tmp_path / 'mine', {'red_fox': 10, 'hare': 4}))
    assert task.class_names == ('hare', 'red fox')
    assert sizes(task) == {'train': 7, 'val': 2, 'test': 5}
    assert len({item[0] for items in task.split.values() for item in items}) == 14
    assert task == load_task(tmp_path / 'mine')


def test_folder_with_split_and_empty_class(tmp_path):
    make_folder(tmp_path / 'train', {'a': 2, 'b': 2})
    with pytest.raises(ValueError, match=r'train.* test'):
        load_task(tmp_path)
    make_folder(tmp_path / 'test', {'a': 1, 'b': 1})
    make_folder(tmp_path / 'validation', {'a': 2, 'b': 1})
    task = load_task(tmp_path, prompts='{} texture.')
    assert sizes(task) == {'train': 4, 'val': 3, 'test': 2}
    assert task.prompts == ('{} texture.',)
    make_folder(tmp_path / 'valid', {'a': 1})
    with pytest.raises(ValueError, match='valid and validation'):
        load_task(tmp_path)
    shutil.rmtree(tmp_path / 'valid')
    (tmp_path / 'train' / 'c').mkdir()
    with pytest.raises(ValueError, match=r'train.c'):
        load_task(tmp_path)


def test_nested_folders(tmp_path, caplog):
    root = make_folder(tmp_path / 'mine' / 'archive', {'a': 2, 'a/x': 4, 'b': 6})
    make_folder(root / 'a', {'.b': 1})
    task = load_task(tmp_path / 'mine', whole=True)
    assert task.class_names == ('a', 'b') and sizes(task)['train'] == 12
    assert sizes(task)['test'] == 0
    assert '4 images' in caplog.text and 'a/x/0.png' in caplog.text
    make_folder(tmp_path / 'mine', {'other': 3})  # now archive is a class
    assert load_task(tmp_path / 'mine').class_names == ('archive', 'other')


def test_csv_with_split(tmp_path):
    lines = [f'{c}/{i}.png,{c},{("train", "test")[i]}' for c in 'ba' for i in (0, 1)]
    file = tmp_path / 'list.csv'
    file.write_text('\n'.join(['path,class,split', '', *lines]))
    task = load_task(file)
    assert task.split['train'] == [
        (f'{tmp_path}/{c}/0.png', 'ab'.index(c), c) for c in 'ba'
    ]
    assert [item[1:] for item in task.split['test']] == [(1, 'b'), (0, 'a')]


def test_check_of_a_folder(tmp_path):
    folder = make_folder(tmp_path / 'mine', {'a': 10, 'b': 10})
    assert diagnose(folder, decode=True) == []
    (train, *_), (test, *_) = (load_task(folder).split[p] for p in ('train', 'test'))
    Image.open(train[0]).save(test[0], compress_level=0)
    (problem,) = diagnose(folder, decode=True)
    assert train[0] in problem and test[0] in problem, 'the pixels are the same'
    assert diagnose(folder) == [], 'the files are not'
    shutil.copy(train[0], test[0])
    assert test[0] in diagnose(folder)[0]

    Image.open(folder / 'a' / '3.png').save(folder / 'b' / 'again.bmp')
    assert not any('again.bmp' in problem for problem in diagnose(folder))
    problems = [p for p in diagnose(folder, decode=True) if 'another class' in p]
    assert 'a/3.png (a)' in problems[0] and 'again.bmp (b)' in problems[0]
    (folder / 'b' / 'again.bmp').unlink()

    (folder / 'a' / '0.png').write_bytes(b'')
    (folder / 'b' / '0.png').write_bytes(b'no image')
    Image.new('F', (8, 8)).save(folder / 'b' / '1.tif')
    problems = ' '.join(diagnose(folder, decode=True))
    assert '1 images are empty' in problems and 'a/0.png' in problems
    assert '2 images are unreadable' in problems and 'b/0.png' in problems


def test_check_of_a_public_data_set(tmp_path):
    (problem,) = diagnose('dtd', tmp_path)
    assert PUBLIC_DATASETS['dtd'].source in problem
    assert PUBLIC_DATASETS['dtd'].split_file in problem
    (tmp_path / 'dtd').mkdir()
    write_split(tmp_path / 'dtd' / 'split_zhou_DescribableTextures.json')
    problems = diagnose('dtd', tmp_path)
    for fact in ('2 classes here and 47', '12 train images here and 2820', '36 images'):
        assert sum(fact in problem for problem in problems) == 1


def test_imagenet_layouts(tmp_path):
    wnids, numbers = [f'n{i:02d}' for i in range(11)], [str(i) for i in range(11)]
    v2 = 'imagenetv2/imagenetv2-matched-frequency-format-val'
    for place, classes in {
        'imagenet/images/train': wnids,
        'imagenet/images/val': wnids,
        v2: numbers,  # in the order of numbers
        'imagenet-rendition/imagenet-r': wnids,
    }.items():
        make_folder(tmp_path / place, dict.fromkeys(classes, 1))
        lines = [f'{wnid} gold fish {i}\n' for i, wnid in enumerate(wnids)]
        names = tmp_path / place.split('/')[0] / 'classnames.txt'
        names.write_text(''.join(lines))
    for name in ('imagenet', 'imagenetv2', 'imagenet_r'):
        task = load_task(name, tmp_path)
        assert task.class_names == tuple(f'gold fish {i}' for i in range(11))
        train = 11 if name == 'imagenet' else 0
        assert sizes(task) == {'train': train, 'val': 0, 'test': 11}
    with pytest.raises(FileNotFoundError, match='imagenet-sketch'):
        load_task('imagenet_sketch', tmp_path)
    # ImageNet has classes of the same name.
    names.write_text(''.join(f'{wnid} missile\n' for wnid in wnids))
    assert load_task('imagenet_r', tmp_path).class_names == ('missile',) * 11
    names.write_text('n00 missile\n')
    with pytest.raises(ValueError, match='n01'):
        load_task('imagenet_r', tmp_path)


def test_aircraft_layout(tmp_path):
    folder = tmp_path / 'fgvc_aircraft'
    folder.mkdir()
    (folder / 'variants.txt').write_text('707-320\nA340 200\n')
    for part in ('train', 'val', 'test'):
        lines = '0000001 A340 200\n0000002 707-320\n'
        (folder / f'images_variant_{part}.txt').write_text(lines)
    task = load_task('fgvc_aircraft', tmp_path)
    assert task.class_names == ('707-320', 'A340 200')
    assert task.split['val'][0][1] == 1
    assert task.prompts == ('a photo of a {}, a type of aircraft.',)
    (folder / 'variants.txt').write_text('707-320\n')
    with pytest.raises(ValueError, match='A340 200'):
        load_task('fgvc_aircraft', tmp_path)

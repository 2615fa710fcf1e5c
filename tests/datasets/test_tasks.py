"""Splits, few-shot draws, prompts, folders, and the check of a data set."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from dsnet_mm.clip.prompts import resolve_prompts
from dsnet_mm.datasets import PUBLIC_DATASETS, load_task, read_split, sample_few_shot
from dsnet_mm.datasets.check import diagnose

SHARED = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'few_shot'
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
    with pytest.raises(ValueError, match=r"'hare' has 6 .* fewer than the 7 shots"):
        sample_few_shot(split_file, 7, 1)
    with pytest.raises(ValueError, match='at least 1, got 0'):
        sample_few_shot(split_file, 0, 1)
    with pytest.raises(TypeError, match='shots must be an integer'):
        sample_few_shot(split_file, 1.5, 1)
    with pytest.raises(FileNotFoundError, match='split_zhou'):
        sample_few_shot(tmp_path / 'none.json', 1, 1)
    split_file.write_text('{"train": []}')
    with pytest.raises(ValueError, match='is not a split file'):
        sample_few_shot(split_file, 1, 1)


def test_prompts_by_name_file_and_list(tmp_path):
    assert resolve_prompts('dtd') == ('{} texture.',)
    assert len(resolve_prompts('imagenet_7')) == 7
    assert len(resolve_prompts('imagenet_80')) == 80
    file = tmp_path / 'prompts.txt'
    file.write_text('a {}.\n\nthe {}.\n')
    assert resolve_prompts(file) == ('a {}.', 'the {}.')
    with pytest.raises(ValueError, match=r'must contain \{\} once'):
        resolve_prompts(['a photo'])
    with pytest.raises(ValueError, match=r'has no \{\}'):
        resolve_prompts('a photo')


def make_folder(root, counts):
    for cls, count in counts.items():
        (root / cls).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (8, 8), (i, 0, 0)).save(root / cls / f'{i}.png')
    return root


def test_folder_without_split(tmp_path):
    task = load_task(make_folder(tmp_path / 'mine', {'red_fox': 10, 'hare': 4}))
    assert task.class_names == ('hare', 'red fox')
    sizes = {part: len(items) for part, items in task.split.items()}
    assert sizes == {'train': 7, 'val': 2, 'test': 5}
    paths = [item[0] for items in task.split.values() for item in items]
    assert len(set(paths)) == 14
    assert task == load_task(tmp_path / 'mine')


def test_folder_with_split_and_empty_class(tmp_path):
    make_folder(tmp_path / 'train', {'a': 2, 'b': 2})
    make_folder(tmp_path / 'test', {'a': 1, 'b': 1})
    task = load_task(tmp_path, prompts='{} texture.')
    assert [len(task.split[p]) for p in ('train', 'val', 'test')] == [4, 0, 2]
    assert task.prompts == ('{} texture.',)
    (tmp_path / 'train' / 'c').mkdir()
    with pytest.raises(ValueError, match='contains no image'):
        load_task(tmp_path)


def test_duplicate_class_names(tmp_path):
    make_folder(tmp_path / 'mine', {'red fox': 2, 'red_fox': 2})
    with pytest.raises(ValueError, match="duplicate class names 'red fox'"):
        load_task(tmp_path / 'mine')


def test_csv(tmp_path):
    make_folder(tmp_path, {'a': 2, 'b': 2})
    file = tmp_path / 'list.csv'
    with file.open('w', newline='') as handle:
        writer = csv.writer(handle)
        writer.writerow(['path', 'class', 'split'])
        for cls in 'ab':
            writer.writerow([f'{cls}/0.png', cls, 'train'])
            writer.writerow([f'{cls}/1.png', cls, 'test'])
    task = load_task(file)
    assert [item[2] for item in task.split['test']] == ['a', 'b']
    assert all(Path(item[0]).is_file() for item in task.split['train'])
    file.write_text('path,name\n')
    with pytest.raises(ValueError, match='columns path and class'):
        load_task(file)


def test_doctor_names_missing_and_damaged_files(tmp_path):
    (problem,) = diagnose('eurosat', tmp_path)
    assert PUBLIC_DATASETS['eurosat'].source in problem
    assert 'split_zhou_EuroSAT.json' in problem

    folder = make_folder(tmp_path / 'mine', {'a': 4, 'b': 4})
    assert diagnose(folder, decode=True) == []
    (folder / 'a' / '0.png').write_bytes(b'')
    (folder / 'b' / '0.png').write_bytes(b'no image')
    problems = ' '.join(diagnose(folder, decode=True))
    assert '1 images are empty' in problems
    assert '1 images are damaged' in problems


def test_doctor_compares_counts_with_the_papers(tmp_path):
    folder = tmp_path / 'dtd'
    folder.mkdir()
    write_split(folder / 'split_zhou_DescribableTextures.json')
    problems = ' '.join(diagnose('dtd', tmp_path))
    assert '2 classes here and 47' in problems
    assert '12 train images here and 2820' in problems
    assert '36 images are missing' in problems


def test_imagenet_layouts(tmp_path):
    words = 'n01 tench\nn02 gold fish\n'
    layouts = {
        'imagenet': {'images/train': ('n01', 'n02'), 'images/val': ('n01', 'n02')},
        'imagenetv2': {'imagenetv2-matched-frequency-format-val': ('0', '1')},
        'imagenet-adversarial': {'imagenet-a': ('n01', 'n02')},
    }
    for folder, places in layouts.items():
        for place, classes in places.items():
            make_folder(tmp_path / folder / place, dict.fromkeys(classes, 1))
        (tmp_path / folder / 'classnames.txt').write_text(words)
    for name in ('imagenet', 'imagenetv2', 'imagenet_a'):
        task = load_task(name, tmp_path)
        assert task.class_names == ('tench', 'gold fish')
        assert len(task.split['test']) == 2
        assert len(task.split['train']) == (2 if name == 'imagenet' else 0)


def test_imagenet_may_have_duplicate_class_names(tmp_path):
    place = tmp_path / 'imagenet-rendition'
    make_folder(place / 'imagenet-r', {'n01': 1, 'n02': 1})
    (place / 'classnames.txt').write_text('n01 missile\nn02 missile\n')
    assert load_task('imagenet_r', tmp_path).class_names == ('missile', 'missile')


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

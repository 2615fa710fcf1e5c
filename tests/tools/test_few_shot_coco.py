"""Few-shot subsets of annotations: nested, the same again, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.conftest import tool


def write(path: Path, images: int, names: tuple[str, ...] = ('a', 'b', 'c')) -> Path:
    """Writes annotations: image i has i % 3 + 1 objects of each class but the last."""
    content = dict(
        images=[
            dict(id=i, file_name=f'{i}.png', width=9, height=9) for i in range(images)
        ],
        categories=[dict(id=7 - i, name=name) for i, name in enumerate(names)],
        annotations=[],
    )
    for i in range(images):
        for label, category in enumerate(content['categories']):
            for _ in range(i % 3 + 1 if label < 2 else i == 0):
                content['annotations'].append(
                    dict(
                        id=len(content['annotations']),
                        image_id=i,
                        category_id=category['id'],
                        bbox=[0, 0, 2, 2],
                        area=4,
                        iscrowd=0,
                    )
                )
    path.write_text(json.dumps(content))
    return path


def draw(out: Path, *arguments: object) -> dict[str, dict]:
    main = tool('dataset_converters/few_shot_coco.py').main
    main([str(out), *map(str, arguments)])
    return {path.stem: json.loads(path.read_text()) for path in out.glob('*.json')}


def names(content: dict) -> set[str]:
    return {image['file_name'] for image in content['images']}


def test_images(tmp_path: Path) -> None:
    train, val = write(tmp_path / 'train.json', 20), write(tmp_path / 'val.json', 5)
    sources = ('--source', train, 'train', '--source', val, 'val/')
    options = (*sources, '--images', 1, 2, '--draws', 3, '--novel', 'a')
    with pytest.raises(SystemExit, match='2'):
        draw(tmp_path / 'out', *sources, '--images', 1, 2, '--novel', 'a')  # c has one
    content = json.loads(train.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['category_id'] > 5]
    content['categories'].pop()
    for path in (train, val):
        path.write_text(json.dumps(content))
    files = draw(tmp_path / 'out', *options)
    assert len(files) == 11
    drawn = set()
    for seed in range(3):
        one, two = (names(files[f'{k}images_draw{seed}']) for k in (1, 2))
        assert one < two
        assert len(two) in (2, 3, 4), 'two of each class'
        drawn |= two
    assert names(files['1images_draw0']) != names(files['1images_draw1'])
    assert names(files['drawn']) == drawn
    assert all(name.startswith('train/') for name in drawn)
    first, second = ({f'{x}/{i}.png' for i in range(20)} for x in ('train', 'val'))
    assert names(files['base']) == first, 'the detector has seen them'
    assert names(files['rest']) == second
    without = draw(tmp_path / 'without', *options[:-2])
    assert names(without['rest']) == (first | second) - names(without['drawn'])
    assert len(without) == 8
    parts = [files[name] for name in ('base', 'rest_base', 'rest_novel')]
    for content in files.values():
        assert [c['name'] for c in content['categories']] == ['b', 'a']
        numbers = [image['id'] for image in content['images']]
        assert {a['image_id'] for a in content['annotations']} <= {*numbers}
        objects = {i: 0 for i in numbers}
        for a in content['annotations']:
            objects[a['image_id']] += 1
        for image in content['images']:
            wanted = int(Path(image['file_name']).stem) % 3 + 1
            share = 1 if content in parts else 2
            assert objects[image['id']] == share * wanted, 'all objects of an image'
    classes = [{a['category_id'] for a in x['annotations']} for x in parts]
    assert classes == [{6}, {6}, {7}]
    again = draw(tmp_path / 'again', *options)
    assert again == files
    more = (*sources, '--images', 1, 2, 5, '--draws', 3, '--novel', 'a')
    assert (
        draw(tmp_path / 'more', *more).items()
        > {k: v for k, v in files.items() if 'draw' in k and k != 'drawn'}.items()
    )


def test_boxes(tmp_path: Path) -> None:
    source = write(tmp_path / 'train.json', 20, ('a', 'b'))
    options = ('--source', source, '.', '--boxes', 1, 3, 5, '--draws', 2)
    files = draw(tmp_path / 'out', *options)
    for seed in range(2):
        before: set = set()
        for k in (1, 3, 5):
            boxes = files[f'{k}boxes_draw{seed}']['annotations']
            assert [a['category_id'] for a in boxes].count(7) == k
            assert [a['category_id'] for a in boxes].count(6) == k
            assert before <= (before := {a['id'] for a in boxes})


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write(tmp_path / 'a.json', 4, ('a', 'b'))
    other = write(tmp_path / 'b.json', 4, ('a', 'x'))
    empty = write(tmp_path / 'c.json', 0, ('a', 'b'))
    twice = write(tmp_path / 'd.json', 4, ('a', 'a'))
    text = tmp_path / 'e.json'
    text.write_text('no JSON')
    given = ('--source', source, 'train')

    def refused(fact: str, *arguments: object) -> None:
        with pytest.raises(SystemExit, match='2'):
            draw(tmp_path / 'out', *arguments)
        assert fact in ' '.join(capsys.readouterr().err.split())
        assert not (tmp_path / 'out').exists()

    refused(
        "'a' has no 1 images: draw 0 found 0, in 0",
        '--source',
        empty,
        'train',
        '--images',
        1,
    )
    refused("'a' has no 5 images", *given, '--images', 5)
    refused("'a' has no 50 boxes", *given, '--boxes', 50)
    refused("['x']", *given, '--images', 1, '--novel', 'x')
    refused('not all', *given, '--images', 1, '--novel', 'a', 'b')
    refused('same name', '--source', twice, 'train', '--images', 1)
    refused('b.json', *given, '--source', other, 'val', '--images', 1)
    refused('none.json', '--source', 'none.json', 'train', '--images', 1)
    refused('e.json', '--source', text, 'train', '--images', 1)
    refused('[0]', *given, '--images', 0)
    refused('0 draws', *given, '--images', 1, '--draws', 0)
    (tmp_path / 'made').mkdir()
    (tmp_path / 'made' / 'rest.json').write_text('')
    with pytest.raises(SystemExit, match='2'):
        draw(tmp_path / 'made', *given, '--images', 1)
    assert 'rest.json' in capsys.readouterr().err
    draw(tmp_path / 'made', *given, '--images', 1, '--overwrite')

"""Files of features: what run makes of them, and how encode writes them."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from dsnet_mm.datasets import features as features_module
from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.feature_file import read_feature_file
from dsnet_mm.few_shot import METHODS, FewShotConfig, load_classifier, run
from dsnet_mm.few_shot.sources import FeatureSource
from tests.conftest import run_python
from tests.conftest import tool as load_tool
from tests.damage import damaged_bytes, quick, read_or_refuse, values

NAMES = ['cat', 'dog', 'emu']
# CLIP-Adapter with a short training, and nothing to select.
CHEAP = {key: values[0] for key, values in METHODS['clip_adapter'].grid.items()} | {
    'lr': 0.01,
    'iterations': 5,
}
METADATA = {
    'class_names': json.dumps(NAMES),
    'logit_scale': '100',
    'model': 'ViT-B-32 (OpenAI)',
}


def made_tensors(shots=(1, 2, 4), val=True):
    """Tensors as in a file. Rows of half precision scatter about the text features."""
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    counts = (
        {f'train_{k}': k for k in shots} | {'test': 20} | ({'val': 6} if val else {})
    )
    tensors = {'text_features': text}
    for part, count in counts.items():
        labels = torch.arange(3).repeat_interleave(count)
        noise = 0.4 * torch.randn(len(labels), 16, generator=generator)
        tensors[f'{part}_features'] = F.normalize(text[labels] + noise, dim=-1).half()
        tensors[f'{part}_labels'] = labels
    return tensors


@pytest.fixture
def file(tmp_path):
    save_file(made_tensors(), tmp_path / 'birds.safetensors', METADATA)
    return tmp_path / 'birds.safetensors'


@pytest.fixture
def tool(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['few_shot.py', *map(str, arguments)])
        load_tool('few_shot.py').main()

    return call


def test_run_from_a_file(file, tmp_path):
    """In a process that has none of the optional libraries."""
    work_dir = tmp_path / 'run'
    arguments = ['run', '--features', str(file), '--work-dir', str(work_dir)]
    arguments += ['--methods', 'tip_adapter', 'coop', '--shots', '1', '4', '8']
    done = run_python(
        'import runpy, sys\n'
        'for name in ("mmengine", "mmcv", "mmdet", "cv2", "open_clip", "pyarrow"):\n'
        '    sys.modules[name] = None\n'
        f'sys.argv = ["few_shot.py", *{arguments}]\n'
        'runpy.run_path("tools/few_shot.py", run_name="__main__")\n'
    )
    assert done.returncode == 0, done.stderr
    records = {
        path.stem: json.loads(path.read_text())
        for path in (work_dir / 'runs').iterdir()
    }
    assert set(records) == {'zero_shot'} | {
        f'tip_adapter_{k}shot_seed{seed}' for k in (1, 4) for seed in (1, 2, 3)
    }
    record = records['tip_adapter_4shot_seed2']
    assert (record['method'], record['shots'], record['seed']) == ('tip_adapter', 4, 2)
    assert record['selection'] == 'val'
    tensors = load_file(file)
    logits = tensors['test_features'].float() @ tensors['text_features'].t()
    right = (logits.argmax(1) == tensors['test_labels']).float().mean().item()
    assert records['zero_shot']['test']['accuracy'] == pytest.approx(100 * right)

    text = (work_dir / 'results.md').read_text()
    assert text.startswith('# birds, ViT-B-32 (OpenAI)\n')
    for fact in ('encoder: coop', 'no 8 shots'):  # what is left out
        assert fact in text and fact in (work_dir / 'run.log').read_text()
    (command,) = re.findall(r'tools/few_shot.py predict \\\s+(\S+)', done.stdout)
    with pytest.raises(ValueError, match='features from elsewhere'):
        load_classifier(command)


def test_draws_from_a_file(file):
    source = FeatureSource(FewShotConfig(features=str(file)))
    assert source.shots == (1, 2, 4)
    tensors = load_file(file)
    as_it_is = source.draw(2, 1, False).train
    assert torch.equal(as_it_is.features[0], tensors['train_2_features'].float())
    pool = {row.numpy().tobytes() for row in tensors['train_4_features'].float()}
    draws = [source.draw(2, seed, False) for seed in (2, 3)]
    for draw in draws:
        rows = [row.numpy().tobytes() for row in draw.train.features[0]]
        assert set(rows) <= pool and len(set(rows)) == 6
        assert draw.train.labels.bincount().tolist() == [2, 2, 2]
        assert draw.val.labels.bincount().tolist() == [2, 2, 2]
        assert draw.overlap == 0.5
    assert not torch.equal(draws[0].train.features, draws[1].train.features)
    assert source.draw(4, 2, False).overlap == 1


def test_default_shots_of_a_file_with_few_images(tmp_path):
    tensors = made_tensors(shots=(5,), val=False)
    for what in ('features', 'labels'):
        tensors[f'train_{what}'] = tensors.pop(f'train_5_{what}')
    save_file(tensors, tmp_path / 'birds.safetensors', METADATA)
    config = FewShotConfig(features=str(tmp_path / 'birds.safetensors'))
    source = FeatureSource(config)
    assert source.shots == (1, 2, 4) and '8, 16 shots' in source.notes[0]


def test_plain_features_are_those_of_cross_validation(file):
    methods = ('linear_probe',)
    config = FewShotConfig(features=str(file), methods=methods, selection='cv')
    (note,) = FeatureSource(config).notes
    assert 'only view' in note
    tensors = load_file(file)
    plain = tensors['train_4_features'].float()
    save_file({**tensors, 'train_4_plain': plain[:3]}, file, METADATA)
    with pytest.raises(ValueError, match=r'train_4_plain .*\(12, 16\).*\(3, 16\)'):
        read_feature_file(file)
    save_file({**tensors, 'train_4_plain': -plain}, file, METADATA)
    source = FeatureSource(config)
    assert not source.notes
    assert torch.equal(source.draw(4, 1, True).plain.features[0], -plain)
    drawn = source.draw(2, 2, True)
    assert torch.equal(drawn.plain.features, -drawn.train.features)
    assert source.draw(4, 1, False).plain is None


def test_file_without_validation_images(tmp_path):
    save_file(made_tensors(val=False), tmp_path / 'x.safetensors', METADATA)
    config = dict(features=str(tmp_path / 'x.safetensors'), methods=('tip_adapter',))
    with pytest.raises(ValueError, match='no validation images'):
        run(FewShotConfig(**config, selection='val'), tmp_path / 'a', quiet=True)
    records = run(FewShotConfig(**config, shots=(1,)), tmp_path / 'run', quiet=True)
    assert {record['selection'] for record in records} == {'fixed'}


# What the error names -> a change of tensors and metadata.
BAD = {
    'train_4_labels': lambda t, m: t.pop('train_4_labels'),
    'class_names': lambda t, m: m.pop('class_names'),
    'val_features': lambda t, m: t.update(val_features=torch.ones(18, 8)),
    'test_features': lambda t, m: t.update(test_features=torch.ones(60, 1, 16)),
    'train_1_features': lambda t, m: t['train_1_features'][0].fill_(torch.nan),
    'test_labels': lambda t, m: t['test_labels'].fill_(3),
    'train_2_labels': lambda t, m: t['train_2_labels'][2].fill_(0),
    'class_names ': lambda t, m: m.update(class_names='"abc"'),
    'logit_scale': lambda t, m: m.update(logit_scale='nan'),
    'identity': lambda t, m: m.update(identity='['),
    'prompts': lambda t, m: m.update(prompts='a {}'),
    'preprocessing': lambda t, m: m.update(preprocessing='none'),
    'logit_scale.* exp': lambda t, m: m.update(logit_scale='4.605'),
    'class_names.* two': lambda t, m: m.update(class_names='["cat"]'),
    'class names.*Dog': lambda t, m: m.update(class_names='["dog", "Dog", "cat"]'),
    'val_features.*int8': lambda t, m: t.update(val_features=torch.ones(18, 16).char()),
    'train_2_features.*row 3': lambda t, m: t['train_2_features'][3].zero_(),
    'test_features.*row 5': lambda t, m: t.update(
        test_features=t['test_features'].float().index_fill(0, torch.tensor(5), 1e30)
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_error_names_what_is_wrong(tmp_path, what):
    tensors, metadata = made_tensors(), dict(METADATA)
    BAD[what](tensors, metadata)
    save_file(tensors, tmp_path / 'bad.safetensors', metadata)
    with pytest.raises(ValueError, match=rf'bad\.safetensors: .*{what}'):
        read_feature_file(tmp_path / 'bad.safetensors')


odd_tensors = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=4) | st.just([3, 16]),
    st.sampled_from(
        (
            *(torch.float32, torch.float64, torch.float8_e5m2, torch.bool),
            *(torch.int64, torch.uint16, torch.complex64),
        )
    ),
)


@quick
@given(st.data())
def test_damaged_feature_file(tmp_path, data):
    tensors, metadata = made_tensors(shots=(1, 2)), dict(METADATA)
    what = data.draw(st.sampled_from(('tensors', 'metadata', 'bytes')))
    if what == 'tensors':
        tensors[data.draw(st.sampled_from([*tensors]))] = data.draw(odd_tensors)
    elif what == 'metadata':
        name = data.draw(st.sampled_from((*metadata, 'identity', 'prompts')))
        metadata[name] = json.dumps(data.draw(values))
    content = save(tensors, metadata)
    if what == 'bytes':
        end = 9 + int.from_bytes(content[:8], 'little')  # of the header
        content = data.draw(damaged_bytes(content[:end])) + content[end:]
    path = tmp_path / 'odd.safetensors'
    path.write_bytes(content)
    if found := read_or_refuse(lambda: read_feature_file(path), path.name):
        assert all(isinstance(name, str) for name in found.class_names)
        (number, width), norm = (
            found.text_features.shape,
            found.text_features.norm(dim=1),
        )
        assert number == len(found.class_names) and (norm - 1).abs().max() < 1e-3
        for part in (*found.train.values(), found.test, *filter(None, [found.val])):
            views, images, channels = part.features.shape
            assert views and images == len(part) and channels == width
            assert (
                part.features.isfinite().all() and part.features.dtype == torch.float32
            )
            assert part.labels.min() >= 0 and part.labels.max() < number


def test_no_file_and_no_features(tmp_path):
    (tmp_path / 'text').write_text('no features')
    for name, error in (('none', FileNotFoundError), ('text', ValueError)):
        with pytest.raises(error, match=name):
            read_feature_file(tmp_path / name)


def test_values_of_a_file(file):
    """Text features get unit norm, and floats and labels of any type are read."""
    tensors = load_file(file)
    unit = tensors['text_features'].clone()
    tensors['text_features'] *= 3
    tensors['test_labels'] = tensors['test_labels'].int()
    tensors['train_4_features'] = torch.stack(2 * [tensors['train_4_features']])
    save_file(tensors, file, METADATA | {'mine': 'x'})
    found = read_feature_file(file)
    torch.testing.assert_close(found.text_features, unit)
    assert (found.class_names, found.logit_scale) == (tuple(NAMES), 100.0)
    assert found.test.labels.dtype == torch.long
    assert found.train[4].features.shape == (2, 12, 16)
    assert found.about == {'model': METADATA['model'], 'mine': 'x'}
    found.write(file)
    again = read_feature_file(file)
    assert again.about == found.about and list(again.train) == list(found.train)
    assert torch.equal(again.train[4].features, found.train[4].features)


def test_test_rows_that_are_training_rows(file, tmp_path):
    tensors = load_file(file)
    tensors['test_features'][7] = tensors['train_4_features'][2]
    save_file(tensors, file, METADATA)
    with pytest.raises(ValueError, match='row 7'):
        run(FewShotConfig(features=str(file)), tmp_path / 'run', quiet=True)


def test_encoded_file_gives_the_results_of_the_images(
    tool, tiny_clip, image_folder, encoder, tmp_path, monkeypatch, capsys
):
    """Three processes share the encoding; the last one writes the file."""
    monkeypatch.setattr(features_module, 'SHARD', 8)
    out, cache = tmp_path / 'features.safetensors', tmp_path / 'cache'
    options = [
        *('--dataset', image_folder, '--model', tiny_clip['model']),
        *('--pretrained', tiny_clip['pretrained']),
        *('--cfg-options', 'views=2', f'cache_dir={cache}'),
    ]
    for rank in range(3):
        assert not out.exists()
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', '3')
        tool('encode', *options, '--out', out)
    before = out.stat().st_mtime_ns
    tool('encode', *options, '--out', out)  # a process that is late
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match='other content'):
        tool('encode', *options, 'prompts=a {}', '--out', out)

    methods = dict(
        methods=('tip_adapter', 'clip_adapter'), overrides={'clip_adapter': CHEAP}
    )
    images = FewShotConfig(
        dataset=str(image_folder),
        **tiny_clip,
        views=2,
        crop_scale=(0.08, 1.0),  # that of the file
        cache_dir=str(cache),
        **methods,
    )
    features = FewShotConfig(features=str(out), **methods)
    for selection, shots in ((None, (1, 4)), ('cv', (4,))):
        protocol = dict(shots=shots, seeds=(2,), selection=selection)
        found, expected = (
            run(replace(config, **protocol), tmp_path / f'{name}_{selection}', True)
            for name, config in (('features', features), ('images', images))
        )
        for a, b in zip(found, expected, strict=True):
            assert a.keys() == b.keys()
            for key in ('name', 'selection', 'options', 'parameters', 'overlap'):
                assert a[key] == b[key]
            for record in (a, b):
                record['test']['val'] = record['val_accuracy'] or 0
            assert a['test'].pop('correct') == b['test'].pop('correct')
            assert a['test'] == pytest.approx(b['test'], rel=1e-4)
    file = 'classifiers/clip_adapter_4shot_seed2.safetensors'
    image = [next(image_folder.glob('red/*.png'))]
    probabilities, same = (
        load_classifier(tmp_path / f'{name}_None' / file, encoder)(image)
        for name in ('features', 'images')
    )
    torch.testing.assert_close(probabilities, same)


def test_encoded_shots(tool, tiny_clip, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / 'images')
    out = tmp_path / 'features.safetensors'

    def encode(*shots):
        tool(
            *('encode', '--dataset', images, '--model', tiny_clip['model']),
            *('--pretrained', tiny_clip['pretrained'], '--shots', *shots),
            *('--out', out, '--cfg-options', 'views=0', 'on_bad_image=skip'),
            f'cache_dir={tmp_path / "cache"}',
        )

    encode(2, 8)
    file = read_feature_file(out)
    assert {k: len(part) for k, part in file.train.items()} == {2: 6, 8: 24}
    assert file.class_names == ('blue', 'green sea', 'red')
    assert len(file.val) == 12 and len(file.test) == 24
    assert set(file.about) >= {'model', 'pretrained', 'identity', 'preprocessing'}
    out.unlink()
    (bad, *_), *_ = load_task(images).split['train']
    Path(bad).write_bytes(b'no image')
    with pytest.raises(SystemExit, match='draw of 12 shots'):
        encode(12)
    assert not out.exists()

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
from safetensors.torch import load_file, save_file

from dsnet_mm.datasets import features as features_module
from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.feature_file import read_feature_file
from dsnet_mm.few_shot import METHODS, FewShotConfig, load_classifier, run
from dsnet_mm.few_shot.report import write_report
from dsnet_mm.few_shot.sources import FeatureSource
from tests.conftest import run_python
from tests.conftest import tool as load_tool

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


def test_run_from_a_file(tool, file, tmp_path, capsys):
    work_dir = tmp_path / 'run'
    methods = ('--methods', 'tip_adapter', 'coop', 'clip_adapter')
    nested = [f'overrides.clip_adapter.{k}={v}' for k, v in CHEAP.items()]
    options = ('--cfg-options', *nested)
    shots = ('--shots', 1, 4, 8)
    tool('run', '--features', file, '--work-dir', work_dir, *methods, *shots, *options)
    names = {path.stem for path in (work_dir / 'runs').iterdir()}
    assert names == {'zero_shot'} | {
        f'{method}_{k}shot_seed{seed}'
        for method in ('tip_adapter', 'clip_adapter')
        for k in (1, 4)
        for seed in (1, 2, 3)
    }
    record = json.loads(
        (work_dir / 'runs' / 'clip_adapter_4shot_seed2.json').read_text()
    )
    assert (record['method'], record['shots'], record['seed']) == ('clip_adapter', 4, 2)
    assert record['selection'] == 'fixed' and record['options']['lr'] == 0.01
    record = json.loads(
        (work_dir / 'runs' / 'tip_adapter_4shot_seed2.json').read_text()
    )
    assert record['selection'] == 'val'
    tensors = load_file(file)
    logits = tensors['test_features'].float() @ tensors['text_features'].t()
    right = (logits.argmax(1) == tensors['test_labels']).float().mean().item()
    zero_shot = json.loads((work_dir / 'runs' / 'zero_shot.json').read_text())
    assert zero_shot['test']['accuracy'] == pytest.approx(100 * right)

    text = (work_dir / 'results.md').read_text()
    assert text.startswith('# birds, ViT-B-32 (OpenAI)\n')
    log = (work_dir / 'run.log').read_text()
    for note in (
        'Left out, because they need the encoder: coop.',
        'at most 4 training images of each class, so there are no 8 shots. Only 1, 4',
    ):
        assert note in text and note in log
    assert 'At 4 shots the file has no other images to draw' in text
    printed = capsys.readouterr().out
    (command,) = re.findall(r'tools/few_shot.py predict (\S+) IMAGES', printed)
    assert '--model MODEL --pretrained WEIGHTS of ViT-B-32 (OpenAI)' in printed
    with pytest.raises(ValueError, match='fitted to features from elsewhere'):
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
        assert draw.redrawn
    assert not torch.equal(draws[0].train.features, draws[1].train.features)
    assert not source.draw(4, 2, False).redrawn


def test_default_shots_of_a_file_with_few_images(tmp_path):
    tensors = made_tensors(shots=(5,), val=False)
    for what in ('features', 'labels'):
        tensors[f'train_{what}'] = tensors.pop(f'train_5_{what}')
    save_file(tensors, tmp_path / 'birds.safetensors', METADATA)
    config = FewShotConfig(
        features=str(tmp_path / 'birds.safetensors'), methods=('gda',), seeds=(1,)
    )
    records = run(config, tmp_path / 'run', quiet=True)
    assert [record['shots'] for record in records] == [0, 1, 2, 4]
    assert 'there are no 8, 16 shots' in write_report(tmp_path / 'run', records)


def test_cross_validation_in_a_file_without_plain_features(file, tmp_path):
    config = FewShotConfig(
        features=str(file), methods=('gda',), shots=(4,), seeds=(1,), selection='cv'
    )
    text = write_report(tmp_path / 'run', run(config, tmp_path / 'run', quiet=True))
    assert '`cv` validates on the only view of the training images' in text
    tensors = load_file(file)
    plain = tensors['train_4_features'].float()
    save_file({**tensors, 'train_4_plain': plain[:3]}, file, METADATA)
    with pytest.raises(ValueError, match=r'train_4_plain must be \(12, 16\)'):
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
    with pytest.raises(ValueError, match='no validation images; use selection cv or'):
        run(FewShotConfig(**config, selection='val'), tmp_path / 'a', quiet=True)
    records = run(FewShotConfig(**config, shots=(1,)), tmp_path / 'run', quiet=True)
    assert {record['selection'] for record in records} == {'fixed'}
    text = write_report(tmp_path / 'run', records)
    assert 'hyper-parameters by `fixed`' in text and 'There are no validation' in text


def change(tensors, metadata, what):
    if isinstance(what, tuple):
        metadata.update([what])
    if what == 'no text':
        del tensors['text_features']
    elif what == 'width':
        tensors['val_features'] = tensors['val_features'][:, :8].contiguous()
    elif what == 'label':
        tensors['test_labels'][0] = 3
    elif what == 'nan':
        tensors['train_1_features'][0, 0] = float('nan')
    elif what == 'shots':
        tensors['train_2_labels'] = torch.tensor([0, 0, 0, 1, 2, 2])
    elif what == 'names':
        del metadata['class_names']
    elif what == 'test in train':
        tensors['test_features'][7] = tensors['train_4_features'][2]


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('no text', 'there is no tensor text_features'),
        ('width', r'val_features must be \(18, 16\)'),
        ('label', 'test_labels must be from 0 to 2, got 0 to 3'),
        ('nan', 'train_1_features has values that are not finite'),
        ('shots', "train_2_labels has 3 rows of the class 'cat', and must have 2"),
        ('names', 'the metadata have no class_names'),
        (('class_names', '"abc"'), 'class_names must be a JSON list'),
        (('logit_scale', 'nan'), 'logit_scale must be a number above 0'),
        (('identity', '['), 'identity must be a JSON object'),
        (('prompts', 'a {}'), 'prompts must be a JSON list'),
        (('preprocessing', 'none'), 'preprocessing must be one of'),
        ('test in train', '1 rows of test_features are also rows .* such as row 7'),
    ],
)
def test_bad_files(tmp_path, what, message):
    tensors, metadata = made_tensors(), dict(METADATA)
    change(tensors, metadata, what)
    save_file(tensors, tmp_path / 'bad.safetensors', metadata)
    config = FewShotConfig(features=str(tmp_path / 'bad.safetensors'))
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / 'run', quiet=True)


def test_no_file_and_no_features(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no feature file'):
        read_feature_file(tmp_path / 'none.safetensors')
    (tmp_path / 'text').write_text('no features')
    with pytest.raises(ValueError, match='is not a safetensors file'):
        read_feature_file(tmp_path / 'text')


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
        done = 'is written' if rank == 2 else 'images are missing'
        assert done in capsys.readouterr().out
    before = out.stat().st_mtime_ns
    tool('encode', *options, '--out', out)  # a process that is late
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match='exists, with other content'):
        tool('encode', *options, 'prompts=a {}', '--out', out)

    common = dict(
        methods=('tip_adapter', 'clip_adapter'),
        shots=(1, 4),
        seeds=(1, 2),
        overrides={'clip_adapter': CHEAP},
    )
    images = FewShotConfig(
        dataset=str(image_folder),
        **tiny_clip,
        views=2,
        cache_dir=str(cache),
        **common,
    )
    expected = run(images, tmp_path / 'images', quiet=True)
    features = FewShotConfig(features=str(out), **common)
    found = run(features, tmp_path / 'features', quiet=True)
    cv = dict(shots=(4,), seeds=(2,), selection='cv')
    expected += run(replace(images, **cv), tmp_path / 'images_cv', quiet=True)
    found += run(replace(features, **cv), tmp_path / 'features_cv', quiet=True)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ('name', 'selection', 'options', 'parameters', 'redrawn'):
            assert a[key] == b[key]
        assert a['selection'] != 'cv' or a['val_accuracy'] is not None
        for record in (a, b):
            record['test']['val'] = record['val_accuracy'] or 0
        assert a['test'] == pytest.approx(b['test'], rel=1e-4)
    name = 'classifiers/clip_adapter_4shot_seed1.safetensors'
    image = [next(image_folder.glob('red/*.png'))]
    probabilities = load_classifier(tmp_path / 'features' / name, encoder)(image)
    same = load_classifier(tmp_path / 'images' / name, encoder)(image)
    torch.testing.assert_close(probabilities, same)


def test_unreadable_images_are_not_in_a_draw(tool, tiny_clip, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / 'images')
    (bad, *_), *_ = load_task(images).split['train']
    Path(bad).write_bytes(b'no image')
    options = [
        *('--dataset', images, '--model', tiny_clip['model'], '--shots', 12),
        *('--pretrained', tiny_clip['pretrained'], '--out', tmp_path / 'out'),
        *('--cfg-options', 'views=0', 'on_bad_image=skip', f'cache_dir={tmp_path}/c'),
    ]
    with pytest.raises(SystemExit, match='1 images of the draw of 12 shots cannot'):
        tool('encode', *options)
    assert not (tmp_path / 'out').exists()


def test_encoded_shots(tool, tiny_clip, image_folder, tmp_path):
    out = tmp_path / 'features.safetensors'
    tool(
        *('encode', '--dataset', image_folder, '--model', tiny_clip['model']),
        *('--pretrained', tiny_clip['pretrained'], '--shots', 2, 8, '--out', out),
        *('--cfg-options', 'views=0', f'cache_dir={tmp_path / "cache"}'),
    )
    file = read_feature_file(out)
    assert {k: len(part) for k, part in file.train.items()} == {2: 6, 8: 24}
    assert file.class_names == ('blue', 'green sea', 'red')
    assert len(file.val) == 12 and len(file.test) == 24
    assert set(file.about) >= {'model', 'pretrained', 'identity', 'preprocessing'}


def test_run_without_openmmlab(file, tmp_path):
    """Features to classifier in a process that has neither mmengine nor mmcv."""
    work_dir = tmp_path / 'run'
    done = run_python(
        'import runpy, sys\n'
        'for name in ("mmengine", "mmcv", "mmdet", "mmpretrain", "cv2"):\n'
        '    sys.modules[name] = None\n'
        f'sys.argv = ["few_shot.py", "run", "--features", {str(file)!r},\n'
        f'    "--work-dir", {str(work_dir)!r}, "--methods", "gda", "--shots", "1"]\n'
        'runpy.run_path("tools/few_shot.py", run_name="__main__")\n'
        'sys.argv += ["--cfg-options", "views=0"]\n'
        'runpy.run_path("tools/few_shot.py", run_name="__main__")\n'
    )
    assert (work_dir / 'classifiers' / 'gda_1shot_seed1.safetensors').is_file()
    assert done.returncode == 1, done.stderr
    assert 'configuration file, or --cfg-options, needs mmengine' in done.stderr

"""FewShotDataset, with the arguments of all data sets of MMEngine."""

import pytest
import torch
from PIL import Image

from dsnet_mm.datasets import load_task
from dsnet_mm.datasets.few_shot_dataset import FewShotDataset


@pytest.fixture(params=['images', 'features'])
def build(request, tiny_clip, image_folder, tmp_path):
    features = dict(folder=str(tmp_path / 'cache'), encoder=tiny_clip)

    def build(**options):
        return FewShotDataset(
            **dict(dataset=str(image_folder), part='test', shots=4) | options,
            features=features if request.param == 'features' else None,
        )

    return build


def without_index(sample):
    return {k: v for k, v in sample.items() if k != 'sample_idx'}


def assert_equal_samples(samples, expected):
    assert len(samples) == len(expected)
    for a, b in zip(samples, expected, strict=True):
        a, b = without_index(a), without_index(b)
        assert a.keys() == b.keys()
        for key in a:
            assert (
                torch.equal(a[key], b[key]) if key == 'features' else a[key] == b[key]
            )


def test_indices(build):
    samples = list(build())
    assert len(samples) == 24
    assert_equal_samples(list(build(indices=5)), samples[:5])
    assert_equal_samples(list(build(indices=-5)), samples[-5:])
    chosen = [samples[i] for i in (20, 3, 11)]
    assert_equal_samples(list(build(indices=[20, 3, 11])), chosen)
    assert_equal_samples(list(build().get_subset([20, 3, 11])), chosen)


def test_lazy_init_reads_at_the_first_access(build, monkeypatch):
    from dsnet_mm.datasets import few_shot_dataset

    read = []
    monkeypatch.setattr(
        few_shot_dataset, 'load_task', lambda *a: read.append(a) or load_task(*a)
    )
    lazy = build(lazy_init=True, indices=3)
    assert not read and 'classes' not in lazy.metainfo
    assert_equal_samples([lazy[i] for i in range(len(lazy))], list(build(indices=3)))
    assert lazy.metainfo['classes'] == ('blue', 'green sea', 'red')


def test_test_mode_raises_if_the_pipeline_returns_none(build):
    tried = []

    def refuse(sample):
        tried.append(sample)

    with pytest.raises(Exception, match='should not get `None`'):
        build(pipeline=[refuse], test_mode=True)[0]
    assert len(tried) == 1
    with pytest.raises(Exception, match='Cannot find valid image after 3'):
        build(pipeline=[refuse], max_refetch=3)[0]
    assert len(tried) == 1 + 4


def test_serialization_does_not_change_samples(build):
    assert build().data_list == []
    plain = build(serialize_data=False)
    assert len(plain.data_list) == 24
    assert_equal_samples(list(plain), list(build()))


def test_metainfo_and_filter_cfg(build):
    dataset = build(metainfo=dict(classes=('a', 'b', 'c'), paper='x'), filter_cfg={})
    assert dataset.metainfo == dict(classes=('a', 'b', 'c'), paper='x')
    assert build().metainfo == dict(classes=('blue', 'green sea', 'red'))


def test_training_sample_has_a_random_view(tiny_clip, encoder, tmp_path):
    from dsnet_mm.datasets import sample_few_shot
    from dsnet_mm.few_shot import FeatureCache

    folder = tmp_path / 'mine'
    paint(folder)
    cache = dict(folder=str(tmp_path / 'cache'), encoder=tiny_clip)
    dataset = FewShotDataset(str(folder), 'train', 2, features=cache, views=3)
    drawn = sample_few_shot(load_task(folder).split, 2, 1)['train']
    views = FeatureCache(tmp_path / 'cache', encoder).images(drawn, views=3).features
    torch.manual_seed(0)
    seen = [set() for _ in range(len(dataset))]
    for _ in range(30):
        for i, sample in enumerate(dataset):
            is_view = (views[:, i] == sample['features']).all(1)
            seen[i].add(is_view.nonzero().item())
    assert seen == [{0, 1, 2}] * 4


def paint(folder):
    from PIL import Image

    for cls in ('red', 'blue'):
        (folder / cls).mkdir(parents=True)
        for i in range(6):
            image = Image.linear_gradient('L').resize((40 + i, 40)).convert('RGB')
            image.paste(cls, (0, 0, 10, 10))
            image.save(folder / cls / f'{i}.png')


def test_unknown_part(image_folder):
    with pytest.raises(ValueError, match=r"part must be 'train', .* got 'all'"):
        FewShotDataset(str(image_folder), 'all')


@pytest.mark.parametrize('cached', [False, True])
def test_part_without_images(tiny_clip, tmp_path, cached):
    for cls in ('day', 'night'):
        (tmp_path / 'sky' / cls).mkdir(parents=True)
        for i in range(3):  # too few for validation images
            Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path / f'sky/{cls}/{i}.png')
    features = dict(folder=str(tmp_path / 'cache'), encoder=tiny_clip)
    with pytest.raises(ValueError, match='sky has no val images; leave out'):
        FewShotDataset(
            str(tmp_path / 'sky'), 'val', shots=1, features=features if cached else None
        )

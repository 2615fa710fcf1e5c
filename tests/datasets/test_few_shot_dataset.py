"""FewShotDataset, with the arguments of all data sets of MMEngine."""

import pytest
import torch

from dsnet_mm.datasets import load_task, sample_few_shot
from dsnet_mm.datasets.features import FeatureCache
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


def plain(samples):
    """Samples that can be compared."""
    return [
        {k: x.tolist() if k == 'features' else x for k, x in sample.items()}
        for sample in ({**sample, 'sample_idx': 0} for sample in samples)
    ]


def test_options_of_the_base_class(build):
    dataset = build()
    samples = plain(dataset)
    assert len(samples) == 24 and dataset.data_list == []
    assert dataset.metainfo == dict(classes=('blue', 'green sea', 'red'))
    assert plain(build(indices=5)) == samples[:5]
    assert plain(build(indices=-5)) == samples[-5:]
    chosen = [samples[i] for i in (20, 3, 11)]
    assert plain(build(indices=[20, 3, 11])) == chosen
    assert plain(dataset.get_subset([20, 3, 11])) == chosen
    unshared = build(serialize_data=False)
    assert len(unshared.data_list) == 24 and plain(unshared) == samples
    metainfo = dict(classes=('a', 'b', 'c'), paper='x')
    assert build(metainfo=metainfo, filter_cfg={}).metainfo == metainfo

    lazy = build(lazy_init=True, indices=3)
    assert 'classes' not in lazy.metainfo, 'it is read at the first access'
    assert plain([lazy[i] for i in range(len(lazy))]) == samples[:3]
    assert lazy.metainfo == dataset.metainfo
    for name in ('ann_file', 'no_option'):
        with pytest.raises(TypeError, match=name):
            build(**{name: 'x'})


def test_pipeline_that_returns_none(build):
    tried = []
    with pytest.raises(Exception, match='None'):
        build(pipeline=[tried.append], test_mode=True)[0]
    assert len(tried) == 1
    with pytest.raises(Exception, match='3'):
        build(pipeline=[tried.append], max_refetch=3)[0]
    assert len(tried) == 1 + 4


def test_training_sample_has_a_random_view(tiny_clip, encoder, image_folder, tmp_path):
    cache = dict(folder=str(tmp_path), encoder=tiny_clip)
    dataset = FewShotDataset(str(image_folder), 'train', 2, features=cache, views=3)
    drawn = sample_few_shot(load_task(image_folder).split, 2, 1)['train']
    views = FeatureCache(tmp_path, encoder).images(drawn, views=3).features
    torch.manual_seed(0)
    seen = [set() for _ in range(len(dataset))]
    for _ in range(30):
        for i, sample in enumerate(dataset):
            is_view = (views[:, i] == sample['features']).all(1)
            seen[i].add(is_view.nonzero().item())
    assert seen == [{0, 1, 2}] * 6


@pytest.mark.parametrize('cached', [False, True])
def test_part_without_images(tiny_clip, image_folder, tmp_path, cached):
    with pytest.raises(ValueError, match='all'):
        FewShotDataset(str(image_folder), 'all')
    for cls in ('day', 'night'):  # three images are too few for validation
        (tmp_path / 'sky' / cls).mkdir(parents=True)
        for file in sorted(image_folder.glob('red/?.png'))[:3]:
            (tmp_path / 'sky' / cls / file.name).write_bytes(file.read_bytes())
    features = dict(folder=str(tmp_path / 'cache'), encoder=tiny_clip)
    with pytest.raises(ValueError, match='sky has no val'):
        FewShotDataset(
            str(tmp_path / 'sky'), 'val', shots=1, features=features if cached else None
        )

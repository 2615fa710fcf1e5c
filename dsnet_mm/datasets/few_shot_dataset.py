"""Few-shot data sets for MMEngine's Runner, of images or of cached features."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from mmengine.dataset import BaseDataset
from mmengine.device import get_device

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets import load_task
from dsnet_mm.registry import DATASETS

from .features import FeatureCache
from .splits import sample_few_shot

_encoders: 'WeakKeyDictionary[FewShotDataset, OpenCLIPEncoder]' = WeakKeyDictionary()
"""The encoder of each data set, so that other data sets can share it. It is not an
attribute, because copies of a data set and worker processes do not need it."""


@DATASETS.register_module()
class FewShotDataset(BaseDataset):
    """A few-shot draw of a data set, or its test images.

    A sample has ``gt_label`` and ``img_path``. With ``features`` it has ``features``
    (D,) instead of ``img_path``. They are those of a random view, drawn at each access.

    Args:
        dataset: Name, folder or file, see :func:`dsnet_mm.datasets.load_task`.
        part: ``'train'`` or ``'val'``, the parts of the draw, or ``'test'``.
        shots: Training images of each class.
        seed: Seed of the draw.
        data_root: Folder of the public data sets.
        features: Arguments of :class:`FeatureCache`. Its ``encoder`` holds the
            arguments of ``OpenCLIPEncoder``. None gives images.
        views: Number of augmented views of a training image, with ``features``.
        **options: ``pipeline``, ``metainfo``, ``indices``, ``lazy_init`` and others of
            ``BaseDataset``, except ``ann_file`` and ``data_prefix``. The classes are
            added to ``metainfo`` if they are missing.

    Raises:
        ValueError: If ``part`` is unknown, or the data set has no images of it.
    """

    def __init__(
        self,
        dataset: str,
        part: str,
        shots: int = 16,
        seed: int = 1,
        data_root: str = 'data',
        features: dict | None = None,
        views: int = 10,
        **options: Any,
    ) -> None:
        if part not in ('train', 'val', 'test'):
            raise ValueError(f"part must be 'train', 'val' or 'test', got {part!r}.")
        self.dataset, self.part, self.shots, self.seed = dataset, part, shots, seed
        self.features, self.views = features, views
        # With ann_file or data_prefix in the options this is a TypeError.
        super().__init__(ann_file='', data_prefix={}, data_root=data_root, **options)

    def load_data_list(self) -> list[dict]:
        """Reads the samples of the part. With ``features``, also encodes them."""
        task = load_task(self.dataset, self.data_root)
        self._metainfo.setdefault('classes', task.class_names)
        items = (
            task.split['test']
            if self.part == 'test'
            else sample_few_shot(task.split, self.shots, self.seed)[self.part]
        )
        if not items:
            raise ValueError(
                f'{task.name} has no {self.part} images; leave out this data loader.'
            )
        if self.features is None:
            return [dict(img_path=path, gt_label=label) for path, label, _ in items]
        options = dict(self.features)
        encoder = OpenCLIPEncoder.shared(**options.pop('encoder'), device=get_device())
        _encoders[self] = encoder
        cache = FeatureCache(encoder=encoder, **options)
        found = cache.images(items, self.views if self.part == 'train' else 0)
        self._features = found.features
        labels = found.labels.tolist()
        return [dict(gt_label=label, row=row) for row, label in enumerate(labels)]

    def prepare_data(self, idx: int) -> dict | None:
        """Returns a sample after the pipeline."""
        sample = self.get_data_info(idx)
        if self.features is not None:
            view = torch.randint(len(self._features), ())
            sample['features'] = self._features[view, sample.pop('row')]
        return self.pipeline(sample)

"""Few-shot draws for MMEngine's Runner, as pictures or as cached features."""

import torch
from mmengine.dataset import BaseDataset
from mmengine.device import get_device

from dsnet_mm.registry import DATASETS

from .few_shot import load_task, sample_few_shot


@DATASETS.register_module()
class FewShotDataset(BaseDataset):
    """A few-shot draw, or the test pictures, of a data set.

    Samples have ``img_path`` and ``gt_label``. With ``features`` they have
    ``features`` (D,) too, of another augmented view in each epoch.

    Args:
        dataset: Name, folder or file, see :func:`load_task`.
        part: ``'train'`` or ``'val'`` of the draw, or ``'test'``.
        shots: Training pictures of each class.
        seed: Seed of the draw.
        data_root: Folder of the public data sets.
        features: Arguments of ``FeatureCache``; its ``encoder`` holds the arguments
            of ``OpenCLIPEncoder``. None gives pictures only.
        views: Augmented views of a training picture, with ``features``.
        pipeline: Transforms of a sample.

    Raises:
        ValueError: If ``part`` is none of the three.
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
        pipeline: list = [],
    ) -> None:
        if part not in ('train', 'val', 'test'):
            raise ValueError(f"part must be 'train', 'val' or 'test', got {part!r}.")
        self.part, self.shots, self.seed = part, shots, seed
        self.features, self.views = features, views
        self.task = load_task(dataset, data_root)
        super().__init__(
            metainfo=dict(classes=self.task.class_names),
            pipeline=pipeline,
            serialize_data=False,
        )

    def load_data_list(self) -> list[dict]:
        """The samples of the part."""
        items = (
            self.task.split['test']
            if self.part == 'test'
            else sample_few_shot(self.task.split, self.shots, self.seed)[self.part]
        )
        if self.features is None:
            return [dict(img_path=path, gt_label=label) for path, label, _ in items]

        from dsnet_mm.few_shot.features import FeatureCache
        from dsnet_mm.models import OpenCLIPEncoder

        options = dict(self.features)
        encoder = OpenCLIPEncoder(**options.pop('encoder')).to(get_device())
        cache = FeatureCache(encoder=encoder, **options)
        found = cache.images(items, self.views if self.part == 'train' else 0)
        self._cached = found.features
        return [dict(gt_label=int(label)) for label in found.labels]

    def prepare_data(self, idx: int) -> dict:
        """One sample, after the pipeline."""
        sample = self.get_data_info(idx)
        if self.features is not None:
            view = torch.randint(len(self._cached), ())
            sample['features'] = self._cached[view, idx]
        return self.pipeline(sample)

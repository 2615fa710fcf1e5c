"""How many objects are found, counted as in cell segmentation."""

from collections.abc import Sequence

import numpy as np
from mmengine.evaluator import BaseMetric

from dsnet_mm.registry import METRICS

NESTED = 0.7
"""Fraction of a mask inside another one from which one of them is a duplicate."""


@METRICS.register_module()
class InstanceAccuracy(BaseMetric):
    """Accuracy of instance masks, TP / (TP + FP + FN).

    This is the measure of StarDist (arXiv 1806.03535) and Cellpose, where it is called
    average precision. Unlike COCO's AP it judges the objects that a user sees: those
    with a minimum score. Predictions and true objects are matched one to one, with the
    largest number of matches, then the largest sum of IoUs. All images are counted
    together.

    It adds to the metrics, as fractions: ``accuracy``, ``precision``, ``recall``, and
    ``duplicates``, the share of predictions of which 70 % lie in one with a higher
    score, or the other way round.

    Args:
        ann_file: Annotation file in COCO's format, of the images that are tested.
        score_thr: Minimum score of a prediction.
        iou_thr: Minimum IoU of a match.
        collect_device: Device on which the ranks of a distributed test collect results.
        prefix: Name before those of the metrics.
    """

    default_prefix = 'instances'

    def __init__(
        self,
        ann_file: str,
        score_thr: float = 0.5,
        iou_thr: float = 0.5,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        from mmdet.datasets.api_wrappers import COCO

        self.coco = COCO(ann_file)
        self.score_thr, self.iou_thr = score_thr, iou_thr

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Counts the objects of a batch, see :class:`mmengine.evaluator.BaseMetric`.

        Raises:
            ValueError: If predictions have no masks.
        """
        from mmdet.structures.mask import encode_mask_results

        for sample in data_samples:
            found = sample['pred_instances']
            if 'masks' not in found:
                raise ValueError(
                    'InstanceAccuracy compares masks, and this model predicts boxes '
                    'only; leave it out of the evaluators'
                )
            order = found['scores'].argsort(descending=True)
            order = order[found['scores'][order] >= self.score_thr].cpu()
            labels = found['labels'].cpu()[order]
            masks = found['masks'].cpu()[order]
            counts = np.zeros(4, int)
            classes = self.coco.get_cat_ids(self.dataset_meta['classes'])
            for label, category in enumerate(classes):
                truth = self.coco.get_ann_ids(sample['img_id'], category, iscrowd=False)
                counts += self.count(
                    encode_mask_results(masks[labels == label].numpy()),
                    [self.coco.annToRLE(self.coco.anns[i]) for i in truth],
                )
            self.results.append(counts)

    def count(self, predicted: list[dict], truth: list[dict]) -> np.ndarray:
        """Counts matches, predictions, true objects and duplicates of one class.

        Args:
            predicted: Masks in run-length code, the highest score first.
            truth: Masks of the true objects.
        """
        from pycocotools.mask import iou
        from scipy.optimize import linear_sum_assignment

        matches = duplicates = 0
        if predicted and truth:
            ious = iou(predicted, truth, [0] * len(truth))
            possible = ious >= self.iou_thr
            # Another match weighs more than any sum of IoUs.
            pairs = linear_sum_assignment(possible * (len(truth) + ious), maximize=True)
            matches = int(possible[pairs].sum())
        if len(predicted) > 1:
            inside = iou(predicted, predicted, [1] * len(predicted))
            nested = np.tril(np.maximum(inside, inside.T) > NESTED, -1)
            duplicates = int(nested.any(1).sum())
        return np.array([matches, len(predicted), len(truth), duplicates])

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Returns the metrics of all images."""
        matches, predicted, true, duplicates = map(int, np.sum(results, 0))
        return dict(
            accuracy=matches / max(predicted + true - matches, 1),
            precision=matches / max(predicted, 1),
            recall=matches / max(true, 1),
            duplicates=duplicates / max(predicted, 1),
        )

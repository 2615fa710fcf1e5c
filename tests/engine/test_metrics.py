"""Instance accuracy: what is counted, on drawn masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet', reason='the metric reads masks with mmdet')

from dsnet_mm.registry import METRICS

SIZE = (20, 40)


def mask(left: int, width: int = 4, rows: slice = slice(2, 8)) -> np.ndarray:
    """Draws a rectangle."""
    image = np.zeros(SIZE, bool)
    image[rows, left : left + width] = True
    return image


@pytest.fixture
def ann_file(tmp_path: Path) -> str:
    """Two images: three cells and a crowd of cells; a nucleus."""
    from pycocotools import mask as coco_mask

    def annotation(image_id: int, category: int, drawn: np.ndarray, crowd: int) -> dict:
        code = coco_mask.encode(np.asfortranarray(drawn, np.uint8))
        code['counts'] = code['counts'].decode()
        return dict(
            image_id=image_id,
            category_id=category,
            segmentation=code,
            iscrowd=crowd,
            area=1.0,
            bbox=[0, 0, 1, 1],
        )

    annotations = [
        annotation(1, 7, mask(0), 0),
        annotation(1, 7, mask(5), 0),
        annotation(1, 7, mask(10), 0),
        annotation(1, 7, mask(30), 1),
        annotation(2, 3, mask(0), 0),
    ]
    content = dict(
        images=[dict(id=i, height=SIZE[0], width=SIZE[1]) for i in (1, 2)],
        categories=[dict(id=7, name='cell'), dict(id=3, name='nucleus')],
        annotations=[dict(a, id=i) for i, a in enumerate(annotations, 1)],
    )
    path = tmp_path / 'instances.json'
    path.write_text(json.dumps(content))
    return str(path)


def sample(image_id: int, *objects: tuple[int, float, np.ndarray]) -> dict:
    """A prediction: labels, scores and masks of an image."""
    labels, scores, masks = zip(*objects, strict=True)
    return dict(
        img_id=image_id,
        pred_instances=dict(
            labels=torch.tensor(labels),
            scores=torch.tensor(scores),
            masks=torch.from_numpy(np.stack(masks)),
        ),
    )


def evaluate(ann_file: str, *samples: dict, **options) -> dict[str, float]:
    metric = METRICS.build(
        dict(type='dsnet_mm.InstanceAccuracy', ann_file=ann_file, **options)
    )
    metric.dataset_meta = dict(classes=('cell', 'nucleus'))
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_counts(ann_file: str) -> None:
    found = evaluate(
        ann_file,
        sample(
            1,
            (0, 0.9, mask(0)),
            (0, 0.8, mask(1, 3)),  # inside the first one
            (0, 0.7, mask(5, 3)),  # IoU 3 / 4
            (0, 0.6, mask(12)),  # IoU 1 / 3
            (1, 0.6, mask(10)),  # the wrong class
            (0, 0.4, mask(10)),  # below the minimum score
        ),
        sample(2, (1, 0.9, mask(0))),
    )
    # 3 matches of 6 predictions and 4 objects; the crowd does not count.
    assert found == {
        'instances/accuracy': 3 / 7,
        'instances/precision': 3 / 6,
        'instances/recall': 3 / 4,
        'instances/duplicates': 1 / 6,
    }


def test_most_matches_before_largest_iou(ann_file: str) -> None:
    """A prediction takes the worse of two objects if the better one has another."""
    wide = mask(0, 8)  # IoU 1 / 2 with the first cell, 1 / 3 with the second
    found = evaluate(
        ann_file,
        sample(1, (0, 0.9, wide), (0, 0.8, mask(0))),
        sample(2, (1, 0.1, mask(0))),
        iou_thr=0.3,
    )
    assert found['instances/precision'] == 1


def test_nothing_found(ann_file: str) -> None:
    found = evaluate(
        ann_file, sample(1, (0, 0.1, mask(0))), sample(2, (0, 0.1, mask(0)))
    )
    assert set(found.values()) == {0}


def test_boxes_alone(ann_file: str) -> None:
    prediction = sample(1, (0, 0.9, mask(0)))
    del prediction['pred_instances']['masks']
    with pytest.raises(ValueError, match='masks'):
        evaluate(ann_file, prediction)

"""Draw truth beside prediction for the first validation images of a detector."""

import argparse
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer

from dsnet_mm.checkpoint import load_checkpoint, restricted_loading
from dsnet_mm.engine.config import check_data, load_config
from dsnet_mm.engine.launch import add_config_arguments, add_trust_argument, user_errors
from dsnet_mm.files import write_atomic
from dsnet_mm.inference import DetectedObject, Mask
from dsnet_mm.inference.drawing import FONT, draw_objects, scale

CELL = 400  # longest side of an image on the sheet, in pixels
GAP = 8  # between truth and prediction; three times as much between pairs
TITLE = 40  # height of the title row


def objects_of(instances: InstanceData) -> list[DetectedObject]:
    """Returns instances one by one.

    Args:
        instances: ``bboxes`` (n, 4), ``labels`` (n,) and optionally ``scores`` (n,)
            and ``masks`` (n, H, W).
    """
    return [
        DetectedObject(
            int(instances.labels[i]),
            float(instances.scores[i]) if 'scores' in instances else 1.0,
            instances.bboxes[i],
            Mask(instances.masks[i], 0, 0) if 'masks' in instances else None,
        )
        for i in range(len(instances))
    ]


def make_sheet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Puts pairs of images in a grid under titles.

    Args:
        pairs: Truth and prediction of each image, RGB, no side longer than
            ``CELL``.

    Returns:
        RGB image of the sheet, with two pairs in a row if there are more
        than three.
    """
    per_row = 2 if len(pairs) > 3 else 1
    pair_width = 2 * CELL + 4 * GAP
    width = per_row * pair_width - 3 * GAP
    lefts = [i * pair_width + j * (CELL + GAP) for i in range(per_row) for j in (0, 1)]
    visualizer = Visualizer()
    visualizer.set_image(np.full((TITLE, width, 3), 255, np.uint8))
    for left, title in zip(lefts, ('truth', 'prediction') * per_row, strict=True):
        visualizer.draw_texts(
            title,
            np.array([left + CELL / 2, TITLE / 2]),
            font_sizes=1.4 * FONT,
            colors='k',
            vertical_alignments='center',
            horizontal_alignments='center',
        )
    rows = [visualizer.get_image()]
    for start in range(0, len(pairs), per_row):
        cells = [cell for pair in pairs[start : start + per_row] for cell in pair]
        height = max(cell.shape[0] for cell in cells)
        row = np.full((height + GAP, width, 3), 255, np.uint8)
        for left, cell in zip(lefts, cells, strict=False):
            left += (CELL - cell.shape[1]) // 2
            top = (height - cell.shape[0]) // 2
            row[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
        rows.append(row)
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', type=Path, help='image to write, .png or .jpg')
    parser.add_argument('--num', type=int, default=6, help='number of images')
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='minimum score of a prediction'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the image')
    add_trust_argument(parser)
    args = parser.parse_args(argv)

    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        if args.out.suffix not in ('.png', '.jpg'):
            raise ValueError(f'OUT ends with .png or .jpg, got {args.out}')
        if args.out.exists() and not args.overwrite:
            raise ValueError(f'{args.out} exists; replace it by --overwrite')
        if args.num < 1:
            raise ValueError(f'--num is at least 1, got {args.num}')
        cfg = load_config(args.config, args.cfg_options)
        if cfg.default_scope != 'mmdet':
            raise ValueError(f'{args.config} is no detector; boxes are drawn for those')
        check_data(cfg, ['val'])
        init_default_scope('mmdet')
        model = MODELS.build(cfg.model)
        load_checkpoint(model, args.checkpoint)
    model.to(get_device()).eval()
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    load_truth = Compose(
        [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=model.with_mask),
        ]
    )
    classes, palette = (dataset.metainfo.get(key) for key in ('classes', 'palette'))

    pairs = []
    for i in range(min(args.num, len(dataset))):
        data = load_truth(dataset.get_data_info(i))
        image = mmcv.bgr2rgb(data['img'])
        truth = InstanceData(
            bboxes=data['gt_bboxes'].numpy(), labels=data['gt_bboxes_labels']
        )
        if model.with_mask:
            truth.masks = data['gt_masks'].masks.astype(bool)
        truth = truth[~data['gt_ignore_flags']]
        with torch.inference_mode():
            (sample,) = model.test_step(pseudo_collate([dataset[i]]))
        prediction = sample.pred_instances.numpy()
        prediction = prediction[prediction.scores >= args.score_thr]
        factor = CELL / max(image.shape[:2])
        pairs.append(
            tuple(
                draw_objects(
                    scale(image, CELL), objects_of(x), classes, palette, factor, scores
                )
                for x, scores in ((truth, False), (prediction, True))
            )
        )

    _, encoded = cv2.imencode(args.out.suffix, mmcv.rgb2bgr(make_sheet(pairs)))
    write_atomic(args.out, encoded.tobytes())
    print(f'{len(pairs)} images are drawn in {args.out}.')


if __name__ == '__main__':
    main()

"""Draw truth beside prediction for the first validation pictures of a detector."""

import argparse
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from mmdet.registry import DATASETS, MODELS
from mmdet.structures.mask import BitmapMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.cli.arguments import (
    add_config_arguments,
    add_trust_argument,
    user_errors,
)
from dsnet_mm.cli.checkpoints import load_checkpoint
from dsnet_mm.cli.config import load_config
from dsnet_mm.cli.data import check_data
from dsnet_mm.files import write_atomic

CELL = 400  # longest side of a picture on the sheet, in pixels
GAP = 8  # between truth and prediction; three times as much between pairs
TITLE = 40  # height of the title row
FONT = 10  # points; a pixel is 0.72 of them


def scale_up(
    image: np.ndarray, instances: InstanceData
) -> tuple[np.ndarray, InstanceData]:
    """Scales a picture with its instances until its longest side is ``CELL``.

    Args:
        image: Picture of shape (H, W, 3).
        instances: ``bboxes`` (n, 4) in its pixels and, if any, ``masks``
            (n, H, W).

    Returns:
        The scaled picture and copies of the instances.
    """
    factor = CELL / max(image.shape[:2])
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    scaled = instances.clone()
    scaled.bboxes = instances.bboxes * factor
    if 'masks' in instances:
        masks = BitmapMasks(np.uint8(instances.masks), *image.shape[:2])
        scaled.masks = masks.resize((height, width)).masks.astype(bool)
    return cv2.resize(image, (width, height), interpolation=interpolation), scaled


def draw(
    visualizer: DetLocalVisualizer, image: np.ndarray, instances: InstanceData
) -> np.ndarray:
    """Draws masks, boxes, class names and, if there are any, scores.

    Args:
        visualizer: Draws them, and knows names and colours of the classes.
        image: RGB picture of shape (H, W, 3).
        instances: ``bboxes`` (n, 4), ``labels`` (n,) and optionally ``scores``
            (n,) and ``masks`` (n, H, W).

    Returns:
        The drawn picture, of the same shape.
    """
    classes = visualizer.dataset_meta['classes']
    palette = visualizer.dataset_meta.get('palette', [])
    if len(palette) != len(classes):  # that of other classes, or none
        palette = np.uint8(np.multiply(colormaps['tab10'].colors, 255))
    colors = [tuple(map(int, palette[i % len(palette)])) for i in instances.labels]
    visualizer.set_image(image)
    if not len(instances):
        return visualizer.get_image()
    if 'masks' in instances:
        visualizer.draw_binary_masks(instances.masks, colors, alphas=0.4)
    height, width = image.shape[:2]
    boxes = np.clip(instances.bboxes, 1, np.array([width, height] * 2) - 1)
    visualizer.draw_bboxes(boxes, edge_colors=colors, alpha=1, line_widths=3)
    for i, (left, top, right, _) in enumerate(boxes.tolist()):
        text = classes[instances.labels[i]]
        if 'scores' in instances:
            text += f' {instances.scores[i]:.2f}'
        # The label stands on the box, and inside the picture.
        on_left = left + right < width
        visualizer.draw_texts(
            text,
            np.array([left + 1 if on_left else right - 2, top]),
            font_sizes=FONT,
            colors='w' if np.dot(colors[i], (0.299, 0.587, 0.114)) < 140 else 'k',
            vertical_alignments='bottom' if top > 2.5 * FONT else 'top',
            horizontal_alignments='left' if on_left else 'right',
            bboxes=dict(facecolor=np.divide(colors[i], 255), edgecolor='none', pad=1),
        )
    return visualizer.get_image()


def make_sheet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Puts pairs of pictures in a grid under titles.

    Args:
        pairs: Truth and prediction of each picture, RGB, no side longer than
            ``CELL``.

    Returns:
        RGB picture of the sheet, with two pairs in a row if there are more
        than three.
    """
    per_row = 2 if len(pairs) > 3 else 1
    pair_width = 2 * CELL + 4 * GAP
    width = per_row * pair_width - 3 * GAP
    lefts = [i * pair_width + j * (CELL + GAP) for i in range(per_row) for j in (0, 1)]
    visualizer = DetLocalVisualizer()
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
    parser.add_argument('out', type=Path, help='picture to write, .png or .jpg')
    parser.add_argument('--num', type=int, default=6, help='number of pictures')
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='least score of a prediction'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the picture')
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
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo

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
        pairs.append(
            tuple(draw(visualizer, *scale_up(image, x)) for x in (truth, prediction))
        )

    _, encoded = cv2.imencode(args.out.suffix, mmcv.rgb2bgr(make_sheet(pairs)))
    write_atomic(args.out, encoded.tobytes())
    print(f'{len(pairs)} pictures are drawn in {args.out}.')


if __name__ == '__main__':
    main()

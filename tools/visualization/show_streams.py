"""Draw both streams of a block, their attention, and Grad-CAM, for a picture.

python tools/visualization/show_streams.py CONFIG CHECKPOINT PICTURE streams.png

The first row is the local stream, the second the global one: before and after
alignment, and where each attends to the other for one place of the picture.
"""

import argparse
import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.cli.arguments import (
    add_config_arguments,
    add_trust_argument,
    user_errors,
)
from dsnet_mm.cli.checkpoints import load_checkpoint
from dsnet_mm.cli.config import load_config
from dsnet_mm.cli.streams import captured, find_block, grad_cam, plot_streams
from dsnet_mm.files import check_file, write_atomic


def to_picture(inputs: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """Undoes the normalisation of an input (3, H, W).

    Args:
        inputs: The input of the network.
        preprocessor: The data preprocessor that made it.

    Returns:
        The picture of shape (H, W, 3) in [0, 1].
    """
    if preprocessor._enable_normalize:
        inputs = inputs * preprocessor.std + preprocessor.mean
    # Pictures are loaded as BGR; mmdet and mmpretrain name the conversion differently.
    converted = getattr(preprocessor, '_channel_conversion', False)
    if not (converted or getattr(preprocessor, 'to_rgb', False)):
        inputs = inputs.flip(0)
    return (inputs / 255).clamp(0, 1).permute(1, 2, 0).numpy()


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('picture', help='picture file')
    parser.add_argument('out', type=Path, help='figure to write, .png, .pdf or .svg')
    parser.add_argument(
        '--block',
        default='backbone.stages.2.0',
        help='name of the block in the model (default: %(default)s)',
    )
    parser.add_argument(
        '--point',
        type=float,
        nargs=2,
        metavar=('X', 'Y'),
        help='place whose attention is drawn, as fractions of width and height '
        '(default: the middle of the detection, or of the picture)',
    )
    parser.add_argument(
        '--target',
        type=int,
        help='what Grad-CAM explains: the number of a class, or the rank of a '
        'detection, from 0 (default: the best)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the figure')
    add_trust_argument(parser)
    args = parser.parse_args(argv)

    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        if args.out.suffix not in ('.png', '.pdf', '.svg'):
            raise ValueError(f'OUT ends with .png, .pdf or .svg, got {args.out}')
        if args.out.exists() and not args.overwrite:
            raise ValueError(f'{args.out} exists; replace it by --overwrite')
        if args.point and not all(0 <= value <= 1 for value in args.point):
            raise ValueError(f'--point takes fractions from 0 to 1, got {args.point}')
        check_file(args.picture, 'picture', 'give the path of one')
        cfg = load_config(args.config, args.cfg_options)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        load_checkpoint(model, args.checkpoint)
        model.eval()
        block = find_block(model, args.block)

    detects = cfg.default_scope == 'mmdet'
    steps = [
        step
        for step in cfg.test_dataloader.dataset.pipeline
        if 'Annotations' not in step['type']
    ]
    data = Compose(steps)(dict(img_path=args.picture, img_id=0))
    data = model.data_preprocessor(pseudo_collate([data]), False)
    with captured(block) as streams_of:
        (sample,) = model(**data, mode='predict')
        streams = streams_of()
    classes = load_classes(cfg)

    inputs = data['inputs'][0]
    height, width = inputs.shape[1:]
    cam, title, box, point = None, '', None, args.point or (0.5, 0.5)
    if detects:
        found = sample.pred_instances
        target = args.target or 0
        if target < len(found):
            order = found.scores.argsort(descending=True)[target]
            score, label = found.scores[order], found.labels[order].item()
            scale = sample.scale_factor
            x = found.bboxes[order].detach() * torch.tensor([*scale, *scale])
            box = tuple(x.tolist())
            point = args.point or (
                (box[0] + box[2]) / 2 / width,
                (box[1] + box[3]) / 2 / height,
            )
        elif args.target is not None:
            parser.error(f'--target is {target}, and {len(found)} objects are detected')
    else:
        label = (
            sample.pred_score.argmax().item() if args.target is None else args.target
        )
        if not 0 <= label < len(sample.pred_score):
            parser.error(
                f'--target is a class from 0 to {len(sample.pred_score) - 1}, '
                f'got {label}'
            )
        score = sample.pred_score[label]
    if not detects or box is not None:
        cam = grad_cam(score, streams.output, pooled=not detects)
        name = classes[label] if classes else f'class {label}'
        title = f'what raises {name}, {score.item():.2f}'

    matplotlib.use('Agg')
    figure = plot_streams(
        to_picture(inputs, model.data_preprocessor), streams, point, cam, title, box
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=args.out.suffix[1:], dpi=200)
    write_atomic(args.out, buffer.getvalue())
    print(f'The streams of {args.block} are drawn in {args.out}.')


def load_classes(cfg) -> tuple[str, ...] | None:
    """Returns the class names of the test data set, if the configuration has them."""
    metainfo = cfg.test_dataloader.dataset.get('metainfo') or {}
    return metainfo.get('classes')


if __name__ == '__main__':
    main()

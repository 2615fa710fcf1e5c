"""Draw both streams of a block, their attention, and Grad-CAM, for an image.

python tools/visualization/show_streams.py CONFIG CHECKPOINT IMAGE streams.png

The first row is the local stream, the second the global one: before and after
alignment, and where each attends to the other for one place of the image.
"""

import argparse
import io
from pathlib import Path

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.engine.launch import add_config_arguments, add_trust_argument, user_errors
from dsnet_mm.files import check_file, write_atomic
from dsnet_mm.inference import Predictor
from dsnet_mm.inference.streams import draw_streams


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
    parser.add_argument('image', help='image file')
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
        '(default: the middle of the detection, or of the image)',
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
        check_file(args.image, 'image', 'give the path of one')
        predictor = Predictor(
            args.config, args.checkpoint, device='cpu', cfg_options=args.cfg_options
        )
        image = predictor.read(args.image)
        figure = draw_streams(predictor, image, args.block, args.point, args.target)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=args.out.suffix[1:], dpi=200)
    write_atomic(args.out, buffer.getvalue())
    print(f'The streams of {args.block} are drawn in {args.out}.')


if __name__ == '__main__':
    main()

"""Export a classifier, or backbone and neck of a detector, for any size of images.

python tools/export.py CONFIG CHECKPOINT classifier.onnx
python tools/export.py CONFIG CHECKPOINT maps.pt2    # torch.export

The result is compared with PyTorch at five sizes and written if it agrees. The heads of
a detector are not exported (docs/export.md).
"""

import argparse
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from torch import nn

from dsnet_mm.checkpoint import load_checkpoint, restricted_loading
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.launch import add_config_arguments, add_trust_argument, user_errors
from dsnet_mm.files import write_atomic
from dsnet_mm.inference.export import (
    FORMATS,
    SIZES,
    ExportedPart,
    Run,
    decode,
    differences,
    encode,
    export,
)
from dsnet_mm.models import fuse_for_inference
from measure.turns import time_in_turns


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
    parser.add_argument('out', type=Path, help='file to write, .onnx or .pt2')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest value of an output '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='size at which the latency is measured (default: 224 224)',
    )
    parser.add_argument(
        '--turns', type=int, default=10, help='turns of the latency (default: 10)'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    add_trust_argument(parser)
    args = parser.parse_args(argv)

    suffix = args.out.suffix
    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        if suffix not in FORMATS:
            raise ValueError(f'OUT ends with {" or ".join(FORMATS)}, got {args.out}')
        if args.out.exists() and not args.overwrite:
            raise ValueError(f'{args.out} exists; replace it by --overwrite')
        if args.turns < 1:
            raise ValueError(f'--turns is at least 1, got {args.turns}')
        cfg = load_config(args.config, args.cfg_options)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        load_checkpoint(model, args.checkpoint)

    console = Console()
    net = ExportedPart(model)
    with user_errors(parser), console.status('Exporting, which can take minutes'):
        program, least = export(net)
        names = ['scores']
        if net.head is None:
            outputs = len(program.graph_signature.user_outputs)
            names = [f'map{i}' for i in range(outputs)]
        content = encode(program, suffix, names)
        run = decode(content, suffix)

    if min(args.shape) < least:
        parser.error(f'--shape is at least {least} {least}, got {args.shape}')
    sizes = [(n, max(h, least), max(w, least)) for n, h, w in SIZES]
    found = differences(net, run, sizes)
    table = Table('batch, height, width', 'difference, relative')
    for size, difference in zip(sizes, found, strict=True):
        table.add_row(' x '.join(map(str, size)), f'{difference:.1e}')
    console.print(table)
    if max(found) > args.tolerance:
        raise SystemExit(
            f'Nothing is written: the largest difference, {max(found):.1e}, is above '
            f'--tolerance {args.tolerance:.1e}.'
        )
    write_atomic(args.out, content)

    height, width = args.shape
    table = Table(
        '', 'ms', title=f'1 x {height} x {width}, {torch.get_num_threads()} threads'
    )
    for name, milliseconds in latencies(net, run, args.shape, args.turns).items():
        table.add_row(name, f'{milliseconds:.1f}')
    console.print(table)
    what = 'the classifier' if net.head is not None else 'backbone and neck'
    print(
        f'{args.out} holds {what}, for batches and images of any size from '
        f'{least} x {least}.\nIts input is what the data preprocessor of the '
        f'configuration gives. Its outputs are {", ".join(names)}.'
    )
    if net.head is None:
        print(
            'The heads of the detector are not in it; docs/export.md says how to '
            'run them on these maps.'
        )


def latencies(
    net: nn.Module, run: Run, shape: tuple[int, int], turns: int
) -> dict[str, float]:
    """Times an exported network beside the network as built and fused.

    Args:
        net: The network.
        run: Runs the exported network.
        shape: Height and width of the image. The batch size is 1.
        turns: Each turn runs each once. There is one turn more, which is dropped.

    Returns:
        The median milliseconds of each. A network that cannot be fused has no such one.
    """
    image = torch.randn(1, 3, *shape)
    forms = {'PyTorch, as built': net, 'exported': run}
    with suppress(ValueError):
        forms['PyTorch, fused'] = fuse_for_inference(deepcopy(net))
    calls = {name: partial(form, image) for name, form in forms.items()}
    with torch.inference_mode():
        times = time_in_turns(calls, range(turns + 1))
    return {name: median(seconds) * 1e3 for name, seconds in times.items()}


if __name__ == '__main__':
    main()

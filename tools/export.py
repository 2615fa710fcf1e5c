"""Export a classifier, or backbone and neck of a detector, for any size of images.

python tools/export.py CONFIG CHECKPOINT classifier.onnx
python tools/export.py CONFIG CHECKPOINT maps.pt2    # torch.export

The result is compared with PyTorch at five sizes and written if it agrees. The heads of
a detector are not exported (docs/export.md).
"""

import argparse
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dsnet_mm.checkpoint import load_checkpoint, restricted_loading
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.launch import add_config_arguments, add_trust_argument, user_errors
from dsnet_mm.files import write_atomic
from dsnet_mm.models import DSBlock, fuse_for_inference
from measure.turns import time_in_turns

Run = Callable[[Tensor], Sequence[Tensor]]

FORMATS = ('.onnx', '.pt2')
# Batch size, height and width of the images on which an export is checked.
SIZES = ((1, 224, 224), (2, 225, 250), (1, 333, 127), (3, 129, 160), (1, 256, 511))
_EXAMPLE = (2, 3, 225, 250)


class ExportedPart(nn.Module):
    """The part of a model that is exported.

    It is a classifier as a whole, and backbone and neck of a detector: the heads of
    mmdet choose boxes by Python code that depends on their values.

    Args:
        model: A classifier of mmpretrain or a detector of mmdet.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = getattr(model, 'neck', None)
        self.head = getattr(model, 'head', None)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the scores of a classifier, or the maps of a detector.

        Args:
            images: Normalised images of shape (N, 3, H, W).

        Returns:
            The scores of shape (N, classes), before the softmax, or the maps of all
            levels.
        """
        outs = self.backbone(images)
        if self.neck is not None:
            outs = self.neck(outs)
        if self.head is not None:
            outs = (self.head(outs),)
        return outs


def export(net: nn.Module) -> tuple[ExportedProgram, int]:
    """Exports a network for batches and images of any size.

    Args:
        net: The network, in evaluation mode. Its input has shape (N, 3, H, W).

    Returns:
        The program, and the least height and width that it takes. Below that, a global
        stream has a single row or column, which PyTorch treats as another program.

    Raises:
        ValueError: If ``max_global_tokens`` leaves single rows on usual images.
    """
    for block in net.modules():
        cap = block.max_global_tokens if isinstance(block, DSBlock) else None
        if cap is not None and cap < 16:
            raise ValueError(
                f'max_global_tokens={cap} leaves a single row of global tokens on wide '
                f'images, and one program cannot have one row and several; take at '
                f'least 16.'
            )
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(
        net, (torch.randn(_EXAMPLE),), dynamic_shapes=(sizes,), strict=False
    )
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    sides = (side.node.expr for side in node.meta['val'].shape[-2:])
    least = max(int(program.range_constraints[side].lower) for side in sides)
    run = program.module()
    while not _takes(run, least):  # with max_global_tokens the range is too wide
        least += 1
    return program, least


def _takes(run: Run, side: int) -> bool:
    try:
        run(torch.randn(1, 3, side, side))
    except AssertionError:  # of PyTorch's checks of the size, before the first operator
        return False
    return True


def encode(program: ExportedProgram, suffix: str, names: list[str]) -> bytes:
    """Returns the content of the file of a program.

    Args:
        program: The program.
        suffix: One of ``FORMATS``. ``'.pt2'`` is the format of ``torch.export``.
        names: Names of the outputs in ONNX.

    Raises:
        ValueError: If packages that write ONNX are missing.
    """
    if suffix == '.onnx':
        try:
            import onnxruntime as onnxruntime
            import onnxscript as onnxscript
        except ImportError as error:
            raise ValueError(
                f'exporting to ONNX takes {error.name}, which is not installed; '
                f"install it by pip install 'dsnet_mm[export]'"
            ) from None
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=['images'],
            output_names=names,
            verbose=False,
        )
        return exported.model_proto.SerializeToString()
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def decode(content: bytes, suffix: str) -> Run:
    """Returns a function that runs the content of a file.

    ONNX is run by onnxruntime on the CPU, with as many threads as PyTorch has.
    """
    if suffix == '.onnx':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            content, options, providers=['CPUExecutionProvider']
        )
        return lambda x: [
            torch.from_numpy(out) for out in session.run(None, {'images': x.numpy()})
        ]
    return torch.export.load(io.BytesIO(content)).module()


@torch.no_grad()
def differences(
    net: nn.Module, run: Run, sizes: Sequence[tuple[int, int, int]]
) -> list[float]:
    """Compares an exported network with the network, on random images.

    Args:
        net: The network.
        run: Runs the exported network.
        sizes: Batch size, height and width of each comparison.

    Returns:
        For each size, the largest difference of all outputs, relative to the largest
        value of the output. NaN and another shape count as infinite.
    """
    results = []
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        pairs = zip(run(images), net(images), strict=True)
        results.append(max(_difference(*pair) for pair in pairs))
    return results


def _difference(measured: Tensor, expected: Tensor) -> float:
    if measured.shape != expected.shape:
        return float('inf')
    difference = ((measured - expected).abs().max() / expected.abs().max()).item()
    return difference if difference == difference else float('inf')


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


if __name__ == '__main__':
    main()

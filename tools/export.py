"""Export a detector or a classifier, for any size of images.

python tools/export.py CONFIG CHECKPOINT detector.onnx    # from image to objects
python tools/export.py CONFIG CHECKPOINT classifier.onnx
python tools/export.py CONFIG CHECKPOINT maps.pt2    # torch.export: backbone and neck

The result is compared with PyTorch at five sizes and written if it agrees.
tools/infer_onnx.py runs the ONNX files without PyTorch.
"""

import argparse
import io
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.launch import add_config_arguments, add_trust_argument, user_errors
from dsnet_mm.files import write_atomic
from dsnet_mm.inference.predictor import Predictor
from dsnet_mm.models import DSBlock, fuse_for_inference
from exporting.metadata import KEY, describe
from measure.turns import time_in_turns

Run = Callable[[Tensor], Sequence[Tensor]]

FORMATS = ('.onnx', '.pt2')
# Batch size, height and width of the images on which an export is checked.
SIZES = ((1, 224, 224), (2, 225, 250), (1, 333, 127), (3, 129, 160), (1, 256, 511))
_EXAMPLE = (225, 250)


class ExportedPart(nn.Module):
    """A classifier as a whole, or backbone and neck of a detector.

    Args:
        model: A classifier of mmpretrain or a detector of mmdet.

    Attributes:
        batch: The batch size that it is exported for, None for any.
        names: Names of the outputs, empty if they are numbered.
        what: What it is and takes, for the user.
    """

    batch = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = getattr(model, 'neck', None)
        self.head = getattr(model, 'head', None)
        self.names = [] if self.head is None else ['scores']
        what = 'backbone and neck' if self.head is None else 'the classifier'
        self.what = f'{what}, for batches and images'
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

    predict = forward

    @staticmethod
    def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Returns the largest difference of all outputs.

        It is relative to the largest value of the output. NaN and another shape count
        as infinite.
        """
        gaps = []
        for measured, map_ in zip(found, expected, strict=True):
            if measured.shape != map_.shape:
                return float('inf')
            gaps.append(((measured - map_).abs().max() / map_.abs().max()).item())
        return max(gap if gap == gap else float('inf') for gap in gaps)


def export(net: nn.Module, batch: int | None = None) -> tuple[ExportedProgram, int]:
    """Exports a network for images of any size.

    Args:
        net: The network, in evaluation mode. Its input has shape (N, 3, H, W).
        batch: N, None for any.

    Returns:
        The program, and the least height and width that it takes. Below that, a global
        stream has a single row or column, which PyTorch treats as another program. A
        program of one batch size is for ONNX, which has no least size.

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
    sizes = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} | ({} if batch else {0: Dim.DYNAMIC})
    example = torch.randn(batch or 2, 3, *_EXAMPLE)
    program = torch.export.export(
        net, (example,), dynamic_shapes=(sizes,), strict=False
    )
    if batch:
        return program, 1
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


def encode(
    program: ExportedProgram,
    suffix: str,
    names: list[str],
    about: dict[str, Any] | None = None,
) -> bytes:
    """Returns the content of the file of a program.

    Args:
        program: The program.
        suffix: One of ``FORMATS``. ``'.pt2'`` is the format of ``torch.export``.
        names: Names of the outputs in ONNX.
        about: Metadata of an ONNX file, see ``exporting.metadata.describe``.

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
        exported.model.metadata_props[KEY] = json.dumps(about)
        for node in exported.model.graph.all_nodes():
            node.metadata_props.clear()  # lines of code, and paths of this machine
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
    net: Run,
    run: Run,
    sizes: Sequence[tuple[int, int, int]],
    difference: Callable[..., float] = ExportedPart.difference,
) -> list[float]:
    """Compares an exported network with the network, on images of random blobs.

    Args:
        net: The network.
        run: Runs the exported network.
        sizes: Batch size, height and width of each comparison.
        difference: Compares what was found with what was expected.

    Returns:
        The difference for each size.
    """
    results = []
    for batch, height, width in sizes:
        grid = torch.randn(batch, 3, height // 16 + 1, width // 16 + 1)
        images = F.interpolate(grid, (height, width), mode='bilinear')
        results.append(difference(run(images), net(images)))
    return results


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
        help='largest difference of an output, relative to its largest value, or of an '
        'object (default: %(default)s)',
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
        options = dict(device='cpu', cfg_options=args.cfg_options)
        predictor = Predictor(args.config, args.checkpoint, **options)
        is_onnx, about = suffix == '.onnx', None
        if is_onnx and predictor.detects:
            from exporting.detector import OnnxDetector  # imports mmdet

            net = OnnxDetector(predictor.model)
        else:
            net = ExportedPart(predictor.model)
        if is_onnx:
            cfg = load_config(args.config, args.cfg_options)
            about = describe(cfg, predictor.model, predictor.class_names)

    console = Console()
    with (
        user_errors(parser),
        console.status('Exporting, which can take minutes'),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore', FutureWarning)  # of torch about itself
        program, least = export(net, net.batch)
        outputs = len(program.graph_signature.user_outputs)
        names = net.names or [f'map{i}' for i in range(outputs)]
        content = encode(program, suffix, names, about)
        run = decode(content, suffix)

    if min(args.shape) < least:
        parser.error(f'--shape is at least {least} {least}, got {args.shape}')
    sizes = [(net.batch or n, max(h, least), max(w, least)) for n, h, w in SIZES]
    found = differences(net.predict, run, sizes, net.difference)
    table = Table('batch, height, width', 'difference, relative')
    for size, difference in zip(sizes, found, strict=True):
        table.add_row(' x '.join(map(str, size)), f'{difference:.1e}')
    console.print(table)
    if net.batch:
        count = sum(net.compared)
        what = f'{count} objects were compared.'
        print(what if count else 'WARNING: no object was found, so none was compared.')
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
    print(
        f'{args.out} holds {net.what} of any size from {least} x {least}.\n'
        f'Its input is what the data preprocessor of the configuration gives'
        f'{", without padding" * bool(net.batch)}. Its outputs are {", ".join(names)}.'
    )
    if is_onnx:
        print('tools/infer_onnx.py runs it on images.')
    elif predictor.detects:
        print('docs/export.md says how to run the heads of the detector on these maps.')


if __name__ == '__main__':
    main()

"""Exports networks by ``torch.export`` and to ONNX, and checks them."""

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

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
    """
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(
        net, (torch.randn(_EXAMPLE),), dynamic_shapes=(sizes,), strict=False
    )
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    sides = (side.node.expr for side in node.meta['val'].shape[-2:])
    return program, max(int(program.range_constraints[side].lower) for side in sides)


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

"""Image tower and classifier as an ONNX file."""

import json
import logging
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dsnet_mm.files import check_new

from .deployment import DeployedClassifier

MOST_IN_ONE_FILE = 1.5e9
"""Bytes of weights in an ONNX file, which cannot have more than 2 GiB in all."""


class ImageClassifier(nn.Module):
    """Image tower and classifier as one network, for export.

    Args:
        deployed: What ``load_classifier`` returned.
    """

    def __init__(self, deployed: DeployedClassifier) -> None:
        super().__init__()
        self.clip = deployed.encoder.clip
        self.classifier, self.calibration = deployed.classifier, deployed.calibration
        for name in ('mean', 'std'):
            value = torch.tensor(getattr(deployed.encoder, name), dtype=torch.float32)
            self.register_buffer(name, value.view(3, 1, 1).to(deployed.device))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (N, K) of RGB images (N, 3, H, W) with values 0 to 1."""
        features = self.clip.encode_image((images - self.mean) / self.std)
        return self.calibration.probabilities(self.classifier(features.float()))


def describe(deployed: DeployedClassifier) -> dict[str, Any]:
    """Describes classes and images for tools/infer_onnx.py (docs/export.md)."""
    encoder, size = deployed.encoder, [deployed.encoder.image_size] * 2
    resized = dict(size=size, filter=encoder.preprocess['interpolation'])
    mode = encoder.preprocess['resize_mode']
    if deployed.preprocessing == 'warp' or mode == 'squash':
        steps = [dict(kind='stretch', **resized)]
    else:
        kind = 'edge' if mode == 'shortest' else mode  # which the tool refuses
        steps = [dict(kind=kind, **resized), dict(kind='crop', size=size)]
    return dict(
        kind='classifier',
        classes=list(deployed.class_names),
        steps=steps,
        channels='RGB',
        mean=[0] * 3,
        std=[255] * 3,  # mean and standard deviation are in the graph
    )


def export_onnx(
    deployed: DeployedClassifier, path: str | Path, tolerance: float = 1e-4
) -> float:
    """Writes image tower and classifier as an ONNX file.

    Its input ``images`` (N, 3, H, W) are RGB images after resize and crop, with
    values 0 to 1. Its output ``probabilities`` is (N, K). N is free. The class names,
    the preprocessing and the calibration are in its metadata. Above 1.5 GB the weights
    are in a second file beside it, ``path`` with ``.data`` added.

    The file is compared with PyTorch in onnxruntime, for two batch sizes, before it is
    moved to its place.

    Args:
        deployed: What ``load_classifier`` returned, on the CPU.
        path: File to write.
        tolerance: Largest difference of a probability.

    Returns:
        The largest difference of a probability from PyTorch.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        FileExistsError: If one of the files exists.
        ValueError: If the network cannot be exported, or the file computes something
            else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'exporting to ONNX needs a library ({error}): '
            f"pip install 'dsnet_mm[export]'."
        ) from error
    path = Path(path)
    check_new(path)
    check_new(path.with_name(f'{path.name}.data'))
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    model = ImageClassifier(deployed).eval()
    size = deployed.encoder.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    weights = sum(p.numel() * p.element_size() for p in model.clip.visual.parameters())
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=path.parent) as folder,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore', FutureWarning)  # of torch about itself
        file = Path(folder) / path.name
        try:
            program = torch.onnx.export(
                model,
                (images[:2],),
                dynamo=True,
                input_names=['images'],
                output_names=['probabilities'],
                dynamic_shapes=({0: torch.export.Dim('batch')},),
                verbose=False,
            )
            program.model.metadata_props.update(
                class_names=json.dumps(deployed.class_names),
                model=deployed.encoder.model_name,
                calibration=json.dumps(asdict(deployed.calibration)),
                preprocessing=json.dumps(
                    {'resize': deployed.preprocessing, **deployed.encoder.preprocess}
                ),
                dsnet_mm=json.dumps(describe(deployed)),
            )
            program.save(str(file), external_data=weights > MOST_IN_ONE_FILE)
            session = onnxruntime.InferenceSession(
                str(file), providers=['CPUExecutionProvider']
            )
            gaps = []
            for batch in (images[:1], images):
                (found,) = session.run(None, {'images': batch.numpy()})
                gaps.append((torch.from_numpy(found) - model(batch)).abs().max().item())
        except Exception as error:  # both libraries raise errors of many types
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(
                f'{deployed.encoder.model_name!r} with a '
                f'{type(deployed.classifier).__name__} cannot be exported to ONNX '
                f'({type(error).__name__}: {reason}).'
            ) from error
        worst = max(gaps)
        if not worst <= tolerance:
            raise ValueError(
                f'{path.name} would differ from PyTorch by {worst:.2g} in a '
                f'probability, more than {tolerance:.2g}; it was not written.'
            )
        for part in sorted(Path(folder).iterdir(), reverse=True):
            os.replace(part, path.parent / part.name)
    return worst

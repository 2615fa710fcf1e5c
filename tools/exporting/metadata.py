"""What a file must know beside its graph: classes, and how images are prepared."""

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch import nn

KEY = 'dsnet_mm'
"""Key of the metadata of an ONNX file. The value is JSON."""

LEFT_OUT = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackInputs')
ACCEPTED = (
    'Resize by OpenCV with bilinear interpolation, Resize and ResizeEdge of the short '
    'edge by Pillow with bilinear or bicubic interpolation, and CenterCrop'
)


def describe(cfg: Config, model: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
    """Describes a model of mmdet or mmpretrain.

    Args:
        cfg: Its configuration, with the test pipeline.
        model: The model.
        classes: Names of the classes, which may be empty.

    Returns:
        What tools/infer_onnx.py reads, to be written as JSON: ``kind``, ``classes``,
        ``steps`` (:func:`_step`), ``channels`` (``'RGB'`` or ``'BGR'``), and ``mean``
        and ``std`` of pixels from 0 to 255 in this order. Of a detector also
        ``score_thr``, and ``mask_thr`` if it has masks.

    Raises:
        ValueError: If the test pipeline has a step that is not accepted.
    """
    steps = [
        _step(step)
        for step in cfg.test_dataloader.dataset.pipeline
        if _name(step) not in LEFT_OUT
    ]
    pixels = model.data_preprocessor
    to_rgb = getattr(pixels, '_channel_conversion', getattr(pixels, 'to_rgb', False))
    about = dict(
        kind='classifier',
        classes=list(classes),
        steps=steps,
        channels='RGB' if to_rgb else 'BGR',
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )
    if pixels._enable_normalize:
        about |= dict(
            mean=pixels.mean.flatten().tolist(), std=pixels.std.flatten().tolist()
        )
    if cfg.default_scope == 'mmdet':
        head = getattr(model, 'roi_head', None) or model.bbox_head
        test_cfg = head.test_cfg
        about |= dict(kind='detector', score_thr=test_cfg.get('score_thr', 0))
        if model.with_mask:
            about['mask_thr'] = test_cfg.mask_thr_binary
    return about


def _name(step: dict[str, Any]) -> str:
    return str(step['type']).split('.')[-1]


def _step(step: dict[str, Any]) -> dict[str, Any]:
    """Returns a step of the test pipeline as ``kind``, ``size`` and ``filter``.

    The kind is ``'factor'`` (factors of width and height), ``'fit'`` (largest size
    within the larger and the smaller side), ``'stretch'`` (width and height),
    ``'edge'`` (length of the short side, twice) or ``'crop'`` (width and height of the
    centre).
    """
    kind, built = None, TRANSFORMS.build(step)
    if _name(step) == 'CenterCrop' and not built.auto_pad:
        return dict(kind='crop', size=built.crop_size)
    if _name(step) == 'ResizeEdge' and built.edge == 'short':
        kind, size = 'edge', (built.scale, built.scale)
    elif _name(step) == 'Resize' and built.scale:
        kind, size = 'fit' if built.keep_ratio else 'stretch', built.scale
    elif _name(step) == 'Resize' and not built.keep_ratio:
        kind, size = 'factor', built.scale_factor
    how = kind and (built.backend, built.interpolation)
    if how not in (('cv2', 'bilinear'), ('pillow', 'bilinear'), ('pillow', 'bicubic')):
        raise ValueError(
            f'the test pipeline has the step {dict(step)}; what is accepted is '
            f'{ACCEPTED}'
        )
    return dict(
        kind=kind,
        size=size,
        filter='opencv' if how[0] == 'cv2' else built.interpolation,
    )

"""What a file must know beside its graph: classes, and how images are prepared."""

from collections.abc import Sequence
from typing import Any

from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from torch import nn

KEY = 'dsnet_mm'
"""Key of the metadata of an ONNX file. The value is JSON."""

LEFT_OUT = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackInputs')


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
    """
    built = map(TRANSFORMS.build, cfg.test_dataloader.dataset.pipeline)
    steps = [_step(x) for x in built if type(x).__name__ not in LEFT_OUT]
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
        test_cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
        about |= dict(kind='detector', score_thr=test_cfg.get('score_thr', 0))
        if model.with_mask:
            about['mask_thr'] = test_cfg.mask_thr_binary
    return about


def _step(step: BaseTransform) -> dict[str, Any]:
    """Returns a step of the test pipeline as ``kind``, ``size`` and ``filter``.

    The kind is ``'factor'`` (factors of width and height), ``'fit'`` (largest size
    within the larger and the smaller side), ``'stretch'`` (width and height),
    ``'edge'`` (length of the short side, twice) or ``'crop'`` (width and height of the
    centre). A step that tools/infer_onnx.py does not have is named alone.
    """
    name = type(step).__name__
    if name == 'CenterCrop' and not step.auto_pad:
        return dict(kind='crop', size=step.crop_size)
    filters = {('cv2', 'bilinear'): 'opencv'}
    filters |= {('pillow', x): x for x in ('bilinear', 'bicubic')}
    how = [getattr(step, key, None) for key in ('backend', 'interpolation')]
    if how := filters.get(tuple(how)):
        if name == 'ResizeEdge' and step.edge == 'short':
            return dict(kind='edge', size=(step.scale, step.scale), filter=how)
        if name == 'Resize' and step.scale:
            kind = 'fit' if step.keep_ratio else 'stretch'
            return dict(kind=kind, size=step.scale, filter=how)
        if name == 'Resize' and not step.keep_ratio:
            return dict(kind='factor', size=step.scale_factor, filter=how)
    return dict(kind=name)

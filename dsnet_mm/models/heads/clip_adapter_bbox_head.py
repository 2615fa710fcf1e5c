"""CLIP-Adapter as the classifier of regions in two-stage detectors of mmdet."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.structures.bbox import bbox2roi, bbox_overlaps, get_box_tensor
from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.weights import read_safetensors


class RegionClassifier(CLIPAdapter):
    """:class:`CLIPAdapter` whose class matrix is learnt, and of unit norm."""

    def adapt(self, image_features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f* (N, D) and W (K, D), both of unit norm."""
        f, w = super().adapt(image_features)
        return f, F.normalize(w, dim=-1)


class CLIPAdapterBBoxHead(ConvFCBBoxHead):
    """A box head whose classes are the rows of a matrix W (K + 1, D).

    ::

        f* = alpha A(f) + (1 - alpha) f
        logits = logit_scale * cos(f*, W)

    f is the feature of a region, and the last row is the background. A(f) is 0 at
    first. Boxes do not depend on the class.

    A checkpoint with fewer classes, or of a head with a linear classifier, gives the
    rows that it has: those of its classes are the first ones. The others are 0 until
    :class:`dsnet_mm.AdaptedDetectorHook` sets them to :func:`class_prototypes`.

    Args:
        text_features: A safetensors file with ``text_features`` (K, D), the rows of the
            classes at first. None is random rows.
        logit_scale: Scale of the cosines. TFA (arXiv 2003.06957) has 20.
        adapter: Arguments of :class:`CLIPAdapter`, such as ``reduction``.
        **kwargs: Arguments of mmdet's ``ConvFCBBoxHead``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its matrix has another shape.
    """

    def __init__(
        self,
        text_features: str | None = None,
        logit_scale: float = 20.0,
        adapter: dict = {},
        **kwargs: Any,
    ) -> None:
        super().__init__(**{**kwargs, 'reg_class_agnostic': True})
        matrix = torch.randn_like(self.fc_cls.weight)
        self._at_first = torch.zeros_like(matrix)
        if text_features is not None:
            if not Path(text_features).is_file():
                raise FileNotFoundError(f'there is no file {text_features}')
            rows = read_safetensors(text_features)['state_dict'].get('text_features')
            if rows is None or rows.shape != matrix[:-1].shape:
                raise ValueError(
                    f'{text_features} must hold text_features of the shape '
                    f'{tuple(matrix[:-1].shape)}, a row a class, and has '
                    f'{None if rows is None else tuple(rows.shape)}; set num_classes '
                    f'and fc_out_channels'
                )
            matrix[:-1] = self._at_first[:-1] = rows
        options = dict(preset='paper', zero_init=True, learn_classifier=True)
        self.fc_cls = RegionClassifier(matrix, logit_scale, **options | adapter)
        # It would initialise the adapter too.
        self.init_cfg = [
            cfg for cfg in self.init_cfg if cfg.get('override') != dict(name='fc_cls')
        ]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        name = f'{prefix}fc_cls.text_features'
        given, matrix = state_dict.get(name), self._at_first.clone()
        if given is None or len(given) < len(matrix):
            if given is not None:
                rows = torch.zeros_like(matrix)
                rows[: len(given) - 1], rows[-1] = given[:-1], given[-1]
                matrix = torch.where(matrix == 0, rows, matrix)
            own = self.fc_cls.state_dict(prefix=f'{prefix}fc_cls.')
            for key in [k for k in state_dict if k.startswith(f'{prefix}fc_cls.')]:
                if key not in own:  # of a linear classifier
                    del state_dict[key]
            state_dict.update({**own, **state_dict, name: matrix})
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def class_prototypes(detector: nn.Module, batches: Iterable[dict]) -> Tensor:
    """Computes the rows of W: means of the features of regions, each of unit norm.

    Regions are the true boxes, and for the background the proposals whose IoU with all
    of these is below 0.3.

    Args:
        detector: A two-stage detector with a :class:`CLIPAdapterBBoxHead`.
        batches: Images with boxes, as a data loader gives them.

    Returns:
        Rows (K + 1, D) of unit norm, and of 0 for classes without a box.
    """
    head, seen = detector.roi_head.bbox_head, []
    rows = torch.zeros_like(head.fc_cls.text_features)
    handle = head.fc_cls.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        for batch in batches:
            data = detector.data_preprocessor(batch, True)
            maps, samples = detector.extract_feat(data['inputs']), data['data_samples']
            found = detector.rpn_head.predict(maps, samples, rescale=False)
            regions, labels = [], []
            for sample, proposals in zip(samples, found, strict=True):
                boxes = get_box_tensor(sample.gt_instances.bboxes)
                apart = (bbox_overlaps(proposals.bboxes, boxes) < 0.3).all(1)
                others, own = proposals.bboxes[apart], sample.gt_instances.labels
                regions.append(torch.cat([boxes, others]))
                labels += [own, own.new_full((len(others),), head.num_classes)]
            detector.roi_head._bbox_forward(maps, bbox2roi(regions))
            rows.index_add_(0, torch.cat(labels), F.normalize(seen.pop(), dim=-1))
    finally:
        handle.remove()
    return F.normalize(rows, dim=-1)

"""Adapters of the weights of a frozen detector of mmdet."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import is_norm
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.func import functional_call

from dsnet_mm.checkpoint import load_checkpoint, read_checkpoint
from dsnet_mm.registry import MODELS


class WeightChange(nn.Module):
    """What is added to a weight of the detector, ``alpha`` times. It starts at 0.

    Args:
        weight: The weight.
        rank: None for a change of each number, or the rank of a product of two
            matrices, as in LoRA (arXiv 2106.09685).
    """

    def __init__(self, weight: Tensor, rank: int | None) -> None:
        super().__init__()
        rows = len(weight) if rank else weight.numel()
        self.up = nn.Parameter(weight.new_zeros(rows, rank or 1))
        if rank:
            down = weight.new_empty(rank, weight[0].numel())
            self.down = nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5)))

    def forward(self, weight: Tensor, alpha: Tensor | float) -> Tensor:
        """Returns the changed weight."""
        change = self.up @ self.down if hasattr(self, 'down') else self.up
        return weight + alpha * change.view_as(weight)


class Adapter(nn.Module):
    """The adapters of one domain, beside a detector that stays as it is.

    Args:
        detector: The detector.
        places: Which of its weights are changed, any of these:

            - ``'lora'``: those of all linear layers and ungrouped convolutions, by a
              change of low rank.
            - ``'norms'``: weights and biases of all norms.
            - a regular expression for names of weights.
        rank: Rank of ``'lora'``.
        alpha: Weight of the changes, from 0, the frozen detector, to 1. It replaces
            that of a checkpoint. None is that of :meth:`AdaptedDetector.start`, and 1
            until then.

    Attributes:
        options: The arguments after the first.

    Raises:
        ValueError: If an argument is out of range, or no weight has the name of a
            place.
    """

    def __init__(
        self,
        detector: nn.Module,
        places: Sequence[str] = ('lora',),
        rank: int = 4,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        places = [places] if isinstance(places, str) else list(places)
        self.options = dict(places=places, rank=rank, alpha=alpha)
        if not places or rank < 1 or not 0 <= (alpha or 0) <= 1:
            raise ValueError(
                f'an adapter has one place or more, a rank of at least 1, and alpha '
                f'from 0 to 1, got {self.options}'
            )
        self.weights = nn.ModuleDict()
        for place in places:
            for name in _find(detector, place):
                weight = detector.get_parameter(name)
                change = WeightChange(weight, rank if place == 'lora' else None)
                # Names of modules in PyTorch have no points.
                self.weights[name.replace('.', '/')] = change
        alpha = 1.0 if alpha is None else float(alpha)
        self.register_buffer('alpha', torch.tensor(alpha))
        # Colours of the images of the domain and of the detector, 0 if not known.
        self.register_buffer('domain', torch.zeros(6))
        self.register_buffer('detector_domain', torch.zeros(6))
        self.register_buffer('detector', identity(detector))

    def forward(
        self, detector: nn.Module, alpha: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """Returns the weights that differ from those of the detector, by name.

        Args:
            detector: The detector.
            alpha: Weight of the changes, None for that of the adapter.
        """
        alpha, changed = self.alpha if alpha is None else alpha, {}
        for key, change in self.weights.items():
            name = key.replace('/', '.')
            changed[name] = change(detector.get_parameter(name), alpha)
        return changed

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        other = state_dict.get(f'{prefix}detector')
        if other is not None and not torch.equal(other.cpu(), self.detector.cpu()):
            given, own = (bytes(x.tolist()).hex()[:12] for x in (other, self.detector))
            raise ValueError(
                f'the adapter was made for a detector with the weights {given} '
                f'(SHA-256), and this one has {own}; use the checkpoint beside which '
                f'it was trained'
            )
        if self.options['alpha'] is not None:
            state_dict[f'{prefix}alpha'] = self.alpha
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module()
class AdaptedDetector(BaseModel):
    """A frozen detector of mmdet with adapters, which alone are trained and saved.

    In training the changes count whole. In tests they are blended by alpha, as weights
    in WiSE-FT (arXiv 2109.01903). The state dict holds the adapters. Norms and dropout
    of the detector stay in evaluation mode.

    Args:
        detector: Configuration of the detector, or the detector with its weights.
        checkpoint: Checkpoint of the detector. None takes the weights as they are,
            which are random if ``detector`` is a configuration.
        auto: Whether an image in a test is adapted only if its colours, the mean and
            the deviation of each channel, are nearer to those of the images of the
            adapter than to those of the detector.
        data_preprocessor: That of the detector, if its configuration has none.
        **options: Arguments of :class:`Adapter`.

    Attributes:
        adapters: The adapters. Training has one.
        used: Number of the adapter that is used, None for the frozen detector.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it does not fit, or an option is wrong.
    """

    def __init__(
        self,
        detector: dict | nn.Module,
        checkpoint: str | None = None,
        auto: bool = False,
        data_preprocessor: dict | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(detector, nn.Module):
            # MMEngine gives the model what stands beside it in a configuration.
            detector = MODELS.build(
                {'data_preprocessor': data_preprocessor, **detector}
            )
        if checkpoint is not None:
            load_checkpoint(detector, checkpoint)
        if any(getattr(module, 'with_cp', False) for module in detector.modules()):
            raise ValueError(
                'gradient checkpointing computes maps again without adapters; set '
                'with_cp=False in the detector'
            )
        super().__init__(detector.data_preprocessor)
        # No part of this module: not in its state dict, its parameters or its mode.
        self.__dict__['detector'] = detector.requires_grad_(False).eval()
        self.with_mask = getattr(detector, 'with_mask', False)
        self.auto, self.used = auto, 0
        self.adapters = nn.ModuleList([Adapter(detector, **options)])

    @classmethod
    def from_files(
        cls,
        detector: nn.Module,
        files: Sequence[str | Path],
        auto: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> 'AdaptedDetector':
        """Puts adapters beside a detector.

        Args:
            detector: The detector with its weights.
            files: Files of adapters.
            auto: See the class. With several files it must be True.
            class_names: Names of the classes of the detector, None for any.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If one is of another detector or other classes, or cannot be
                chosen by image.
        """
        if not files or (len(files) > 1 and not auto):
            raise ValueError(
                f'{len(files)} adapters without a choice between them; give one, or '
                f'auto for the nearest of each image'
            )
        adapters = nn.ModuleList()
        for path in files:
            about = json.loads(read_checkpoint(str(path))['meta'].get('adapter', '{}'))
            if not about:
                raise ValueError(
                    f'{path} is no adapter, as an AdaptedDetectorHook writes it'
                )
            if class_names and about['class_names'] != [*class_names]:
                raise ValueError(
                    f'{path} has the classes {about["class_names"]}, and the detector '
                    f'has {[*class_names]}; use that beside which it was trained'
                )
            try:
                model = cls(detector, auto=auto, **about['options'])
            except TypeError as error:
                raise ValueError(f'{path} is of another version: {error}') from None
            load_checkpoint(model, str(path))
            if auto and not model.adapters[0].detector_domain.any():
                raise ValueError(
                    f'{path} knows no images of the detector, and cannot be chosen by '
                    f'image; train it with AdaptedDetectorHook(base=...)'
                )
            adapters += model.adapters
        model.adapters = adapters
        return model

    def forward(
        self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'
    ) -> Any:
        """Runs the detector with the adapter that is used; arguments are mmdet's."""
        arguments = (inputs, data_samples, mode)
        if self.used is None:
            return self.detector(*arguments)
        weights = self.adapters[self.used](self.detector, 1 if mode == 'loss' else None)
        return functional_call(self.detector, weights, arguments)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Writes the weights with adapters into the detector, and returns it."""
        for name, weight in self.adapters[0](self.detector).items():
            self.detector.get_parameter(name).copy_(weight)
        return self.detector

    def test_step(self, data: dict[str, Any]) -> list:
        """Predicts a batch, see ``BaseModel.test_step``."""
        if not self.auto:
            return super().test_step(data)
        found = []
        try:
            for i, image in enumerate(data['inputs']):
                self.used = self.choose(image)
                found += super().test_step({k: [v[i]] for k, v in data.items()})
        finally:
            self.used = 0
        return found

    val_step = test_step

    def choose(self, image: Tensor) -> int | None:
        """Returns the adapter of an image (C, H, W), None for the frozen detector."""
        own = colours(image).to(self.adapters[0].domain)
        domains = [adapter.domain for adapter in self.adapters]
        domains += [adapter.detector_domain for adapter in self.adapters]
        nearest = int(torch.stack([(own - x).norm() for x in domains]).argmin())
        return nearest if nearest < len(self.adapters) else None

    @torch.no_grad()
    def start(self, batches: Sequence[dict[str, Any]]) -> tuple[float, list[int]]:
        """Sets alpha, and the classes of a head that the detector lacks.

        alpha is (1 - AP50)^2, with the box AP50 of the frozen detector on these images
        (:func:`box_ap50`): where the detector is right already, it is held. The square
        is as in :func:`dsnet_mm.clip.adapter.ratio`. Beside new classes alpha is 1. An
        alpha of the configuration stays.

        Rows of a :class:`.CLIPAdapterBBoxHead` that are 0 become
        :func:`.class_prototypes`.

        Args:
            batches: Training images with annotations.

        Returns:
            alpha, and the labels of the classes that were set.
        """
        from .heads.clip_adapter_bbox_head import class_prototypes

        adapter, detector = self.adapters[0], self.detector
        name, absent = 'roi_head.bbox_head.fc_cls.text_features', []
        if (key := name.replace('.', '/')) in adapter.weights:
            matrix = detector.get_parameter(name)
            if absent := (~matrix.any(1)).nonzero().flatten().tolist():
                rows = class_prototypes(detector, batches)
                adapter.weights[key].up.view_as(matrix)[absent] = rows[absent]
        if adapter.options['alpha'] is None:
            known = 0.0 if absent else box_ap50(detector, batches)
            adapter.alpha.fill_((1 - known) ** 2)
        return float(adapter.alpha), absent

    def train(self, mode: bool = True) -> 'AdaptedDetector':
        """Sets the mode of the adapters, and of what computes losses."""
        super().train(mode)
        # Some detectors and heads of mmdet ask for it. Their layers stay as they are.
        for module in (self.detector, *self.detector.children()):
            module.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> 'AdaptedDetector':
        self.detector._apply(fn)
        return super()._apply(fn, recurse)


def colours(image: Tensor) -> Tensor:
    """Returns the mean and the deviation of each channel of an image of bytes.

    Args:
        image: Image (C, H, W), of values from 0 to 255.

    Returns:
        2 C numbers from 0 to 1.
    """
    pixels = image.flatten(1).float() / 255
    return torch.cat([pixels.mean(1), pixels.std(1, correction=0)])


@torch.no_grad()
def box_ap50(detector: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Computes the box AP at an IoU of 0.5, the mean over the classes of the images.

    Args:
        detector: A detector.
        batches: Images with boxes, as a data loader gives them.

    Returns:
        The AP, from 0 to 1. 0 without a box.
    """
    from mmdet.evaluation.functional.mean_ap import average_precision, tpfp_default
    from mmdet.structures.bbox import get_box_tensor

    images = []
    for batch in batches:
        data = detector.data_preprocessor(batch, False)
        inputs, samples = data['inputs'], data['data_samples']
        for sample in samples:  # mmdet reads it, though nothing is rescaled
            sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        for sample in detector.predict(inputs, samples, rescale=False):
            objects, true = sample.pred_instances, sample.gt_instances
            rows = torch.cat([objects.bboxes, objects.scores[:, None]], 1)
            numbers = rows, objects.labels, get_box_tensor(true.bboxes), true.labels
            images.append([x.cpu().numpy() for x in numbers])
    values = []  # as mmdet's eval_map, which starts processes
    for label in {int(x) for *_, labels in images for x in labels}:
        scores, right, total = [], [], 0
        for rows, found, boxes, labels in images:
            rows, boxes = rows[found == label], boxes[labels == label]
            scores.append(rows[:, 4])
            right.append(tpfp_default(rows, boxes, np.empty((0, 4)))[0][0])
            total += len(boxes)
        order = np.argsort(-np.concatenate(scores), kind='stable')
        count = np.concatenate(right)[order].cumsum()
        precision = count / np.arange(1, len(count) + 1)
        values.append(average_precision(count / total, precision))
    return float(np.mean(values or [0]))


def identity(detector: nn.Module) -> Tensor:
    """Returns the SHA-256 of the weights of a detector, 32 bytes."""
    sha = hashlib.sha256()
    for name, value in sorted(detector.state_dict().items()):
        if not name.endswith('num_batches_tracked'):
            sha.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            sha.update(value.detach().cpu().contiguous().flatten().numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)


def _is_dense(layer: nn.Module) -> bool:
    """Tells whether a weight is a matrix, for each pixel of a kernel."""
    is_layer = isinstance(layer, nn.Linear | nn.Conv2d)
    return is_layer and getattr(layer, 'groups', 1) == 1


def _find(detector: nn.Module, place: str) -> list[str]:
    """Returns the names of the weights at a place."""
    pattern = place
    if place in ('norms', 'lora'):
        fits = is_norm if place == 'norms' else _is_dense
        layers = (re.escape(name) for name, x in detector.named_modules() if fits(x))
        ends = 'weight|bias' if place == 'norms' else 'weight'
        pattern = rf'({"|".join(layers)})\.({ends})'
    names = [name for name, _ in detector.named_parameters()]
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ValueError(f'{place!r} is no regular expression: {error}') from None
    if not found:
        raise ValueError(
            f'{type(detector).__name__} has no weight at {place!r}; a place is lora, '
            f'norms, or a regular expression for names such as {names[0]}'
        )
    return found

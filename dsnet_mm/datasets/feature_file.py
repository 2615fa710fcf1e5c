"""Files of features that were computed elsewhere."""

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.clip.prompts import check_class_names
from dsnet_mm.files import write_atomic

from .features import Features
from .images import PREPROCESSINGS

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types of labels."""


@dataclass(frozen=True)
class FeatureFile:
    """Features of a data set, of training, validation and test images.

    In a file the tensors are named ``text_features``, and ``<part>_features`` and
    ``<part>_labels`` for each part. Features are (N, D), or (V, N, D) with V views, of
    any floating type.

    Attributes:
        text_features: Text features of the classes (K, D), rows of unit norm. Others
            are normalised when a file is read. None for encoders without text.
        class_names: Names by label. In a file: metadata ``class_names``, a JSON list.
        logit_scale: Scale of the cosine similarities. Metadata ``logit_scale``.
        train: Training images by number of shots, part ``train_1``, ``train_2`` and
            so on. Part ``train``, key None, has all training images.
        val: Validation images, part ``val``, if there are any.
        test: Test images, part ``test``.
        plain: Features of training images without augmentation, (1, N, D), by number
            of shots, in the order of ``train``. In a file: ``<part>_plain`` (N, D).
            Cross-validation needs them if ``train`` has augmented views.
        about: Other metadata. ``model`` and, if they are known, ``pretrained``,
            ``identity``, ``preprocessing``, ``prompts`` and ``text_length``, the
            length of text features before they are normalised, describe the encoder.
    """

    text_features: Tensor | None
    class_names: tuple[str, ...]
    logit_scale: float
    train: Mapping[int | None, Features]
    val: Features | None
    test: Features
    plain: Mapping[int | None, Features] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Writes the file, atomically."""
        parts = {_train_part(shots): part for shots, part in self.train.items()}
        parts |= {'test': self.test} | ({} if self.val is None else {'val': self.val})
        text = self.text_features
        tensors = {} if text is None else {'text_features': text}
        for name, part in parts.items():
            one_view = len(part.features) == 1
            views = part.features[0] if one_view else part.features
            tensors |= {f'{name}_features': views, f'{name}_labels': part.labels}
        for shots, part in self.plain.items():
            tensors[f'{_train_part(shots)}_plain'] = part.features[0]
        metadata = {
            **self.about,
            'class_names': json.dumps(list(self.class_names)),
            'logit_scale': repr(self.logit_scale),
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomic(path, save(tensors, metadata))


def _train_part(shots: int | None) -> str:
    return 'train' if shots is None else f'train_{shots}'


def read_feature_file(path: str | Path) -> FeatureFile:
    """Reads features, in float32.

    Args:
        path: Safetensors file with the tensors and metadata of :class:`FeatureFile`.

    Returns:
        The features.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, something is missing, or tensors do not fit
            each other.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no feature file {path}.')
    try:
        with safe_open(path, 'pt') as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path} is not a safetensors file ({error}).') from error
    try:
        return _parse(about, tensors)
    except ValueError as error:
        problem = str(error).removesuffix('.')
        raise ValueError(
            f'{path}: {problem}; docs/clip_adapter.md describes the file.'
        ) from error


def _parse(about: dict[str, str], tensors: Mapping[str, Tensor]) -> FeatureFile:
    class_names = tuple(_json(about, 'class_names', list))
    del about['class_names']
    if len(class_names) < 2:
        raise ValueError(
            f'the metadata class_names must have two classes or more, got '
            f'{list(class_names)}'
        )
    if len(class_names) != 1000:  # ImageNet has duplicate names
        check_class_names(class_names)
    logit_scale = _positive(about, 'logit_scale')
    del about['logit_scale']
    if 'identity' not in about and math.log(10) < logit_scale < math.log(200):
        raise ValueError(
            f'the metadata logit_scale is {logit_scale:g}, which looks like the '
            f'logarithm that CLIP learns; write exp({logit_scale:g}) = '
            f'{math.exp(logit_scale):.4g}'
        )
    if 'text_length' in about:
        _positive(about, 'text_length')
    for name, kind in (('prompts', list), ('identity', dict | None)):
        if name in about:
            _json(about, name, kind)
    if about.get('preprocessing', 'clip') not in PREPROCESSINGS:
        raise ValueError(
            f'the metadata preprocessing must be one of {PREPROCESSINGS}, got '
            f'{about["preprocessing"]!r}'
        )
    if 'test_features' not in tensors:
        raise ValueError('there is no tensor test_features')
    has_text, text_features = 'text_features' in tensors, None
    width = tensors['text_features' if has_text else 'test_features'].shape
    width = (width or (0,))[-1]
    if has_text:
        (text_features,) = _floats(tensors, 'text_features', (len(class_names), width))
        norm = text_features.norm(dim=-1, keepdim=True)
        if (norm - 1).abs().max() > 1e-3:
            text_features = text_features / norm

    test = _labelled(tensors, 'test', class_names, width)
    val = None
    if 'val_features' in tensors:
        val = _labelled(tensors, 'val', class_names, width)
    train, plain = {}, {}
    for name in tensors:
        if not (match := re.fullmatch(r'train(?:_([1-9]\d*))?_features', name)):
            continue
        shots = int(match[1]) if match[1] else None
        part = _train_part(shots)
        train[shots] = _labelled(tensors, part, class_names, width, shots)
        if f'{part}_plain' in tensors:
            labels = train[shots].labels
            views = _floats(tensors, f'{part}_plain', (len(labels), width))
            plain[shots] = Features(views, labels)
    if not train:
        raise ValueError('there is no tensor train_features or train_<shots>_features')
    return FeatureFile(
        text_features, class_names, logit_scale, train, val, test, plain, about
    )


def _positive(about: Mapping[str, str], name: str) -> float:
    """Returns a number above 0 of the metadata."""
    with suppress(ValueError):
        if 0 < (value := float(about.get(name, 'nan'))) < math.inf:
            return value
    raise ValueError(f'the metadata {name} must be a number above 0')


def _json(about: Mapping[str, str], name: str, kind: type) -> object:
    """Returns what an entry of the metadata says in JSON."""
    with suppress(ValueError, RecursionError):
        value = json.loads(about.get(name, ''))
        if isinstance(value, kind) and (
            kind is not list or all(isinstance(x, str) for x in value)
        ):
            return value
    what, given = 'list of text' if kind is list else 'object', about.get(name)
    raise ValueError(
        f'the metadata {name} must be a JSON {what}, got {reprlib.repr(given)}'
    )


def _labelled(
    tensors: Mapping[str, Tensor],
    part: str,
    class_names: Sequence[str],
    width: int,
    shots: int | None = None,
) -> Features:
    """Returns a part of the file. With ``shots`` each class has as many rows."""
    name = f'{part}_labels'
    labels = tensors.get(name)
    if labels is None:
        raise ValueError(f'there is no tensor {name}')
    if labels.dim() != 1 or labels.dtype not in INTEGERS or not len(labels):
        raise ValueError(f'{name} must be one integer a row, and have rows')
    labels, last = labels.long(), len(class_names) - 1
    if labels.min() < 0 or labels.max() > last:
        raise ValueError(
            f'{name} must be from 0 to {last}, got {labels.min()} to {labels.max()}'
        )
    counts = labels.bincount(minlength=last + 1).tolist()
    for cls, count in zip(class_names, counts, strict=True):
        if shots not in (None, count):
            raise ValueError(
                f'{name} has {count} rows of the class {cls!r}, and must have {shots}'
            )
    shape = len(labels), width
    features = _floats(tensors, f'{part}_features', shape, math.inf)
    return Features(features, labels)


def _floats(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int, int],
    views: float = 1,
) -> Tensor:
    """Returns a tensor of this shape in float32, with up to so many views before."""
    if not tensors[name].is_floating_point():
        raise ValueError(
            f'{name} must be of a floating type, got {tensors[name].dtype}; convert '
            f'it to float16 or float32'
        )
    found = tensors[name].float()
    if found.dim() == 2:
        found = found[None]
    if found.dim() != 3 or found.shape[1:] != shape or not 1 <= len(found) <= views:
        raise ValueError(
            f'{name} must be {shape}{", or have views before that" * (views > 1)}, '
            f'got {tuple(tensors[name].shape)}'
        )
    if not found.isfinite().all():
        raise ValueError(f'{name} has values that are not finite')
    norm = found.norm(dim=-1)  # infinite if its square is too large
    bad = ~(norm.isfinite() & (norm > 1e-12)).all(0)
    if bad.any():
        raise ValueError(
            f'{name} has {bad.sum()} rows that are zero or too large, such as row '
            f'{bad.nonzero()[0].item()}; leave them out'
        )
    return found

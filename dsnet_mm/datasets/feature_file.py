"""Files of features that were computed elsewhere."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.files import write_atomic

from .features import Features
from .images import PREPROCESSINGS


@dataclass(frozen=True)
class FeatureFile:
    """Features of a data set, of training, validation and test images.

    In a file the tensors are named ``text_features``, and ``<part>_features`` and
    ``<part>_labels`` for each part. Features are (N, D), or (V, N, D) with V views, of
    any floating type.

    Attributes:
        text_features: Text features of the classes (K, D), rows of unit norm. Others
            are normalised when a file is read.
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
            ``identity``, ``preprocessing`` and ``prompts`` describe the encoder.
    """

    text_features: Tensor
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
        tensors = {'text_features': self.text_features}
        for shots, part in self.plain.items():
            tensors[f'{_train_part(shots)}_plain'] = part.features[0]
        for name, part in parts.items():
            one_view = len(part.features) == 1
            tensors[f'{name}_features'] = (
                part.features[0] if one_view else part.features
            )
            tensors[f'{name}_labels'] = part.labels
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
        return _check(about, tensors)
    except ValueError as error:
        raise ValueError(
            f'{path}: {error}; docs/clip_adapter.md describes the file.'
        ) from error


def _check(about: dict[str, str], tensors: Mapping[str, Tensor]) -> FeatureFile:
    for name in ('class_names', 'logit_scale'):
        if name not in about:
            raise ValueError(f'the metadata have no {name}')
    class_names = _metadata(about.pop('class_names'), 'class_names', list)
    class_names = tuple(map(str, class_names))
    try:
        logit_scale = float(about.pop('logit_scale'))
    except ValueError:
        logit_scale = math.nan
    if not 0 < logit_scale < math.inf:
        raise ValueError('logit_scale must be a number above 0')
    _metadata(about.get('prompts', '[]'), 'prompts', list)
    _metadata(about.get('identity', 'null'), 'identity', dict | None)
    if about.get('preprocessing', 'clip') not in PREPROCESSINGS:
        raise ValueError(
            f'preprocessing must be one of {PREPROCESSINGS}, got '
            f'{about["preprocessing"]!r}'
        )
    if 'text_features' not in tensors:
        raise ValueError('there is no tensor text_features')
    text_features = tensors['text_features'].float()
    if text_features.dim() != 2 or len(text_features) != len(class_names):
        raise ValueError(
            f'text_features must have a row for each of the {len(class_names)} class '
            f'names, got {tuple(text_features.shape)}'
        )
    parts = {}
    for name in tensors:
        if match := re.fullmatch(r'(train|train_[1-9]\d*|val|test)_features', name):
            part = match[1]
            parts[part] = _check_part(part, tensors, text_features.shape)
    if 'test' not in parts:
        raise ValueError('there are no tensors test_features and test_labels')
    test, val = parts.pop('test'), parts.pop('val', None)
    if not parts:
        raise ValueError('there is no tensor train_features or train_<shots>_features')
    if not text_features.isfinite().all() or not text_features.any(dim=-1).all():
        raise ValueError('text_features has rows that are zero or not finite')
    train = {
        None if part == 'train' else int(part.removeprefix('train_')): features
        for part, features in parts.items()
    }
    for shots, part in train.items():
        count = part.labels.bincount(minlength=len(class_names))
        if shots is not None and not (count == shots).all():
            label = int((count != shots).nonzero()[0])
            raise ValueError(
                f'train_{shots}_labels has {int(count[label])} rows of the class '
                f'{class_names[label]!r}, and must have {shots}'
            )
    plain = {
        shots: _check_plain(f'{_train_part(shots)}_plain', tensors, part)
        for shots, part in train.items()
        if f'{_train_part(shots)}_plain' in tensors
    }
    norm = text_features.norm(dim=-1, keepdim=True)
    if (norm - 1).abs().max() > 1e-3:
        text_features = text_features / norm
    return FeatureFile(
        text_features, class_names, logit_scale, train, val, test, plain, about
    )


def _metadata(text: str, name: str, kind: type) -> object:
    """Returns what an entry of the metadata says in JSON."""
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, kind):
            return value
    raise ValueError(
        f'{name} must be a JSON {"list" if kind is list else "object"}, got {text!r}'
    )


def _check_part(
    part: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> Features:
    classes, width = shape
    features = tensors[f'{part}_features']
    labels = tensors.get(f'{part}_labels')
    if labels is None:
        raise ValueError(f'there is no tensor {part}_labels')
    if features.dim() == 2:
        features = features[None]
    if features.dim() != 3 or features.shape[1:] != (len(labels), width):
        raise ValueError(
            f'{part}_features must be ({len(labels)}, {width}), as {part}_labels and '
            f'text_features are, or have views before that, got '
            f'{tuple(tensors[f"{part}_features"].shape)}'
        )
    if labels.dim() != 1 or labels.dtype.is_floating_point:
        raise ValueError(f'{part}_labels must be one integer a row')
    if not len(labels):
        raise ValueError(f'{part}_features has no rows')
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f'{part}_labels must be from 0 to {classes - 1}, got '
            f'{labels.min().item()} to {labels.max().item()}'
        )
    features = features.float()
    if not features.isfinite().all():
        raise ValueError(f'{part}_features has values that are not finite')
    return Features(features, labels)


def _check_plain(name: str, tensors: Mapping[str, Tensor], train: Features) -> Features:
    features, shape = tensors[name].float(), train.features.shape[1:]
    if features.shape != shape or not features.isfinite().all():
        raise ValueError(
            f'{name} must be {tuple(shape)}, as the training features are, and finite, '
            f'got {tuple(features.shape)}'
        )
    return Features(features[None], train.labels)

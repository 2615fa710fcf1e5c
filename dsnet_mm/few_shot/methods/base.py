"""Training data and description of a few-shot method."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets.features import Features


@dataclass(frozen=True)
class FewShotData:
    """Training data of a method.

    Attributes:
        train: Features of the training images, with augmented views.
        shots: Training images of each class.
        text_features: Text features of the classes (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        class_names: Names by label.
        encoder: The encoder, for methods that learn the input of its text tower.
        plain: Features of the training images, prepared as test images are, without
            augmentation. None if they are not needed.
        seed: Seed of the initialisation, the order of images and their views.
    """

    train: Features
    shots: int
    text_features: Tensor
    logit_scale: float
    class_names: tuple[str, ...]
    encoder: OpenCLIPEncoder | None = None
    seed: int = 0
    plain: Features | None = None

    def subset(self, index: Tensor, shots: int) -> 'FewShotData':
        """Returns the data with a part of the training images."""
        plain = None if self.plain is None else self.plain.take(index)
        return replace(self, train=self.train.take(index), plain=plain, shots=shots)


@dataclass(frozen=True)
class Method:
    """A few-shot method.

    Attributes:
        title: Name in tables.
        fit: Function from data and hyper-parameters to a classifier of image
            features.
        defaults: Hyper-parameters if nothing is selected.
        grid: Values to select from. Each combination is fitted.
        late_grid: Values to select from for attributes of a fitted classifier.
        source: Where the defaults come from.
        needs_encoder: Whether ``fit`` uses ``FewShotData.encoder``.
    """

    title: str
    fit: Callable[..., nn.Module]
    defaults: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    late_grid: Mapping[str, Sequence] = field(default_factory=dict)
    source: str = ''
    needs_encoder: bool = False

    @property
    def options(self) -> set[str]:
        """Names of all hyper-parameters."""
        names = {*self.defaults, *self.grid, *self.late_grid}
        arguments = inspect.signature(self.fit).parameters.values()
        names |= {a.name for a in arguments if a.kind is a.KEYWORD_ONLY}
        if any(a.kind is a.VAR_KEYWORD for a in arguments):
            from .training import train

            trained = inspect.signature(train).parameters.values()
            names |= {a.name for a in trained if a.kind is a.KEYWORD_ONLY}
        return names


def num_learnt(model: nn.Module) -> int:
    """Returns the number of parameters that a fit has learnt."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return getattr(model, 'num_learnt', count)


def mean_features(train: Features) -> Tensor:
    """Normalises features, averages them over views, and normalises again, (N, D)."""
    return F.normalize(F.normalize(train.features, dim=-1).mean(0), dim=-1)

"""Zero-shot CLIP, and the classifiers of methods that learn text features."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dsnet_mm.clip.adapter import zero_shot_logits

from .base import (
    FewShotData,
    num_learnt,
    prototypes,
    register_classifier,
    register_method,
)
from .training import train


@register_classifier('text_features', 'logit_scale')
class CosineClassifier(nn.Module):
    """Cosine classifier of zero-shot CLIP and of methods that learn text features.

    Args:
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
    """

    def __init__(self, text_features: Tensor, logit_scale: float | Tensor) -> None:
        super().__init__()
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return zero_shot_logits(image_features, self.text_features, self.logit_scale)


@register_method('zero_shot', CosineClassifier, 'Zero-shot CLIP')
def fit_zero_shot(data: FewShotData) -> CosineClassifier:
    """Returns zero-shot CLIP."""
    return CosineClassifier(data.text_features, data.logit_scale)


@register_method('prototypes', CosineClassifier, 'Prototypes', crop_scale=(0.5, 1.0))
def fit_prototypes(data: FewShotData) -> CosineClassifier:
    """Returns the classifier by the nearest class mean, without text."""
    found = prototypes(data.train, len(data.class_names))
    return CosineClassifier(found, data.logit_scale)


class TextLearner(nn.Module, ABC):
    """A model that learns text features."""

    def __init__(self, logit_scale: float) -> None:
        super().__init__()
        self.logit_scale = logit_scale

    @abstractmethod
    def classifier(self) -> Tensor:
        """Text features (K, D), rows of unit norm."""

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return zero_shot_logits(image_features, self.classifier(), self.logit_scale)

    def fit(self, data: FewShotData, **recipe: object) -> CosineClassifier:
        """Trains the model by :func:`train`, and folds it into a cosine classifier."""
        train(self, data, **recipe)
        with torch.no_grad():
            folded = CosineClassifier(self.classifier(), data.logit_scale)
        folded.num_learnt = num_learnt(self)
        return folded

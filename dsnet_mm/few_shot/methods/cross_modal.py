"""Cross-modal linear probe (arXiv 2301.06267)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, register_method
from .linear_probe import LinearClassifier
from .training import RECIPE, train


class ScaledLinear(nn.Module):
    """A linear layer (K, D) without bias on normalised features, times a scale."""

    def __init__(self, weight: Tensor, logit_scale: float) -> None:
        super().__init__()
        self.weight, self.logit_scale = nn.Parameter(weight.clone()), logit_scale

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        return self.logit_scale * F.linear(f, self.weight)


@register_method(
    'cross_modal',
    LinearClassifier,
    'Cross-modal linear probe',
    defaults=dict(RECIPE, lr=1e-3, iterations=12800, batch_size=8, text_batches=True),
    grid=dict(lr=(1e-3, 1e-4)),
    source='its code: 12,800 batches, half of each is text; without early stopping '
    'and warm-up, with 2 instead of 12 settings searched',
    crop_scale=(0.5, 1.0),
)
def fit_cross_modal(data: FewShotData, **recipe: object) -> LinearClassifier:
    """Trains a linear probe on images and on text features as samples.

    ::

        logits = logit_scale w f,   w = T at the start

    f is the feature of an image or of a class name. Half of each batch are text
    features (``text_batches`` of :func:`train`).

    Source: ``train.py``, ``engine/model/head.py`` and ``engine/optimizer/default.py``
    of github.com/linzhiqiu/cross_modal_adaptation. There each prompt of a class is a
    sample, and the last step is replaced by that with the best validation accuracy.
    """
    model = ScaledLinear(data.text_features, data.logit_scale)
    train(model, data, **recipe)
    with torch.no_grad():
        return LinearClassifier(data.logit_scale * model.weight)

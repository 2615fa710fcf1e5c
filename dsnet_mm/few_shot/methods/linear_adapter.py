"""Regularised linear adapter of ProLIP (arXiv 2410.05270)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData, register_classifier, register_method
from .training import RECIPE, train


@register_classifier('text_features', 'logit_scale')
class LinearAdapter(nn.Module):
    """A linear map of image features that is kept close to the identity.

    ::

        logits = logit_scale cos(A f, T),   A = I at the start
        loss = cross-entropy + weight |A - I|^2

    Args:
        text_features: Text features T (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        weight: Weight of the penalty.
    """

    def __init__(
        self, text_features: Tensor, logit_scale: float | Tensor, weight: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())
        self.matrix = nn.Parameter(torch.eye(text_features.shape[1]).to(text_features))
        self.weight = weight

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.linear(image_features, self.matrix)
        return zero_shot_logits(f, self.text_features, self.logit_scale)

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, and the squared distance of the matrix from the identity."""
        identity = torch.eye(len(self.matrix)).to(self.matrix)
        penalty = self.weight * (self.matrix - identity).square().sum()
        return F.cross_entropy(self(image_features), labels) + penalty


@register_method(
    'linear_adapter',
    LinearAdapter,
    'Regularised linear adapter',
    defaults=dict(
        RECIPE,
        optimizer='Adam',
        lr=1e-4,
        eps=1e-4,
        epochs=300,
        batch_size=None,
        weight_decay=0.0,
        penalty=None,
    ),
    grid=dict(lr=(1e-3, 1e-4)),
    source='code of ProLIP: penalty 1 / shots; there more learning rates and the '
    'penalty are searched',
    crop_scale=(0.5, 1.0),
)
def fit_linear_adapter(
    data: FewShotData, *, penalty: float | None, **recipe: object
) -> LinearAdapter:
    """Trains the regularised linear adapter.

    Source: ``methods/RegLinearAdapter.py`` of github.com/astra-vision/ProLIP. There
    all images of a step have the same view. Here the views are random.
    A penalty of None is 1 / shots, as in the paper without validation images.
    """
    weight = 1 / data.shots if penalty is None else penalty
    model = LinearAdapter(data.text_features, data.logit_scale, weight)
    return train(model, data, **recipe)

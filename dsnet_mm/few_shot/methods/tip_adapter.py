"""Tip-Adapter and Tip-Adapter-F (arXiv 2207.09519)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, register_classifier, register_method
from .training import RECIPE, train

_GRID = dict(
    alpha=(0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
    beta=(0.1, 0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0),
)


@register_classifier('keys', 'labels', 'text_features', 'logit_scale')
class TipAdapter(nn.Module):
    """Zero-shot CLIP and a key-value cache (Tip-Adapter, arXiv 2207.09519).

    Args:
        keys: Features of the training images (N, D), rows of unit norm.
        labels: Labels of the training images (N,).
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        alpha: Weight of the cache.
        beta: Sharpness of the affinity exp(-beta (1 - cos)).
    """

    def __init__(
        self,
        keys: Tensor,
        labels: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer('keys', keys.detach().clone())
        self.register_buffer('labels', labels.clone())
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())
        self.alpha, self.beta = alpha, beta

    @property
    def options(self) -> dict[str, float]:
        """Arguments that are not tensors."""
        return {'alpha': self.alpha, 'beta': self.beta}

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        affinity = torch.exp(self.beta * (f @ self.keys.t() - 1))
        cache = f.new_zeros(f.shape[0], len(self.text_features))
        cache = cache.index_add(1, self.labels, affinity)
        return self.logit_scale * f @ self.text_features.t() + self.alpha * cache


@register_method(
    'tip_adapter',
    TipAdapter,
    'Tip-Adapter',
    defaults=dict(alpha=1.0, beta=1.0),
    grid=_GRID,
    after_fit=('alpha', 'beta'),
    source='its code, where alpha and beta start at 1 to 5 by data set, and the search '
    'has 4,000 values up to 30',
    crop_scale=(0.5, 1.0),
)
def fit_tip_adapter(data: FewShotData, *, alpha: float, beta: float) -> TipAdapter:
    """Builds Tip-Adapter, which is not trained."""
    keys = F.normalize(data.train.features.mean(0), dim=-1)
    labels, text, scale = data.train.labels, data.text_features, data.logit_scale
    return TipAdapter(keys, labels, text, scale, alpha, beta)


@register_method(
    'tip_adapter_f',
    TipAdapter,
    'Tip-Adapter-F',
    defaults=dict(RECIPE, alpha=1.0, beta=1.0, lr=1e-3, eps=1e-4, epochs=20),
    grid=dict(epochs=(20, 100), **_GRID),
    after_fit=('alpha', 'beta'),
    source='as Tip-Adapter, with cached views instead of fresh crops; it trains '
    '100 epochs on EuroSAT',
    crop_scale=(0.5, 1.0),
)
def fit_tip_adapter_f(
    data: FewShotData, *, alpha: float, beta: float, **recipe: object
) -> TipAdapter:
    """Trains the keys of Tip-Adapter (Tip-Adapter-F)."""
    model = fit_tip_adapter(data, alpha=alpha, beta=beta)
    keys = nn.Parameter(model.keys)
    del model.keys
    model.keys = keys
    return train(model, data, **recipe)

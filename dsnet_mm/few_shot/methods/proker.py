"""ProKeR (arXiv 2501.11175)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData, mean_features, register_classifier, register_method
from .training import ByShots, by_shots


@register_classifier('keys', 'values', 'text_features', 'logit_scale')
class ProKeR(nn.Module):
    """Zero-shot CLIP plus a function of a kernel's space.

    ::

        logits = logit_scale (T f + values^T k(keys, f)),
        k(x, y) = exp(-beta (1 - x y))

    The source has the same logits without the scale.

    Args:
        keys: Features of the training images (N, D), rows of unit norm.
        values: Coefficients (N, K).
        text_features: Text features T (K, D), rows of unit norm.
        logit_scale: Scale of the logits.
        beta: Sharpness of the kernel.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        beta: float,
    ) -> None:
        super().__init__()
        self.register_buffer('keys', keys.detach().clone())
        self.register_buffer('values', values.detach().clone())
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())
        self.beta = beta

    @property
    def options(self) -> dict[str, float]:
        """Arguments that are not tensors."""
        return {'beta': self.beta}

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        residual = self.logit_scale * kernel(f, self.keys, self.beta) @ self.values
        return zero_shot_logits(f, self.text_features, self.logit_scale) + residual


def kernel(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """Gaussian kernel of rows of unit norm (N, D) and (M, D), (N, M)."""
    return torch.exp(-beta * (1 - x @ y.t()))


@register_method(
    'proker',
    ProKeR,
    'ProKeR',
    defaults=dict(
        beta={1: 3.0, 2: 2.6, 4: 1.5, 8: 1.66, 16: 1.7},
        lmbda={1: 0.05, 8: 0.07, 16: 0.1},
    ),
    grid=dict(beta=(0.5, 1.0, 2.0, 4.0), lmbda=(0.01, 0.03, 0.1, 0.3, 1.0)),
    source='its code, with averaged views and a shorter search; beta and lmbda by '
    'shots are those it takes from ImageNet and RN50',
    crop_scale=(0.5, 1.0),
)
@torch.no_grad()
def fit_proker(data: FewShotData, *, beta: ByShots, lmbda: ByShots) -> ProKeR:
    """Solves the proximal kernel ridge regression of ProKeR.

    ::

        (k(keys, keys) / lmbda + I) values = Y - F T^T

    Y are the labels as unit vectors, F the features of the training images. With a
    large lmbda the values are small, so the result is close to zero-shot CLIP.

    Source: ``trainers/proker.py``, the authors' code as in
    github.com/omarnust/BReg-Adapter. There each view is a key. Here views are averaged.
    """
    beta = by_shots('beta', beta, data.shots)
    lmbda = by_shots('lmbda', lmbda, data.shots)
    keys, t = mean_features(data.train), data.text_features
    target = F.one_hot(data.train.labels, len(t)) - keys @ t.t()
    system = kernel(keys, keys, beta) / lmbda + torch.eye(len(keys), dtype=keys.dtype)
    values = torch.linalg.solve(system, target)
    return ProKeR(keys, values, t, data.logit_scale, beta)

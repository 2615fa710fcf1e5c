"""Gaussian discriminant analysis with zero-shot CLIP (arXiv 2402.04087)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FewShotData, register_method
from .linear_probe import LinearClassifier
from .lp_plus_plus import class_means


@register_method(
    'gda',
    LinearClassifier,
    'GDA',
    defaults=dict(alpha=0.01),
    grid=dict(alpha=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)),
    source='its code; it has no fixed alpha, 0.01 is ours',
)
@torch.no_grad()
def fit_gda(data: FewShotData, *, alpha: float) -> LinearClassifier:
    """Fits the closed form of GDA and adds it to zero-shot CLIP.

    ::

        logits = logit_scale T f + alpha (W f + b)
        W = M S,  b_k = -log K - mu_k S mu_k / 2

    M has the class means mu_k as rows, and S is the inverse of the covariance that all
    classes share, see :func:`inverse_covariance`. All views count as samples. With one
    sample for each class S is zero, and the result is zero-shot CLIP.

    Source: ``run`` in ``main_few_shots.py`` of github.com/mrflogs/ICLR24.
    """
    views, _, width = data.train.features.shape
    f = F.normalize(data.train.features, dim=-1).reshape(-1, width)
    labels = data.train.labels.repeat(views)
    means = class_means(f, labels)
    weight = means @ inverse_covariance(f - means[labels])
    bias = -0.5 * (weight * means).sum(-1)  # log K is the same for all classes
    weight = data.logit_scale * data.text_features + alpha * weight
    return LinearClassifier(weight, alpha * bias)


def inverse_covariance(centred: Tensor) -> Tensor:
    """Estimates an inverse covariance (D, D) from few centred samples (N, D).

    This is the empirical Bayes ridge-type estimator of Kubokawa and Srivastava,
    D ((N - 1) C + tr(C) I)^+, where C is the empirical covariance.
    """
    count, width = centred.shape
    covariance = centred.t().cov()
    ridge = covariance.trace() * torch.eye(width, dtype=centred.dtype)
    total = (count - 1) * covariance + ridge
    return width * torch.linalg.pinv(total, hermitian=True)

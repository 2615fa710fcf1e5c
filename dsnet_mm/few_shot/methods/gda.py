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
    defaults=dict(alpha=0.5),
    grid=dict(alpha=(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)),
    source='its code; there alpha is absolute and always searched',
    crop_scale=(0.5, 1.0),
)
@torch.no_grad()
def fit_gda(data: FewShotData, *, alpha: float) -> LinearClassifier:
    """Fits the closed form of GDA and adds it to zero-shot CLIP.

    ::

        logits = z + alpha spread(z) / spread(g) g
        z = logit_scale T f
        g = W f + b,  W = M S,  b_k = -log K - mu_k S mu_k / 2

    M has the class means mu_k as rows, and S is the inverse of the covariance that all
    classes share, see :func:`inverse_covariance`. All views count as samples. With one
    sample for each class S is zero, and the result is zero-shot CLIP.

    Source: ``run`` in ``main_few_shots.py`` of github.com/mrflogs/ICLR24. There the
    factor of g is one of seven powers of ten, chosen on validation images. But S, and
    with it g, falls with the number of samples, of which each view is one. So here the
    factor is relative: the spreads are standard deviations over the classes, mean over
    the training samples.
    """
    views, _, width = data.train.features.shape
    f = F.normalize(data.train.features, dim=-1).reshape(-1, width)
    labels = data.train.labels.repeat(views)
    means = class_means(f, labels)
    weight = means @ inverse_covariance(f - means[labels])
    bias = -0.5 * (weight * means).sum(-1)  # log K is the same for all classes
    text = data.logit_scale * data.text_features

    def spread(logits: Tensor) -> Tensor:
        return logits.std(1, correction=0).mean().clamp(min=1e-12)

    factor = alpha * spread(f @ text.t()) / spread(F.linear(f, weight, bias))
    return LinearClassifier(text + factor * weight, factor * bias)


def inverse_covariance(centred: Tensor) -> Tensor:
    """Estimates an inverse covariance (D, D) from few centred samples (N, D).

    This is the empirical Bayes ridge-type estimator of Kubokawa and Srivastava up to a
    factor, ((N - 1) C + tr(C) I)^+, where C is the empirical covariance.
    """
    count, width = centred.shape
    covariance = centred.t().cov()
    ridge = covariance.trace() * torch.eye(width, dtype=centred.dtype)
    total = (count - 1) * covariance + ridge
    return torch.linalg.pinv(total, hermitian=True)

"""ZS-LP and CLAP (arXiv 2312.12730)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData
from .training import train
from .zero_shot import fold_text_features, zero_shot_logits


class Prototypes(nn.Module):
    r"""Cosine classifier with learnt prototypes, which start as the text features.

    ::

        logits = logit_scale * cos(f, P)
        loss = cross-entropy + mean_k multiplier_k |P_k - length T_k|^2

    Source: ``AdapterMethod`` and ``forward_lp`` in ``trainers/adapters.py`` of
    github.com/jusiro/CLAP. There the prototypes start as what the text tower returns,
    before it is normalised. A longer start has the effect of a smaller learning rate.

    Args:
        text_features: Text features T (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        multipliers: Weights of the distances (K,), zeros for ZS-LP.
        length: Length of the prototypes at the start.
    """

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float,
        multipliers: Tensor,
        length: float,
    ) -> None:
        super().__init__()
        self.start, self.logit_scale = length * text_features, logit_scale
        self.multipliers = multipliers
        self.prototypes = nn.Parameter(self.start.clone())

    def classifier(self) -> Tensor:
        """Prototypes (K, D), normalised."""
        return F.normalize(self.prototypes, dim=-1)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return zero_shot_logits(image_features, self.classifier(), self.logit_scale)

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, and the distance to the text features weighted by class."""
        distance = (self.prototypes - self.start).square().sum(-1)
        penalty = (self.multipliers * distance).mean()
        return F.cross_entropy(self(image_features), labels) + penalty


def fit_linear_probe_zs(data: FewShotData, *, length: float, **recipe) -> nn.Module:
    """Trains ZS-LP: prototypes that start as the text features, with multipliers 0."""
    multipliers = data.text_features.new_zeros(len(data.text_features))
    model = Prototypes(data.text_features, data.logit_scale, multipliers, length)
    return fold_text_features(train(model, data, **recipe), data)


def fit_clap(data: FewShotData, *, length: float, **recipe) -> nn.Module:
    """Trains CLAP: ZS-LP that is kept close to the text features.

    The multiplier of a class is the mean probability that zero-shot CLIP gives it on
    its own training images (``init_lagrangian_multipliers`` of the source).
    """
    multipliers = zero_shot_confidence(data)
    model = Prototypes(data.text_features, data.logit_scale, multipliers, length)
    return fold_text_features(train(model, data, **recipe), data)


@torch.no_grad()
def zero_shot_confidence(data: FewShotData) -> Tensor:
    """Computes the zero-shot probability of the true class, mean by class, (K,).

    All views are used.
    """
    labels = data.train.labels
    total = data.text_features.new_zeros(len(data.text_features))
    for view in data.train.features:
        logits = zero_shot_logits(view, data.text_features, data.logit_scale)
        right = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
        total.index_add_(0, labels, right)
    count = labels.bincount(minlength=len(total)) * len(data.train.features)
    return total / count.clamp(min=1)

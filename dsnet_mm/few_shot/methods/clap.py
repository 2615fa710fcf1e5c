"""ZS-LP and CLAP (arXiv 2312.12730)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData, register_method
from .lp_plus_plus import class_means
from .training import RECIPE
from .zero_shot import CosineClassifier, TextLearner

_DEFAULTS = dict(
    RECIPE,
    optimizer='SGD',
    lr=0.1,
    epochs=300,
    weight_decay=0.0,
    warmup_epochs=1,
    decay_by='epoch',
    drop_last=True,
)


class Prototypes(TextLearner):
    r"""Cosine classifier with learnt prototypes, which start as the text features.

    ::

        logits = logit_scale * cos(f, P)
        loss = cross-entropy + mean_k multiplier_k |P_k - text_length T_k|^2

    Source: ``AdapterMethod`` and ``forward_lp`` in ``trainers/adapters.py`` of
    github.com/jusiro/CLAP. The prototypes start as what the text tower returns, before
    it is normalised.
    """

    def __init__(self, data: FewShotData, multipliers: Tensor) -> None:
        super().__init__(data.logit_scale)
        self.start = data.text_length * data.text_features
        self.multipliers = multipliers
        self.prototypes = nn.Parameter(self.start.clone())

    def classifier(self) -> Tensor:
        return F.normalize(self.prototypes, dim=-1)

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, and the distance to the text features weighted by class."""
        distance = (self.prototypes - self.start).square().sum(-1)
        penalty = (self.multipliers * distance).mean()
        return F.cross_entropy(self(image_features), labels) + penalty


@register_method(
    'linear_probe_zs',
    CosineClassifier,
    'ZS-LP',
    defaults=_DEFAULTS,
    source='code of CLAP, with 10 views instead of 20',
)
def fit_linear_probe_zs(data: FewShotData, **recipe: object) -> CosineClassifier:
    """Trains ZS-LP: prototypes that start as the text features, with multipliers 0."""
    zeros = data.text_features.new_zeros(len(data.text_features))
    return Prototypes(data, zeros).fit(data, **recipe)


@register_method(
    'clap',
    CosineClassifier,
    'CLAP',
    defaults=_DEFAULTS,
    source='as ZS-LP',
)
def fit_clap(data: FewShotData, **recipe: object) -> CosineClassifier:
    """Trains CLAP: ZS-LP that is kept close to the text features.

    The multiplier of a class is the mean probability that zero-shot CLIP gives it on
    its own training images (``init_lagrangian_multipliers`` of the source).
    """
    return Prototypes(data, zero_shot_confidence(data)).fit(data, **recipe)


@torch.no_grad()
def zero_shot_confidence(data: FewShotData) -> Tensor:
    """Computes the zero-shot probability of the true class, mean by class, (K,).

    All views are used.
    """
    labels, right = data.train.labels, 0
    for view in data.train.features:
        logits = zero_shot_logits(view, data.text_features, data.logit_scale)
        right += logits.softmax(-1).gather(1, labels[:, None])
    return class_means(right / len(data.train.features), labels)[:, 0]

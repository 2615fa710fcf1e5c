"""TaskRes (arXiv 2211.10277)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, register_method
from .training import RECIPE
from .zero_shot import CosineClassifier, TextLearner


class TaskResidual(TextLearner):
    """Text features before they are normalised, plus alpha times a residual (K, D).

    Source: ``trainers/taskres.py`` of github.com/geekyutao/TaskRes.
    """

    def __init__(self, data: FewShotData, alpha: float) -> None:
        super().__init__(data.logit_scale)
        self.start, self.alpha = data.text_length * data.text_features, alpha
        self.residual = nn.Parameter(torch.zeros_like(data.text_features))

    def classifier(self) -> Tensor:
        return F.normalize(self.start + self.alpha * self.residual, dim=-1)


@register_method(
    'task_res',
    CosineClassifier,
    'TaskRes',
    defaults=dict(
        RECIPE,
        alpha=0.5,
        optimizer='Adam',
        lr=2e-3,
        epochs={1: 100, 8: 200},
        weight_decay=5e-4,
        drop_last=True,
        warmup_epochs=1,
        decay_by='epoch',
    ),
    grid=dict(lr=(2e-3, 2e-4)),
    source='its code; there the learning rate is 2e-4 on ImageNet, and alpha is 1 on '
    'Flowers102',
)
def fit_task_res(
    data: FewShotData, *, alpha: float, **recipe: object
) -> CosineClassifier:
    """Trains TaskRes."""
    return TaskResidual(data, alpha).fit(data, **recipe)

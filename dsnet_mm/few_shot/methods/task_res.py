"""TaskRes (arXiv 2211.10277)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData
from .training import train
from .zero_shot import fold_text_features


class TaskResidual(nn.Module):
    """Text features plus a learnt residual.

    Args:
        text_features: Text features (K, D), rows of length 1.
        logit_scale: Factor of the cosine.
        alpha: Weight of the residual.
    """

    def __init__(self, text_features: Tensor, logit_scale: float, alpha: float) -> None:
        super().__init__()
        self.text_features, self.logit_scale, self.alpha = (
            text_features,
            logit_scale,
            alpha,
        )
        self.residual = nn.Parameter(torch.zeros_like(text_features))

    def classifier(self) -> Tensor:
        """Adapted text features (K, D), rows of length 1."""
        return F.normalize(self.text_features + self.alpha * self.residual, dim=-1)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        return self.logit_scale * f @ self.classifier().t()


def fit_task_res(data: FewShotData, *, alpha: float, **recipe) -> nn.Module:
    """Train TaskRes and fold it into a cosine classifier."""
    model = train(
        TaskResidual(data.text_features, data.logit_scale, alpha), data, **recipe
    )
    return fold_text_features(model, data)

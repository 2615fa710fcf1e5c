"""Zero-shot CLIP."""

import torch
from torch import Tensor, nn

from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData, num_learnt


class CosineClassifier(nn.Module):
    """Cosine classifier of zero-shot CLIP and of methods that learn text features.

    Args:
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
    """

    def __init__(self, text_features: Tensor, logit_scale: float | Tensor) -> None:
        super().__init__()
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return zero_shot_logits(image_features, self.text_features, self.logit_scale)


def fit_zero_shot(data: FewShotData) -> nn.Module:
    """Returns zero-shot CLIP."""
    return CosineClassifier(data.text_features, data.logit_scale)


@torch.no_grad()
def fold_text_features(model: nn.Module, data: FewShotData) -> CosineClassifier:
    """Turns a model that learnt text features into a cosine classifier.

    Args:
        model: Model with ``classifier()``, which returns text features (K, D).
        data: Data that it was fitted to.

    Returns:
        Classifier with these text features, and the model's number of learnt
        parameters.
    """
    folded = CosineClassifier(model.classifier(), data.logit_scale)
    folded.num_learnt = num_learnt(model)
    return folded

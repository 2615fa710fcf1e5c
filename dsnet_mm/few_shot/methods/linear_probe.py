"""Linear probe on image features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData, mean_features, register_classifier, register_method


@register_classifier('weight')
class LinearClassifier(nn.Module):
    """A linear layer on normalised image features.

    Args:
        weight: Weight (K, D).
        bias: Bias (K,), None for zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(
            weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        )

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return F.linear(F.normalize(image_features, dim=-1), self.weight, self.bias)


@register_method(
    'linear_probe',
    LinearClassifier,
    'Linear probe',
    defaults=dict(weight_decay=None),
    grid=dict(weight_decay=(1e-6, 1e-4, 1e-3, 1e-2)),
    source='L-BFGS as in CLIP and CoOp, which search more values; 1 / N^2 is ours',
    crop_scale=(0.5, 1.0),
)
def fit_linear_probe(
    data: FewShotData, *, weight_decay: float | None
) -> LinearClassifier:
    """Fits a logistic regression by L-BFGS, from zero weights. Views are averaged.

    ``weight_decay`` is the factor of half the squared norm of the weights. None is
    1 / N^2 with N training images.
    """
    features = mean_features(data.train)
    classes, width = data.text_features.shape
    if weight_decay is None:
        weight_decay = len(features) ** -2
    model = LinearClassifier(features.new_zeros(classes, width))
    optim = torch.optim.LBFGS(
        model.parameters(), max_iter=200, line_search_fn='strong_wolfe'
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = F.cross_entropy(model(features), data.train.labels)
        loss = loss + 0.5 * weight_decay * model.weight.square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    return model.eval()

"""CLIP-Adapter (arXiv 2110.04544)."""

import torch
from torch import nn

from dsnet_mm.models.heads import CLIPAdapter

from .base import FewShotData
from .training import train


def fit_clip_adapter(
    data: FewShotData,
    *,
    preset: str = 'paper',
    visual: bool = True,
    text: bool = False,
    alpha: float | None = None,
    learn_ratio: bool = False,
    **recipe,
) -> nn.Module:
    """Trains CLIP-Adapter.

    Args:
        data: Training data.
        preset: See :class:`CLIPAdapter`.
        visual: Whether image features are adapted.
        text: Whether text features are adapted.
        alpha: Weight of both adapters.
        learn_ratio: Whether the weights are learnt.
        **recipe: Arguments of :func:`train`.

    Returns:
        The adapter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        adapter = CLIPAdapter(
            data.text_features,
            data.logit_scale,
            preset,
            visual=visual,
            text=text,
            alpha=alpha,
            beta=0.2 if alpha is None else alpha,
            learn_ratio=learn_ratio,
        )
    return train(adapter, data, **recipe)

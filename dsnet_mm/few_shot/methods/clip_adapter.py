"""CLIP-Adapter (arXiv 2110.04544), and its ratio from held-out images (HOSO)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData
from .training import train


def fit_clip_adapter(
    data: FewShotData,
    *,
    preset: str = 'paper',
    visual: bool = True,
    text: bool = False,
    alpha: float | None = None,
    beta: float | None = None,
    learn_ratio: bool = False,
    keep: float = 0.0,
    **recipe,
) -> nn.Module:
    """Trains CLIP-Adapter.

    Args:
        data: Training data.
        preset: See :class:`CLIPAdapter`.
        visual: Whether image features are adapted.
        text: Whether text features are adapted.
        alpha: Weight of the visual adapter.
        beta: Weight of the text adapter. None is alpha.
        learn_ratio: Whether the weights are learnt.
        keep: See :class:`KeptAdapter`.
        **recipe: Arguments of :func:`train`.

    Returns:
        The adapter.
    """
    if beta is None:
        beta = 0.2 if alpha is None else alpha
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        adapter = CLIPAdapter(
            data.text_features,
            data.logit_scale,
            preset,
            visual=visual,
            text=text,
            alpha=alpha,
            beta=beta,
            learn_ratio=learn_ratio,
        )
    train(KeptAdapter(adapter, keep) if keep else adapter, data, **recipe)
    return adapter.eval()


class KeptAdapter(nn.Module):
    """An adapter that is kept close to zero-shot CLIP where that is right.

    ::

        loss = cross-entropy + keep * distance

    See :meth:`CLIPAdapter.logits_and_distance`.

    Args:
        adapter: The adapter.
        keep: Weight of the distance.
    """

    def __init__(self, adapter: CLIPAdapter, keep: float) -> None:
        super().__init__()
        self.adapter, self.keep = adapter, keep

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Loss of features (N, D) and labels (N,)."""
        logits, distance = self.adapter.logits_and_distance(image_features, labels)
        return F.cross_entropy(logits, labels) + self.keep * distance


class HoldOneShotOut(nn.Module):
    """A visual adapter, and its ratio that is learnt on other images.

    The adapter gets no gradient from the held-out images, and the ratio none from the
    training images. Its learning rate is ten times that of the adapter.

    Args:
        adapter: The adapter, with its initial ratio.
        held_out: Features (K, D) of an image of each class.
        labels: Their labels (K,).
    """

    def __init__(self, adapter: CLIPAdapter, held_out: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.adapter, self.held_out, self.labels = adapter, held_out, labels
        self.ratio = nn.Parameter(torch.logit(torch.tensor(adapter.alpha)))
        self.ratio.lr_factor = 10.0

    def logits(self, f: Tensor, adapted: Tensor, alpha: Tensor) -> Tensor:
        """Logits (N, K) of features and adapted features (N, D)."""
        f = alpha * adapted + (1 - alpha) * f
        return zero_shot_logits(f, self.adapter.text_features, self.adapter.logit_scale)

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Two cross-entropies: the adapter's, and the ratio's."""
        network, alpha = self.adapter.visual_adapter, self.ratio.sigmoid()
        learn_adapter = self.logits(
            image_features, network(image_features), alpha.detach()
        )
        learn_ratio = self.logits(self.held_out, network(self.held_out).detach(), alpha)
        return F.cross_entropy(learn_adapter, labels) + F.cross_entropy(
            learn_ratio, self.labels
        )


def fit_hoso(data: FewShotData, *, alpha: float, **recipe) -> nn.Module:
    """Trains CLIP-Adapter, with alpha learnt on one held-out image of each class.

    After the abstract of arXiv 2603.04341 (HOSO-Adapter), which names the held-out shot
    and that both trainings are decoupled. Its code is not published. Parametrisation,
    learning rates and initial value are ours. With one shot there is nothing to hold
    out, and alpha is fixed.

    Args:
        data: Training data.
        alpha: Weight of the adapter at the start.
        **recipe: Arguments of :func:`train`.

    Returns:
        The adapter.
    """
    if data.shots == 1:
        return fit_clip_adapter(data, alpha=alpha, **recipe)
    labels = data.train.labels
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(data.seed)
    )
    held_out = torch.stack([order[labels[order] == k][0] for k in labels.unique()])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    part = data.subset(rest.nonzero()[:, 0], data.shots - 1)

    def build(ratio: float) -> CLIPAdapter:
        return CLIPAdapter(data.text_features, data.logit_scale, alpha=ratio)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        start = build(alpha)
    held = data.train.take(held_out)
    model = train(HoldOneShotOut(start, held.features[0], held.labels), part, **recipe)
    adapter = build(model.ratio.sigmoid().item())
    adapter.load_state_dict(start.state_dict())
    return adapter.eval()

"""CLIP-Adapter (arXiv 2110.04544), and its ratio from held-out images (HOSO)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.clip.adapter import zero_shot_logits

from .base import FewShotData, mean_features, register_classifier, register_method
from .training import COOP, RECIPE, train

register_classifier('text_features', 'logit_scale')(CLIPAdapter)


_PAPER = dict(
    RECIPE,
    preset='paper',
    visual=True,
    text=False,
    alpha=0.2,
    beta=None,
    learn_ratio=False,
    keep=None,
)
_OURS = dict(_PAPER, preset='default', lr=1e-3, iterations=200)
_KEEP = dict(keep=(5.0, 20.0, 80.0))

COPIES = {
    'clip_adapter_clap': 'lr=0.1 epochs=300 batch_size=256 weight_decay=0',
    'clip_adapter_lp++': 'preset=lp++ alpha=0.5 lr=0.01 momentum=0 epochs=300 '
    'drop_last=False warmup_epochs=0 decay_by=iteration weight_decay=0',
    'clip_adapter_prolip': 'alpha=0.9 optimizer=Adam lr=0.001 eps=0.0001 epochs=300 '
    'batch_size=None warmup_epochs=0 decay_by=iteration weight_decay=0',
    'clip_adapter_cross_modal': 'preset=cross_modal optimizer=AdamW lr=0.0001 '
    'epochs=None iterations=12800 batch_size=8 text_batches=True warmup_epochs=0 '
    'decay_by=iteration weight_decay=0.001',
}
"""The copies of CLIP-Adapter in four repositories: their old names as methods, and what
they change in ``clip_adapter_released``."""


def fit_clip_adapter(
    data: FewShotData,
    *,
    preset: str,
    visual: bool,
    text: bool,
    alpha: float | None,
    beta: float | None,
    learn_ratio: bool,
    keep: float | None,
    **recipe: object,
) -> CLIPAdapter:
    """Trains CLIP-Adapter.

    ``recipe`` are the arguments of :func:`train`, and the others are those of
    :class:`CLIPAdapter`. If ``beta`` is None it is alpha.
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
            keep=keep,
        )
    adapter.start(mean_features(data.train), data.train.labels)
    return train(adapter, data, **recipe)


register_method(
    'clip_adapter',
    CLIPAdapter,
    'CLIP-Adapter',
    crop_scale=(0.5, 1.0),
    defaults=_OURS,
    grid=dict(alpha=(0.2, 0.5), **_KEEP),
    source='adapter of the paper; class weights, loss and recipe are ours',
)(fit_clip_adapter)


class HoldOneShotOut(nn.Module):
    """A visual adapter, and its ratio that is learnt on other images.

    The adapter gets no gradient from the held-out images, and the ratio none from the
    training images. Its learning rate is ten times that of the adapter.
    ``held_out`` are the features (K, D) of an image of each class.
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


@register_method(
    'clip_adapter_hoso',
    CLIPAdapter,
    'CLIP-Adapter (HOSO)',
    defaults=dict(RECIPE, alpha=0.2, lr=1e-3, iterations=200),
    source='abstract of its paper; the details and the recipe are ours',
)
def fit_hoso(data: FewShotData, *, alpha: float, **recipe: object) -> CLIPAdapter:
    """Trains CLIP-Adapter, with alpha learnt on one held-out image of each class.

    After the abstract of arXiv 2603.04341 (HOSO-Adapter), which names the held-out shot
    and that both trainings are decoupled. Its code is not published. Parametrisation,
    learning rates and initial value are ours. With one shot there is nothing to hold
    out, and alpha is fixed.
    """
    if data.shots == 1:
        return fit_clip_adapter(data, **{**_PAPER, **recipe, 'alpha': alpha})
    labels = data.train.labels
    order = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(data.seed)
    )
    held_out = torch.stack([order[labels[order] == k][0] for k in labels.unique()])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[held_out] = False
    part = data.subset(rest.nonzero()[:, 0], data.shots - 1)

    def build(ratio: float) -> CLIPAdapter:
        return CLIPAdapter(data.text_features, data.logit_scale, 'paper', alpha=ratio)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        start = build(alpha)
    held = data.train.take(held_out)
    model = train(HoldOneShotOut(start, held.features[0], held.labels), part, **recipe)
    adapter = build(model.ratio.sigmoid().item())
    adapter.load_state_dict(start.state_dict())
    return adapter.eval()


register_method(
    'clip_adapter_learnt',
    CLIPAdapter,
    'CLIP-Adapter, learnt ratio',
    crop_scale=(0.5, 1.0),
    defaults=dict(_OURS, learn_ratio=True),
    grid=_KEEP,
    source='adapter of the paper, with a learnt scalar ratio and our recipe',
)(fit_clip_adapter)
register_method(
    'clip_adapter_text',
    CLIPAdapter,
    'CLIP-Adapter, text',
    crop_scale=(0.5, 1.0),
    defaults=dict(_OURS, visual=False, text=True, keep=20.0),
    grid=_KEEP,
    source='text adapter of the paper, with our recipe',
)(fit_clip_adapter)
register_method(
    'clip_adapter_both',
    CLIPAdapter,
    'CLIP-Adapter, visual and text',
    crop_scale=(0.5, 1.0),
    defaults=dict(_OURS, beta=0.2, text=True),
    grid=dict(beta=(0.2, 0.6), **_KEEP),
    source='both adapters of the paper, with our recipe',
)(fit_clip_adapter)
register_method(
    'clip_adapter_paper',
    CLIPAdapter,
    'CLIP-Adapter (paper)',
    defaults={**_PAPER, **COOP, 'lr': 1e-5},
    grid=dict(alpha=(0.2, 0.6)),
    source='text of the paper: recipe of CoOp with learning rate 1e-5; on ImageNet '
    'CoOp has 50 epochs',
)(fit_clip_adapter)
register_method(
    'clip_adapter_released',
    CLIPAdapter,
    'CLIP-Adapter (released)',
    defaults={**_PAPER, **COOP, 'preset': 'released'},
    source='released code, with the commands of CoOp and alpha 0.2; on ImageNet '
    'CoOp has 50 epochs',
)(fit_clip_adapter)

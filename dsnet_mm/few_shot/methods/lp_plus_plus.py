"""LP++ (arXiv 2404.02285)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FewShotData, mean_features, register_method
from .linear_probe import LinearClassifier


@register_method(
    'lp++',
    LinearClassifier,
    'LP++',
    defaults=dict(iterations=300, momentum=0.9, alpha_every=10),
    source='its code, but with the last step, not the best, and averaged views',
    crop_scale=(0.5, 1.0),
)
def fit_lp_plus_plus(
    data: FewShotData, *, iterations: int, momentum: float, alpha_every: int
) -> LinearClassifier:
    r"""Trains LP++: a linear layer plus zero-shot logits with a factor for each class.

    ::

        logits_k = w_k f + b_k + alpha_k t_k f

        w_k = sum of the features of class k              at the start
        alpha_k = 250 mean_k' mean_{i of class k'} t_k' f_i
        step of w, b: 4 N / (largest eigenvalue of F^T F)
        step of alpha: N / (4 max_k sum_i (t_k f_i)^2)

    Source: ``methods/linear_probe_p2.py`` of
    github.com/FereshteShakeri/FewShot-CLIP-Strong-Baseline, also for these details: all
    images are one batch, and alpha moves at each tenth step by the sum of its
    gradients since the start. The repository reports the test accuracy of the step
    with the best validation accuracy. Here the last step counts, b
    starts as 0, and views are averaged.
    """
    f, labels, t = mean_features(data.train), data.train.labels, data.text_features
    text_logits = f @ t.t()
    weight = torch.zeros_like(t).index_add(0, labels, f).requires_grad_()
    bias = t.new_zeros(len(t)).requires_grad_()
    start = 250 * class_means(text_logits.gather(1, labels[:, None]), labels).mean()
    alpha = start.repeat(len(t)).requires_grad_()
    lr = 4 * len(f) / torch.linalg.eigvalsh(f.t() @ f)[-1].item()
    alpha_lr = len(f) / (4 * text_logits.square().sum(0).max().item())
    optim = torch.optim.SGD([weight, bias], lr, momentum)
    for step in range(iterations):
        logits = F.linear(f, weight, bias) + alpha * text_logits
        optim.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optim.step()
        if (step + 1) % alpha_every == 0:
            with torch.no_grad():
                alpha -= alpha_lr * alpha.grad  # never set to zero
    return LinearClassifier(weight + alpha[:, None] * t, bias)


def class_means(rows: Tensor, labels: Tensor) -> Tensor:
    """Averages rows (N, D) by class, (K, D). All classes must occur."""
    count = labels.bincount()
    total = rows.new_zeros(len(count), rows.shape[1]).index_add(0, labels, rows)
    return total / count[:, None]

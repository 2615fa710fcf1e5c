"""Training loop of the methods that use gradient descent."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .base import FewShotData


def coop_epochs(shots: int) -> int:
    """Returns CoOp's number of epochs. On ImageNet CoOp always has 50 epochs."""
    return 50 if shots == 1 else 100 if shots <= 4 else 200


def train(
    model: nn.Module,
    data: FewShotData,
    *,
    optimizer: str = 'AdamW',
    lr: float,
    epochs: int | str,
    batch_size: int | None = 256,
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    warmup_epochs: int = 0,
    decay_by: str = 'iteration',
) -> nn.Module:
    """Minimises the cross-entropy over all parameters that require a gradient.

    In each epoch each picture is used once, with a random view. The learning rate
    decays from ``lr`` to 0 by a cosine. ``data.seed`` determines the order and views.

    Args:
        model: Classifier of image features (N, D) with logits (N, K).
        data: Training data.
        optimizer: ``'SGD'`` (momentum 0.9), ``'Adam'`` or ``'AdamW'``.
        lr: Learning rate.
        epochs: Number of epochs, or ``'coop'`` for :func:`coop_epochs`.
        batch_size: Batch size, None for all pictures.
        weight_decay: Weight decay.
        eps: Constant of Adam and AdamW.
        warmup_epochs: Number of epochs at the start with a learning rate of 1e-5.
        decay_by: Whether the learning rate changes each ``'iteration'`` or
            ``'epoch'``.

    Returns:
        The model, in eval mode.
    """
    if epochs == 'coop':
        epochs = coop_epochs(data.shots)
    features, labels = data.train.features, data.train.labels
    views, count, _ = features.shape
    batch_size = min(batch_size or count, count)
    steps = -(-count // batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer == 'SGD':
        optim = torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay)
    else:
        kind = {'Adam': torch.optim.Adam, 'AdamW': torch.optim.AdamW}[optimizer]
        optim = kind(parameters, lr, eps=eps, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(data.seed)
    model.train()
    with _bfloat16_products():
        for epoch in range(epochs):
            order = torch.randperm(count, generator=generator)
            view = torch.randint(views, (count,), generator=generator)
            for step, index in enumerate(order.split(batch_size)):
                done = epoch + (step / steps if decay_by == 'iteration' else 0)
                now = lr * 0.5 * (1 + math.cos(math.pi * done / epochs))
                for group in optim.param_groups:
                    group['lr'] = 1e-5 if epoch < warmup_epochs else now
                logits = model(features[view[index], index])
                optim.zero_grad()
                F.cross_entropy(logits, labels[index]).backward()
                optim.step()
    return model.eval()


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiplies matrices in bfloat16 with float32 sums, on CPUs that support it.

    The cosine similarities then have about three correct digits.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)

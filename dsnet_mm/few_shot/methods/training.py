"""Training loop of the methods that use gradient descent."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FewShotData

RECIPE = dict(
    optimizer='AdamW',
    epochs=None,
    iterations=None,
    batch_size=256,
    drop_last=False,
    text_batches=False,
    weight_decay=0.01,
    momentum=0.9,
    beta2=0.999,
    eps=1e-8,
    warmup_epochs=0,
    decay_by='iteration',
)
"""Arguments of :func:`train` for methods that do not set them. ``lr`` is always set."""

COOP = dict(
    RECIPE,
    optimizer='SGD',
    lr=0.002,
    epochs={1: 50, 2: 100, 8: 200},
    batch_size=32,
    drop_last=True,
    weight_decay=5e-4,
    warmup_epochs=1,
    decay_by='epoch',
)
"""Recipe of CoOp. On ImageNet CoOp always has 50 epochs."""


ByShots = float | Mapping[int | str, float]


def by_shots(name: str, value: ByShots, shots: int) -> float:
    """Returns the value of an option, given as such or by shots.

    With ``{1: 50, 8: 200}`` it is 50 for 1 to 7 shots. JSON makes the keys strings.
    """
    if isinstance(value, int | float):
        return value
    numbers = {}
    if isinstance(value, Mapping):
        numbers = {int(k): v for k, v in value.items() if int(k) <= shots}
    if not numbers:
        raise ValueError(
            f'{name} must be a number, or numbers by shots from 1 on such as '
            f'{{1: 50, 8: 200}}, got {value!r}.'
        )
    return numbers[max(numbers)]


def train(
    model: nn.Module,
    data: FewShotData,
    *,
    optimizer: str,
    lr: float,
    epochs: ByShots | None,
    iterations: int | None,
    batch_size: int | None,
    drop_last: bool,
    text_batches: bool,
    weight_decay: float,
    momentum: float,
    beta2: float,
    eps: float,
    warmup_epochs: float,
    decay_by: str,
) -> nn.Module:
    """Minimises the cross-entropy over all parameters that require a gradient.

    A model with a method ``loss`` has its own loss. In each epoch each image is used
    once, with a random view. After the warm-up the learning rate decays from ``lr`` by
    a cosine, which is 0 after as many steps as there are in all, as in Dassl. It is
    multiplied by the ``lr_factor`` of a parameter that has one. ``data.seed``
    determines the order and views.

    Args:
        model: Classifier of image features (N, D) with logits (N, K). Its ``loss``, if
            it has one, takes features (N, D) and labels (N,).
        data: Training data.
        optimizer: ``'SGD'``, ``'Adam'`` or ``'AdamW'``.
        lr: Learning rate.
        epochs: Number of epochs, see :func:`by_shots`.
        iterations: Number of batches, instead of epochs. One of the two is None.
        batch_size: Batch size, None for all images.
        drop_last: Whether an epoch ends before a batch that is not full.
        text_batches: Whether the other half of each batch are text features.
        weight_decay: Weight decay.
        momentum: Momentum of SGD.
        beta2: Second decay rate of Adam and AdamW.
        eps: Constant of Adam and AdamW.
        warmup_epochs: Number of epochs at the start with a learning rate of 1e-5.
        decay_by: Whether the learning rate changes each ``'iteration'`` or
            ``'epoch'``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If both epochs and iterations are given, or neither, a number is
            too small, or a name is unknown.
    """
    if (epochs is None) == (iterations is None):
        raise ValueError(
            f'epochs={epochs} and iterations={iterations}: exactly one of them must be '
            f'None.'
        )
    for name, value, known in (
        ('optimizer', optimizer, ('SGD', 'Adam', 'AdamW')),
        ('decay_by', decay_by, ('iteration', 'epoch')),
    ):
        if value not in known:
            raise ValueError(f'{name} must be one of {known}, got {value!r}.')
    count = len(data.train)
    size = count if batch_size is None else batch_size
    if text_batches:
        size //= 2
    if size < 1:
        raise ValueError(
            f'batch_size must be None or at least {2 if text_batches else 1}, got '
            f'{batch_size}.'
        )
    size = min(size, count)
    steps = count // size if drop_last else -(-count // size)  # of an epoch
    total = iterations
    if total is None:
        total = int(by_shots('epochs', epochs, data.shots) * steps)
    if total < 0:
        raise ValueError(f'the number of steps must be at least 0, got {total}.')
    parameters = [
        {'params': [p], 'lr_factor': getattr(p, 'lr_factor', 1.0)}
        for p in model.parameters()
        if p.requires_grad
    ]
    own = {'momentum': momentum}
    if optimizer != 'SGD':
        own = {'betas': (0.9, beta2), 'eps': eps}
    optim = getattr(torch.optim, optimizer)(
        parameters, lr, weight_decay=weight_decay, fused=True, **own
    )
    batches = _batches(data, size, steps, text_batches)
    warmup = warmup_epochs * steps
    model.train()
    for step in range(total):
        done = step if decay_by == 'iteration' else step // steps * steps
        now = lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / total))
        for group in optim.param_groups:
            group['lr'] = 1e-5 if step < warmup else now * group['lr_factor']
        features, labels = next(batches)
        if hasattr(model, 'loss'):
            loss = model.loss(features, labels)
        else:
            loss = F.cross_entropy(model(features), labels)
        optim.zero_grad()
        loss.backward()
        optim.step()
    return model.eval()


def _batches(
    data: FewShotData, size: int, steps: int, text: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of features and labels without end."""
    generator = torch.Generator().manual_seed(data.seed)
    views, count, _ = data.train.features.shape
    classes = len(data.text_features)
    prompts = _orders(classes, min(size, classes), generator)
    while True:
        order = torch.randperm(count, generator=generator)
        view = torch.randint(views, (count,), generator=generator)
        for index in order[: steps * size].split(size):
            features = data.train.features[view[index], index]
            labels = data.train.labels[index]
            if text:
                prompt = next(prompts)
                features = torch.cat([features, data.text_features[prompt]])
                labels = torch.cat([labels, prompt])
            yield features, labels


def _orders(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(size)

"""Selection of hyper-parameters, without the test split."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsnet_mm.datasets.features import Features

from .evaluation import evaluate
from .methods import FewShotData, Method

SELECTIONS = ('val', 'cv', 'fixed')
"""``'val'``: on the few-shot validation set of CoOp, min(shots, 4) images a class.
``'cv'``: by cross-validation within the training images; those held out are prepared
as test images are. ``'fixed'``: the defaults of the method."""


@dataclass(frozen=True)
class Fit:
    """A fitted classifier and how it was selected.

    Attributes:
        classifier: Features (N, D) to logits (N, K).
        options: Its hyper-parameters.
        selection: How the hyper-parameters were chosen: one of ``SELECTIONS``, or
            ``'oracle'``.
        val_accuracy: Validation accuracy in percent, or None. It is also known of a
            method with nothing to search, to compare it with others.
        val_loss: The same for the cross-entropy.
        tried: Number of combinations tried.
        fit_seconds: Time of the final fit alone.
        select_seconds: Time of selection and fit.
    """

    classifier: nn.Module
    options: dict
    selection: str
    val_accuracy: float | None
    val_loss: float | None
    tried: int
    fit_seconds: float
    select_seconds: float


def select(
    method: Method,
    data: FewShotData,
    val: Features | None,
    selection: str = 'val',
    overrides: dict | None = None,
) -> Fit:
    """Selects hyper-parameters and fits.

    The values with the best validation accuracy are selected, and of equal ones those
    with the lowest loss. No classifier is validated on images that it was fitted to.
    Without validation images (``val`` is empty, or ``'cv'`` has one shot) the
    defaults of the method are used. Then, and if there is nothing to search, the
    selection of the result is ``'fixed'``.

    Args:
        method: The method.
        data: Training data.
        val: Validation features. Those of an oracle are from the test split.
        selection: One of ``SELECTIONS``, or ``'oracle'``, which takes ``val`` too.
        overrides: Hyper-parameters that are set instead of selected.

    Raises:
        ValueError: If ``selection`` is unknown.
    """
    if selection not in (*SELECTIONS, 'oracle'):
        raise ValueError(f'selection must be one of {SELECTIONS}, got {selection!r}.')
    started = time.perf_counter()
    given = overrides or {}
    searched = {k: v for k, v in method.grid.items() if k not in given}
    late = _combinations(
        {k: searched.pop(k) for k in method.after_fit if k in searched}
    )
    early = _combinations(searched)
    folds = min(data.shots, 4)
    if selection == 'cv' and folds > 1:
        rounds = list(_folds(data, folds))
    elif selection in ('val', 'oracle') and val is not None and len(val):
        rounds = [(data, val)]
    else:
        rounds = []
    kept: dict[int, tuple[nn.Module, float]] = {}
    scores: dict[tuple[int, int], tuple[float, float]] = {}
    for i, options in enumerate(early if rounds else []):
        for part, held_out in rounds:
            begun = time.perf_counter()
            classifier = method.fit(part, **given, **options)
            if selection != 'cv':
                kept[i] = classifier, time.perf_counter() - begun
            for j, attributes in enumerate(late):
                score = evaluate(_with(classifier, attributes), held_out)
                accuracy, loss = scores.get((i, j), (0.0, 0.0))
                scores[i, j] = (
                    accuracy + score.accuracy / len(rounds),
                    loss - score.loss / len(rounds),
                )
    options, attributes, score = {}, {}, None
    if scores:
        i, j = max(scores, key=lambda key: (round(scores[key][0], 6), scores[key][1]))
        options, attributes, score = early[i], late[j], scores[i, j]
    if scores and i in kept:
        classifier, fit_seconds = kept[i]
    else:
        begun = time.perf_counter()
        classifier = method.fit(data, **given, **options)
        fit_seconds = time.perf_counter() - begun
    return Fit(
        _with(classifier, attributes),
        {**method.defaults, **given, **options, **attributes},
        selection if rounds and len(early) * len(late) > 1 else 'fixed',
        score and score[0],
        score and -score[1],
        max(len(scores), 1),
        fit_seconds,
        time.perf_counter() - started,
    )


def _combinations(grid: Mapping[str, Sequence]) -> list[dict]:
    return [
        dict(zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]


def _with(classifier: nn.Module, attributes: dict) -> nn.Module:
    for name, value in attributes.items():
        setattr(classifier, name, value)
    return classifier


def _folds(data: FewShotData, count: int) -> Iterator[tuple[FewShotData, Features]]:
    """Yields training data and held-out features, balanced over classes."""
    labels = data.train.labels
    # An image that is the only one of its class is never held out.
    position = torch.full_like(labels, -1)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        if len(members) > 1:
            position[members] = torch.arange(len(members))
    for fold in range(count):
        held_out = (position % count == fold) & (position >= 0)
        shots = int((~held_out).sum() / len(data.class_names))
        part = data.subset((~held_out).nonzero()[:, 0], max(shots, 1))
        plain = data.train if data.plain is None else data.plain
        yield part, plain.take(held_out.nonzero()[:, 0])

"""Temperature, prediction sets and rejection, from images that did not fit.

Sources: temperature scaling, arXiv 1706.04599; split conformal prediction with the
score 1 - p of the true class, arXiv 2107.07511, section 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from dsnet_mm.datasets.features import Features

from .methods import FewShotData, Method
from .selection import _folds

ENOUGH = 200
"""Held-out images after which no further fold is fitted."""

KEPT = 0.95
"""Share of the held-out images that rejection keeps."""

SOFTER = 4.0
"""Temperature of :func:`confidence` over that of the probabilities."""


@dataclass(frozen=True)
class Calibration:
    """What images that did not fit a classifier say of its probabilities.

    Attributes:
        source: ``'held_out'``: images that did not fit the classifier, such as
            validation images. ``'folds'``: training images, each by a classifier
            that was fitted to the other folds. None: there were none.
        temperature: What logits are divided by before the softmax.
        threshold: Least :func:`confidence` of an image of a known class, or None.
        scores: 1 - p of the true class for each of these images, sorted.
    """

    source: str | None = None
    temperature: float = 1.0
    threshold: float | None = None
    scores: tuple[float, ...] = ()

    @classmethod
    def read(cls, about: Mapping[str, object]) -> 'Calibration':
        """Returns that of the description in a classifier file.

        Raises:
            ValueError: If it is damaged.
        """
        found = about.get('calibration') or {}
        try:
            made = cls(**{**found, 'scores': tuple(found.get('scores', ()))})
            values = (made.temperature, made.threshold or 0.0, *made.scores)
            good = made.temperature > 0 and all(map(math.isfinite, values))
        except (AttributeError, TypeError) as error:
            raise ValueError(f'its calibration is damaged ({error})') from error
        if not good:
            raise ValueError('its calibration has no finite numbers above 0')
        return made

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turns logits (N, K) into probabilities (N, K)."""
        return (logits / self.temperature).softmax(-1)

    def rejects(self, probabilities: Tensor) -> Tensor:
        """Tells for each image (N,) of probabilities (N, K) if it is of no class.

        Raises:
            ValueError: If the classifier is not calibrated.
        """
        self._check()
        return confidence(probabilities) < self.threshold

    def sets(self, probabilities: Tensor, coverage: float) -> Tensor:
        """Returns which classes (N, K) are in the prediction set of each image.

        A set has the true class with the probability ``coverage`` if the images are
        drawn as the held-out ones were. It can be empty.

        Args:
            probabilities: Probabilities (N, K).
            coverage: Wanted share of images whose set has the true class.

        Raises:
            ValueError: If the classifier is not calibrated, ``coverage`` is not between
                0 and 1, or there are too few held-out images for it.
        """
        self._check()
        if not 0 < coverage < 1:
            raise ValueError(f'coverage must be above 0 and below 1, got {coverage}.')
        count = len(self.scores)
        rank = math.ceil(round((count + 1) * coverage, 9))
        if rank > count:
            raise ValueError(
                f'a coverage of {coverage} needs at least '
                f'{math.ceil(round(coverage / (1 - coverage), 9))} held-out images, '
                f'but the classifier has {count}; choose a lower coverage.'
            )
        return 1 - probabilities <= self.scores[rank - 1]

    def describe(self) -> str:
        """Returns a sentence on where it comes from."""
        count = len(self.scores)
        if self.source == 'folds':
            return (
                f'Calibrated by cross-validation on {count} shots: coverage is '
                f'approximate, because the classifier was fitted to them afterwards.'
            )
        return f'Split conformal calibration on {count} held-out images.'

    def _check(self) -> None:
        if not self.scores:
            raise ValueError(
                'the classifier is not calibrated: its file is of an earlier version, '
                'or it was fitted to one image of a class without validation images; '
                'fit it again with two or more.'
            )


def confidence(probabilities: Tensor, softer: float = SOFTER) -> Tensor:
    """Returns the largest softmax (N,) at a higher temperature, of that of (N, K).

    With factor 4 it tells images of unknown classes better than the largest
    probability, logit or energy do. The factor was chosen on validation images of
    Caltech101, by ``tools/evidence/uncertainty.py``.
    """
    root = probabilities ** (1 / softer)
    return root.amax(-1) / root.sum(-1)


def calibrate(
    method: Method,
    data: FewShotData,
    held_out: Features | None,
    classifier: nn.Module,
    options: Mapping[str, object],
) -> Calibration:
    """Calibrates a classifier without test images.

    Without ``held_out`` it costs up to min(n, 4) more fits, n being the images of
    the smallest class; no more than are needed for ``ENOUGH`` images.

    Args:
        method: The method.
        data: Its training data.
        held_out: Images that did not fit the classifier, or None for folds of the
            training images.
        classifier: What the method returned.
        options: All hyper-parameters of that fit.
    """
    if held_out is not None and len(held_out):
        source, pairs = 'held_out', [(_logits(classifier, held_out), held_out.labels)]
    else:
        source, pairs = 'folds', []
        sizes = data.train.labels.bincount(minlength=len(data.class_names))
        folds = min(int(sizes.min()), 4)
        for part, rest in _folds(data, folds) if folds > 1 else ():
            pairs.append((_logits(method.fit(part, **options), rest), rest.labels))
            if sum(len(labels) for _, labels in pairs) >= ENOUGH:
                break
    if not pairs:
        return Calibration()
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    temperature = fit_temperature(logits, labels)
    p = (logits / temperature).softmax(-1)
    known = confidence(p).sort().values
    lost = max(0, int((len(labels) + 1) * (1 - KEPT)) - 1)
    scores = (1 - p[torch.arange(len(labels)), labels]).sort().values
    # Rounded to the side that covers more.
    scores = tuple(math.ceil(1e6 * score) / 1e6 for score in scores.tolist())
    return Calibration(source, temperature, known[lost].item(), scores)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature with the least cross-entropy.

    The term (log T)² / 2 keeps it near 1 if there are few images.

    Args:
        logits: Logits (N, K) of images that did not fit the classifier.
        labels: Their labels (N,).
    """

    def loss(log: float) -> float:
        entropy = F.cross_entropy(logits / math.exp(log), labels, reduction='sum')
        return entropy.item() + log**2 / 2

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method='bounded').x)


@torch.no_grad()
def _logits(classifier: nn.Module, data: Features) -> Tensor:
    return torch.cat([classifier(f).float() for f in data.features[0].split(1024)])

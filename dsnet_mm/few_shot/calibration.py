"""Temperature, prediction sets and rejection, from images that did not fit.

Sources: temperature scaling, arXiv 1706.04599; split conformal prediction with the
score 1 - p of the true class, arXiv 2107.07511, section 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from dsnet_mm.datasets.features import Features

from .methods import FewShotData
from .selection import _folds

ENOUGH = 200
"""Held-out images after which no further fold is fitted."""

KEPT = 0.95
"""Share of the held-out images that rejection keeps."""


@dataclass(frozen=True)
class Calibration:
    """What images that did not fit a classifier say of its probabilities.

    Attributes:
        source: ``'held_out'``: such images, as those of val. ``'folds'``: each training
            image, with a classifier of the other folds. None: there were none.
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
            if min(made.temperature, *map(math.isfinite, values)) > 0:
                return made
            raise TypeError('a value is 0 or not finite')
        except (AttributeError, TypeError) as error:
            raise ValueError(f'its calibration is wrong: {error}') from error

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turns logits (N, K) into probabilities (N, K)."""
        return (logits / self.temperature).softmax(-1)

    def rejects(self, probabilities: Tensor) -> Tensor:
        """Tells which images (N,) of probabilities (N, K) are of none of the classes.

        Raises:
            ValueError: If the classifier is not calibrated.
        """
        return confidence(probabilities) < self._checked().threshold

    def sets(self, probabilities: Tensor, coverage: float) -> Tensor:
        """Returns which classes (N, K) are in the prediction sets of images.

        The share ``coverage`` of the sets has the true class if images and held-out
        images are drawn alike. A set can be empty.

        Raises:
            ValueError: If the classifier is not calibrated, ``coverage`` is not between
                0 and 1, or there were too few held-out images for it.
        """
        if not 0 < coverage < 1:
            raise ValueError(f'coverage must be above 0 and below 1, got {coverage}.')
        count = len(self._checked().scores)
        if (rank := _ceil((count + 1) * coverage)) > count:
            raise ValueError(
                f'a coverage of {coverage} needs {_ceil(coverage / (1 - coverage))} '
                f'held-out images, but there were {count}; choose a lower coverage.'
            )
        return 1 - probabilities <= self.scores[rank - 1]

    def describe(self) -> str:
        """Returns a sentence on where it comes from."""
        if self.source == 'held_out':
            return f'Split conformal calibration on {len(self.scores)} held-out images.'
        return (
            f'Calibrated by cross-validation on {len(self.scores)} shots, to which the '
            f'classifier was fitted afterwards: coverage is approximate.'
        )

    def _checked(self) -> 'Calibration':
        if self.source is None:
            raise ValueError(
                'the classifier is not calibrated: its file is old, or it has one '
                'image of a class and no validation images; fit it again, to more.'
            )
        return self


def _ceil(value: float) -> int:
    return math.ceil(round(value, 9))  # 0.9 / (1 - 0.9) is above 9


def confidence(probabilities: Tensor, softer: float = 4.0) -> Tensor:
    """Returns the largest softmax (N,) at a higher temperature than that of (N, K).

    The factor was chosen on validation images, by ``tools/evidence/uncertainty.py``.
    """
    root = probabilities ** (1 / softer)
    return root.amax(-1) / root.sum(-1)


def calibrate(
    fit: Callable[[FewShotData], nn.Module],
    data: FewShotData,
    held_out: Features | None,
    classifier: nn.Module,
) -> Calibration:
    """Calibrates a classifier without test images.

    Args:
        fit: What fits such a classifier. It is called for folds only.
        data: Training data. Images of classes with one image are in no fold.
        held_out: Images that did not fit the classifier. None takes folds of the
            training images, at the cost of at most four more fits.
        classifier: What ``fit`` returns for all data.
    """
    source, pairs = 'held_out', []
    if held_out is not None and len(held_out):
        pairs.append((_logits(classifier, held_out), held_out.labels))
    else:
        sizes = data.train.labels.bincount(minlength=len(data.class_names))
        source, folds = 'folds', min(int(sizes.max()), 4)
        for part, rest in _folds(data, folds) if folds > 1 else ():
            pairs.append((_logits(fit(part), rest), rest.labels))
            if sum(len(labels) for _, labels in pairs) >= ENOUGH:
                break
    if not pairs:
        return Calibration()
    logits, labels = map(torch.cat, zip(*pairs, strict=True))
    temperature = fit_temperature(logits, labels)
    p = (logits / temperature).softmax(-1)
    lost = max(1, int((len(labels) + 1) * (1 - KEPT)))
    threshold = confidence(p).sort().values[lost - 1].item()
    scores = (1 - p.gather(1, labels[:, None])[:, 0]).sort().values.tolist()
    scores = tuple(math.ceil(1e6 * score) / 1e6 for score in scores)  # covers more
    return Calibration(source, temperature, threshold, scores)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature with the least cross-entropy of (N, K) and labels (N,).

    The term (log T)² / 2 keeps it near 1 if there are few images.
    """

    def loss(log: float) -> float:
        entropy = F.cross_entropy(logits / math.exp(log), labels, reduction='sum')
        return entropy.item() + log**2 / 2

    return math.exp(minimize_scalar(loss, bounds=(-4, 4), method='bounded').x)


@torch.no_grad()
def _logits(classifier: nn.Module, data: Features) -> Tensor:
    return torch.cat([classifier(f).float() for f in data.features[0].split(1024)])

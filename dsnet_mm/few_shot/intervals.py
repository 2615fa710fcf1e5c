"""Confidence intervals of the difference of two methods."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Difference:
    """Difference in points: mean, half of the 95 % interval, two-sided p-value.

    ``half`` and ``p`` are NaN if they are unknown.
    """

    mean: float
    half: float = math.nan
    p: float = math.nan

    @property
    def sign(self) -> int:
        """1 or -1 if the interval does not contain 0, else 0."""
        return int(self.mean > self.half) - int(-self.mean > self.half)

    def __str__(self) -> str:
        return f'{self.mean:+.2f}' + f' ± {self.half:.2f}' * (not math.isnan(self.half))


def difference(gaps: np.ndarray, overlap: float) -> Difference:
    """Estimates the difference of two methods for new draws and new test images.

    The variance is the sum of that between draws and that between images, with
    Student's t and the degrees of freedom of Welch and Satterthwaite. One won and one
    lost image are added, because few images may decide (Bonett and Price, J. Educ.
    Behav. Stat. 37, 2012). Draws from a small pool are correlated, by not more than
    their overlap (Hoeffding, Ann. Math. Stat. 19, 1948); the factor is that of Nadeau
    and Bengio (Machine Learning 52, 2003). If nothing was redrawn, the interval holds
    for these training images alone.

    Args:
        gaps: 1 where only the first method is right, -1 where only the second is, else
            0; draws x test images (S, N).
        overlap: Share of the training images that two draws have in common, 0 to 1.
    """
    count = len(gaps)
    by_image = np.append(gaps.mean(0), (1, -1))
    images = by_image.var(ddof=1) / len(by_image)
    draws = gaps.mean(1).var(ddof=1) if count > 1 else 0.0
    draws *= 1 / count + (overlap / (1 - overlap) if overlap < 1 else 0)
    freedom = (images + draws) ** 2 / (
        images**2 / (len(by_image) - 1) + draws**2 / max(count - 1, 1)
    )
    mean, error = gaps.mean(), math.sqrt(images + draws)
    half = stats.t.ppf(0.975, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    return Difference(100 * float(mean), 100 * float(half), float(p))


def holm(p_values: list[float]) -> list[float]:
    """Corrects p-values for their number (Holm, Scand. J. Statist. 6, 1979).

    NaN is no comparison. The corrected values are at most 1.
    """
    p = np.array(p_values, dtype=float)
    order, count = p.argsort(), np.isfinite(p).sum()  # NaN is last
    steps = p[order] * (count - np.arange(len(p)))
    p[order] = np.maximum.accumulate(steps).clip(max=1)
    return p.tolist()

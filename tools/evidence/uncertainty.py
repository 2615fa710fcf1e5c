"""Measures calibration, prediction sets and rejection on files of CLIP features.

    python -m tools.evidence.uncertainty FOLDER results/few_shot/uncertainty.csv

FOLDER has ``caltech101.safetensors`` and ``imagenet.safetensors``. For rejection half
of the classes, drawn anew with each seed, are hidden from the classifier.
"""

import csv
import io
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import betabinom, rankdata
from torch import Tensor

from dsnet_mm.datasets.feature_file import FeatureFile, read_feature_file
from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot.calibration import calibrate, confidence
from dsnet_mm.few_shot.evaluation import calibration_error
from dsnet_mm.few_shot.methods import METHODS, FewShotData
from dsnet_mm.files import write_atomic

NAMES = ('zero_shot', 'clip_adapter', 'gda', 'linear_probe')
COVERAGE, SEEDS = 0.9, range(1, 11)
# Features, shots, and where they are from: calibrated on (folds: the shots), tested on.
CASES = {
    ('caltech101', 4, 'train'): (
        ('folds', 'val'),  # the case to choose by
        ('folds', 'test'),
        ('val', 'test'),
        ('4 of each class of val', 'test'),
    ),
    ('caltech101', 4, 'val'): (('folds', 'test'),),  # single views, as test images are
    ('imagenet', 2, 'train'): (('folds', 'test'), ('half of test', 'test')),
}


def of_each(part: Features, count: int, rng: torch.Generator) -> Features:
    """Draws images of each class."""
    rows = torch.randperm(len(part), generator=rng)
    groups = [rows[part.labels[rows] == k][:count] for k in part.labels.unique()]
    return part.take(torch.cat(groups).sort().values)


def known(part: Features, classes: Tensor) -> Features:
    """Keeps the images of some classes, and numbers these."""
    part = part.take(torch.isin(part.labels, classes).nonzero()[:, 0])
    return replace(part, labels=torch.searchsorted(classes, part.labels))


def separate(good: Tensor, bad: Tensor) -> tuple[float, float]:
    """Returns AUROC, and the false-positive rate at 95 % true positives, in %."""
    ranks = rankdata(torch.cat([good, bad]).double().numpy())[: len(good)]
    area = (ranks.mean() - (len(good) + 1) / 2) / len(bad)
    return 100 * area, 100 * (bad >= good.quantile(0.05)).float().mean().item()


class Fits:
    """Fits a method to some classes of a draw, and calibrates it by folds, once."""

    def __init__(self, file: FeatureFile, name: str) -> None:
        self.file, self.method, self.found = file, METHODS[name], {}

    def __call__(self, train: Features, classes: Tensor) -> tuple:
        key = train.features.sum().item(), tuple(classes.tolist())
        if key not in self.found:
            names = tuple(self.file.class_names[k] for k in classes)
            shots, text = len(train) // len(names), self.file.text_features[classes]
            data = FewShotData(train, shots, text, self.file.logit_scale, names, seed=1)
            classifier, options = self.method.fit(data), self.method.defaults
            folds = calibrate(self.method, data, None, classifier, options)
            self.found[key] = classifier, folds
        return self.found[key]


def measure(fits: Fits, case: tuple, source: str, tested: str, seed: int) -> dict:
    """Tests a classifier of all classes, and one of half of them."""
    rng, file, (_, shots, origin) = torch.Generator().manual_seed(seed), fits.file, case
    count, found = len(file.class_names), {}
    half = torch.randperm(count, generator=rng)[: count // 2].sort().values
    pool = file.val if origin == 'val' else file.train[max(file.train)]
    train, test, held_out = of_each(pool, shots, rng), getattr(file, tested), file.val
    if source == 'half of test':
        first, second = torch.randperm(len(test), generator=rng).chunk(2)
        held_out, test = test.take(first), test.take(second)
    elif source.startswith('4'):
        held_out = of_each(file.val, 4, rng)
    for classes in (torch.arange(count), half):
        classifier, made = fits(known(train, classes), classes)
        if source != 'folds':
            made = calibrate(None, None, known(held_out, classes), classifier, {})
        with torch.no_grad():
            logits = classifier(test.features[0]).float()
        p, n = made.probabilities(logits), len(made.scores)
        if classes is half:
            break
        inside = made.sets(p, COVERAGE)
        covered = inside[torch.arange(len(test)), test.labels].double()
        rank = -int(-(n + 1) * COVERAGE // 1)
        low, high = betabinom(len(test), rank, n + 1 - rank).interval(0.95)
        right = (p.argmax(1) == test.labels).float()
        for when, values in {'before': logits.softmax(1), 'after': p}.items():
            ece = calibration_error(values.amax(1), right)
            found[f'calibration error {when}, %'] = 100 * ece
        found |= {
            'images': n,
            'temperature': made.temperature,
            'accuracy, %': 100 * right.mean().item(),
            'coverage, %': 100 * covered.mean().item(),
            'draws in the band, %': 100 * (low <= covered.sum() <= high).item(),
            'classes in a set': inside.sum(1).double().mean().item(),
        }
    here, rejected = torch.isin(test.labels, half), made.rejects(p).double()
    scores = {f'p at {s} T': confidence(p, s) for s in (1, 2, 4, 8)}
    scores |= {'logit': logits.amax(1), 'energy': logits.logsumexp(1)}
    for what, score in scores.items():
        area, rate = separate(score[here], score[~here])
        found |= {f'AUROC, {what}': area, f'FPR, {what}': rate}
    for what, chosen in {'known': here, 'unknown': ~here}.items():
        found[f'{what} rejected, %'] = 100 * rejected[chosen].mean().item()
    return found


def main(folder: str, out: str) -> None:
    """Writes the means over the seeds, a row for each case and method."""
    head = ('features', 'shots', 'shots from', 'method', 'calibrated on', 'tested on')
    text, writer = io.StringIO(), None
    for (case, pairs), name in itertools.product(CASES.items(), NAMES):
        fits = Fits(read_feature_file(Path(folder) / f'{case[0]}.safetensors'), name)
        for pair in pairs:
            draws = [measure(fits, case, *pair, seed) for seed in SEEDS]
            row = dict(zip(head, (*case, name, *pair), strict=True))
            for what in draws[0]:
                row[what] = f'{sum(x[what] for x in draws) / len(draws):.2f}'
            if writer is None:
                writer = csv.DictWriter(text, row, lineterminator='\n')
                writer.writeheader()
            writer.writerow(row)
            write_atomic(out, text.getvalue())


if __name__ == '__main__':
    main(*sys.argv[1:])

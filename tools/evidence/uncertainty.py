"""Measures calibration, prediction sets and rejection on files of CLIP features.

    python -m tools.evidence.uncertainty FOLDER results/few_shot/uncertainty.csv

FOLDER has ``caltech101.safetensors`` and ``imagenet.safetensors``. For rejection half
of the classes, drawn anew with each seed, are hidden from the classifier.
"""

import csv
import io
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
# File, shots, where they are from, calibrated on (folds: the shots), tested on.
CASES = (
    ('caltech101', 4, 'train', 'folds', 'val'),  # the case to choose by
    ('caltech101', 4, 'train', 'val', 'test'),
    ('caltech101', 4, 'train', '4 of each class of val', 'test'),
    ('caltech101', 4, 'train', 'folds', 'test'),
    ('caltech101', 4, 'val', 'folds', 'test'),  # single views, as test images are
    ('imagenet', 2, 'train', 'half of test', 'test'),
    ('imagenet', 2, 'train', 'folds', 'test'),
)


def of_each(part: Features, count: int, rng: torch.Generator) -> Features:
    """Draws images of each class."""
    rows = torch.randperm(len(part), generator=rng)
    groups = [rows[part.labels[rows] == k][:count] for k in part.labels.unique()]
    return part.take(torch.cat(groups))


def known(part: Features, classes: Tensor) -> Features:
    """Keeps the images of some classes, and numbers these."""
    part = part.take(torch.isin(part.labels, classes).nonzero()[:, 0])
    return replace(part, labels=torch.searchsorted(classes, part.labels))


def separate(good: Tensor, bad: Tensor) -> tuple[float, float]:
    """Returns AUROC, and the false-positive rate at 95 % true positives, in %."""
    ranks = rankdata(torch.cat([good, bad]).double().numpy())[: len(good)]
    area = (ranks.mean() - (len(good) + 1) / 2) / len(bad)
    return 100 * area, 100 * (bad >= good.quantile(0.05)).float().mean().item()


def measure(file: FeatureFile, case: tuple, name: str, seed: int) -> dict[str, float]:
    """Fits a classifier to all classes and one to half of them, and tests both."""
    _, shots, origin, source, tested = case
    rng, method = torch.Generator().manual_seed(seed), METHODS[name]
    pool = file.val if origin == 'val' else file.train[max(file.train)]
    train, test = of_each(pool, shots, rng), getattr(file, tested)
    held_out = None if source == 'folds' else file.val
    if source == 'half of test':
        first, second = torch.randperm(len(test), generator=rng).chunk(2)
        held_out, test = test.take(first), test.take(second)
    elif source.startswith('4'):
        held_out = of_each(file.val, 4, rng)
    count, found = len(file.class_names), {}
    half = torch.randperm(count, generator=rng)[: count // 2].sort().values
    for classes in (torch.arange(count), half):
        names = tuple(file.class_names[k] for k in classes)
        few = known(train, classes), shots, file.text_features[classes]
        data = FewShotData(*few, file.logit_scale, names, seed=seed)
        classifier, part = method.fit(data), held_out and known(held_out, classes)
        made = calibrate(method, data, part, classifier, method.defaults)
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
    head = ('features', 'shots', 'shots from', 'calibrated on', 'tested on', 'method')
    text, writer = io.StringIO(), None
    for case in CASES:
        file = read_feature_file(Path(folder) / f'{case[0]}.safetensors')
        for name in NAMES:
            draws = [measure(file, case, name, seed) for seed in SEEDS]
            row = dict(zip(head, (*case, name), strict=True))
            for what in draws[0]:
                row[what] = f'{sum(x[what] for x in draws) / len(draws):.2f}'
            if writer is None:
                writer = csv.DictWriter(text, row, lineterminator='\n')
                writer.writeheader()
            writer.writerow(row)
            write_atomic(out, text.getvalue())


if __name__ == '__main__':
    main(*sys.argv[1:])

"""Measures calibration, prediction sets and rejection on files of CLIP features.

    python -m tools.evidence.uncertainty FOLDER results/few_shot/uncertainty.csv

FOLDER has ``caltech101.safetensors`` and ``imagenet.safetensors``. For rejection half
of the classes, drawn anew with each seed, are hidden from the classifier.
"""

import itertools
import sys
from pathlib import Path

import torch
from scipy.stats import betabinom, mannwhitneyu
from torch import Tensor

from dsnet_mm.datasets.feature_file import read_feature_file
from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot.calibration import calibrate, confidence
from dsnet_mm.few_shot.evaluation import calibration_error
from dsnet_mm.few_shot.methods import METHODS, FewShotData
from dsnet_mm.files import write_atomic

NAMES = ('zero_shot', 'clip_adapter', 'gda', 'linear_probe')
COVERAGE, SEEDS = 0.9, range(1, 11)
# Features, shots, and where they are from: calibrated on (folds: the shots), tested on.
# 'mixed': val and test are mixed and divided anew with each seed, so they are alike.
CASES = {
    ('caltech101', 4, 'train'): (
        ('folds', 'val'),  # the case to choose by
        ('folds', 'test'),
        ('4 of each class of val', 'test'),
        ('mixed val', 'mixed test'),
    ),
    ('caltech101', 4, 'val'): (('folds', 'test'),),  # single views, as test images are
    ('imagenet', 2, 'train'): (('folds', 'test'), ('half of test', 'other half')),
}


def of_each(part: Features, count: int, rng: torch.Generator) -> Features:
    """Draws images of each class."""
    rows = torch.randperm(len(part), generator=rng)
    groups = [rows[part.labels[rows] == k][:count] for k in part.labels.unique()]
    return part.take(torch.cat(groups).sort().values)


def known(part: Features, classes: Tensor) -> Features:
    """Keeps the images of some classes, and numbers these."""
    part = part.take(torch.isin(part.labels, classes).nonzero()[:, 0])
    return Features(part.features, torch.searchsorted(classes, part.labels))


def separate(good: Tensor, bad: Tensor) -> tuple[float, float]:
    """Returns AUROC, and the false-positive rate at 95 % true positives, in %."""
    wins = mannwhitneyu(good.double(), bad.double()).statistic
    rate = (bad >= good.quantile(0.05)).double().mean().item()
    return 100 * wins / len(good) / len(bad), 100 * rate


def measure(file, fits: dict, case: tuple, pair: tuple, name: str, seed: int) -> dict:
    """Tests a classifier of all classes, and one of half of them."""
    rng, (_, shots, origin), method = torch.Generator(), case, METHODS[name]
    count, found = len(file.class_names), {}
    half = torch.randperm(count, generator=rng.manual_seed(seed))[: count // 2]
    pool = file.val if origin == 'val' else file.train[max(file.train)]
    train, held_out = of_each(pool, shots, rng), file.val
    test = file.val if pair[1] == 'val' else file.test
    if pair[0].startswith('4'):
        held_out = of_each(held_out, 4, rng)
    elif pair[0] != 'folds':
        parts, size = [test], len(test) // 2
        if pair[0] == 'mixed val':
            parts, size = [held_out, test], len(held_out)
        features = torch.cat([part.features[:1] for part in parts], 1)
        test = Features(features, torch.cat([part.labels for part in parts]))
        rows = torch.randperm(len(test), generator=rng)
        held_out, test = test.take(rows[:size]), test.take(rows[size:])
    for classes in (torch.arange(count), half.sort().values):
        part = known(train, classes)
        key = part.features.sum().item(), len(classes)
        names = tuple(file.class_names[k] for k in classes)
        few = part, shots, file.text_features[classes], file.logit_scale, names
        data = FewShotData(*few, seed=1)
        if key not in fits:
            fits[key] = method.fit(data)
        classifier = fits[key]
        part, key = None, (key, pair[0])
        if pair[0] != 'folds':
            part, key = known(held_out, classes), (seed, *key)
        if key not in fits:
            fits[key] = calibrate(method.fit, data, part, classifier)
        made = fits[key]
        with torch.no_grad():
            logits = classifier(test.features[0]).float()
        p, n = made.probabilities(logits), len(made.scores)
        if len(classes) < count:
            break
        inside = made.sets(p, COVERAGE)
        covered = inside[torch.arange(len(test)), test.labels].double()
        rank = -int(-(n + 1) * COVERAGE // 1)
        low, high = betabinom(len(test), rank, n + 1 - rank).interval(0.95)
        right = (p.argmax(1) == test.labels).float()
        for when, values in {'before': logits.softmax(1), 'after': p}.items():
            ece = calibration_error(values.amax(1), right)
            found[f'calibration error {when} %'] = 100 * ece
        found |= {
            'images': n,
            'temperature': made.temperature,
            'accuracy %': 100 * right.mean().item(),
            'coverage %': 100 * covered.mean().item(),
            'draws in the band %': 100 * (low <= covered.sum() <= high).item(),
            'classes in a set': inside.sum(1).double().mean().item(),
        }
    here, rejected = torch.isin(test.labels, half), made.rejects(p).double()
    scores = {f'p at {s} T': confidence(p, s) for s in (1, 2, 4, 8)}
    scores |= {'logit': logits.amax(1), 'energy': logits.logsumexp(1)}
    for what, score in scores.items():
        area, rate = separate(score[here], score[~here])
        found |= {f'AUROC {what}': area, f'FPR {what}': rate}
    for what, chosen in {'known': here, 'unknown': ~here}.items():
        found[f'{what} rejected %'] = 100 * rejected[chosen].mean().item()
    return found


def main(folder: str, out: str) -> None:
    """Writes the means over the seeds, a row for each case and method."""
    head = ('features', 'shots', 'shots from', 'method', 'calibrated on', 'tested on')
    lines = []
    for (case, pairs), name in itertools.product(CASES.items(), NAMES):
        file, fits = read_feature_file(Path(folder) / f'{case[0]}.safetensors'), {}
        for pair in pairs:
            draws = [measure(file, fits, case, pair, name, seed) for seed in SEEDS]
            means = [sum(x[what] for x in draws) / len(draws) for what in draws[0]]
            cells = (*case, name, *pair, *(f'{value:.2f}' for value in means))
            lines.append(','.join(map(str, cells)))
    write_atomic(out, '\n'.join([','.join([*head, *draws[0]]), *lines, '']))


if __name__ == '__main__':
    main(*sys.argv[1:])

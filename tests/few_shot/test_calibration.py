"""Temperature, prediction sets and rejection."""

import shutil

import pytest
import torch

from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot import FewShotConfig, load_classifier, run
from dsnet_mm.few_shot.calibration import Calibration, calibrate, fit_temperature
from dsnet_mm.few_shot.deployment import read_classifier
from dsnet_mm.few_shot.evaluation import calibration_error
from dsnet_mm.few_shot.methods import FewShotData


def sample(count, seed, temperature):
    """Logits, and labels that have the probabilities of their softmax."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 5, generator=rng)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]
    return temperature * logits, labels


@pytest.mark.parametrize('temperature', [0.2, 1.0, 5.0])
def test_temperature_is_found(temperature):
    found = fit_temperature(*sample(4000, 0, temperature))
    assert found == pytest.approx(temperature, rel=0.1)
    # The cross-entropy alone is least at a temperature of zero.
    assert fit_temperature(10 * torch.eye(3), torch.arange(3)) > 0.5


def test_coverage_and_rejection_are_as_promised():
    covered, kept, unsure = [], [], []
    for seed in range(200):
        logits, labels = sample(100, seed, 4.0)
        found = calibrate(None, None, Features(logits[None], labels), lambda f: f)
        logits, labels = sample(500, 1000 + seed, 4.0)
        p = found.probabilities(logits)
        assert torch.equal(p.argmax(1), logits.argmax(1))
        inside = found.sets(p, 0.9)
        covered.append(inside[torch.arange(500), labels].float().mean())
        kept.append(1 - found.rejects(p).float().mean())
        unsure.append(found.rejects(p / 10 + 0.18).float().mean())
    # n + 1 is 101: rank 91, and the threshold is the fifth.
    assert torch.stack(covered).mean() == pytest.approx(91 / 101, abs=0.01)
    assert torch.stack(kept).mean() == pytest.approx(96 / 101, abs=0.01)
    assert torch.stack(unsure).mean() > 0.9


def test_no_image_is_held_out_of_a_classifier_that_it_fits():
    def fit(part):
        seen = set(part.train.features[0, :, 0].tolist())
        fits.append(part)
        assert set(part.train.labels.tolist()) == set(range(5))

        def classify(f):
            assert not seen & set((f[:, 0] - 0.5).tolist())  # those of plain
            return torch.zeros(len(f), 5)

        return classify

    cases = (1, 0, 0), (2, 2, 10), (6, 4, 30), (200, 1, 250), (3, 3, 12)
    for count, wanted, images in cases:
        fits, labels = [], torch.arange(5).repeat(count)
        if images == 12:  # one image of the first class
            labels = torch.cat([labels[:1], labels[labels > 0]])
        number = torch.arange(1.0 * len(labels))[None, :, None].repeat(1, 1, 2)
        few = Features(number, labels), count, torch.eye(5, 2), 1.0, tuple('abcde')
        data = FewShotData(*few, plain=Features(number + 0.5, labels))
        found = calibrate(fit, data, None, None)
        assert (len(fits), len(found.scores)) == (wanted, images)
        assert found.source == ('folds' if wanted else None)
    for call in (lambda x: Calibration().sets(x, 0.9), Calibration().rejects):
        with pytest.raises(ValueError, match='not calibrated'):
            call(torch.ones(1, 3) / 3)


@pytest.mark.parametrize('val', [True, False])
def test_run_calibrates_without_the_test_split(
    tiny_clip, encoder, image_folder, tmp_path, val
):
    for file in image_folder.glob('*/*.png'):
        part = 'test' if int(file.stem) >= 16 else 'train'
        part = 'val' if val and int(file.stem) < 6 else part
        to = tmp_path / 'data' / part / file.parent.name / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    options = dict(shots=(4,), seeds=(1,), selection='fixed', views=2)
    data, cache = str(tmp_path / 'data'), str(tmp_path / 'cache')
    config = FewShotConfig(
        data, **tiny_clip, methods=('gda',), cache_dir=cache, **options
    )
    images = sorted(tmp_path.glob('data/test/*/*'))
    for record in run(config, tmp_path / 'run', quiet=True, final=True):
        file = tmp_path / 'run' / 'classifiers' / f'{record["name"]}.safetensors'
        found = Calibration.read(read_classifier(file)[1])
        # No image fits zero-shot CLIP.
        folds = not val and record['method'] == 'gda'
        assert found.source == ('folds' if folds else 'held_out')
        assert len(found.scores) == 12 and found.temperature != 1
        p = load_classifier(file, encoder)(images)
        right = p.argmax(1) == torch.arange(3).repeat_interleave(8)
        error = 100 * calibration_error(p.amax(1), right.float())
        assert record['test']['ece'] == pytest.approx(error, abs=1e-3)
    about = read_classifier(file.with_name('final.safetensors'))[1]
    assert len(Calibration.read(about).scores) == 72
    del about['calibration']  # as in files of earlier versions
    assert Calibration.read(about) == Calibration()

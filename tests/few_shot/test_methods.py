"""All methods on synthetic features, and the selection of hyper-parameters."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot import METHODS, load_classifier, save_classifier
from dsnet_mm.few_shot.evaluation import calibration_error, evaluate
from dsnet_mm.few_shot.methods import FewShotData, Method, num_learnt
from dsnet_mm.few_shot.methods.coop import PromptLearner
from dsnet_mm.few_shot.methods.table import method_table
from dsnet_mm.few_shot.methods.tip_adapter import TipAdapter
from dsnet_mm.few_shot.methods.training import num_epochs
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier, fit_zero_shot
from dsnet_mm.few_shot.selection import select

CLASSES, WIDTH, SHOTS = 4, 16, 8
QUICK = {
    'clip_adapter_paper': dict(alpha=0.8, epochs='coop'),
    'linear_adapter': dict(lr=1e-2),
    'coop': dict(n_ctx=4, lr=0.1),
}


def draw(count, seed, views=1):
    """Samples clusters. The text features are noisy copies of their centres."""
    centres = F.normalize(torch.randn(CLASSES, WIDTH, generator=rng(0)), dim=-1)
    labels = torch.arange(CLASSES).repeat_interleave(count)
    noise = torch.randn(views, len(labels), WIDTH, generator=rng(seed))
    return Features(2 * (centres[labels] + 0.25 * noise), labels)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def data(encoder):
    centres = F.normalize(torch.randn(CLASSES, WIDTH, generator=rng(0)), dim=-1)
    text = centres + 0.45 * torch.randn(CLASSES, WIDTH, generator=rng(1))
    return FewShotData(
        draw(SHOTS, 2, views=3),
        SHOTS,
        F.normalize(text, dim=-1),
        20.0,
        ('disc', 'star', 'ring', 'heart'),
        encoder,
    )


@pytest.mark.parametrize('name', METHODS)
def test_method_fits_and_is_saved_and_loaded(name, data, encoder, tmp_path):
    method, test = METHODS[name], draw(200, 3)
    short = dict(epochs=30, iterations=100)
    short = {k: v for k, v in short.items() if k in method.defaults}
    options = {**method.defaults, **short, **QUICK.get(name, {})}
    classifier = method.fit(data, **options)
    start = fit_zero_shot(data)
    if name == 'coop':  # starts from the class names, and this encoder is random
        start = CosineClassifier(
            encoder.encode_classes(data.class_names, 'photo'), data.logit_scale
        )
    before, after = evaluate(start, data.train), evaluate(classifier, data.train)
    closed = ('zero_shot', 'tip_adapter', 'proker')
    assert (num_learnt(classifier) == 0) == (name in closed)
    assert (after.loss < before.loss) == (name != 'zero_shot')

    file = tmp_path / 'classifier.safetensors'
    save_classifier(file, classifier, encoder, data.class_names, 'clip')
    loaded = load_classifier(file, encoder)
    with torch.no_grad():
        expected = classifier(test.features[0])
        torch.testing.assert_close(loaded.classifier(test.features[0]), expected)
    assert loaded.class_names == data.class_names
    again = method.fit(data, **options)
    with torch.no_grad():
        assert torch.equal(again(test.features[0]), expected), (
            'a second fit gives the same classifier'
        )


def test_docs_have_the_table_of_methods():
    docs = Path(__file__).parents[2] / 'docs' / 'clip_adapter.md'
    assert method_table() in docs.read_text(encoding='utf-8')


def test_tip_adapter_formula(data):
    keys = F.normalize(data.train.features[0], dim=-1)
    tip = TipAdapter(keys, data.train.labels, data.text_features, 20.0, 0.7, 3.0)
    f = F.normalize(draw(5, 4).features[0], dim=-1)
    one_hot = F.one_hot(data.train.labels, CLASSES).float()
    affinity = torch.exp(-3.0 * (1 - f @ keys.t()))
    expected = 20 * f @ data.text_features.t() + 0.7 * affinity @ one_hot
    torch.testing.assert_close(tip(f), expected)


def test_prompt_learner_with_the_embeddings_of_a_prompt(encoder):
    learner = PromptLearner(encoder, ['disc', 'star'], n_ctx=4)
    tokens = encoder.tokenizer(['a photo of a disc.'])
    with torch.no_grad():
        learner.context.copy_(encoder.clip.token_embedding(tokens)[0, 1:5])
    expected = encoder.encode_classes(['disc', 'star'], 'a photo of a {}.')
    torch.testing.assert_close(learner.classifier(), expected)
    learner.classifier().sum().backward()
    assert learner.context.grad.abs().sum() > 0
    with pytest.raises(ValueError, match='use a smaller n_ctx'):
        PromptLearner(encoder, ['disc'], n_ctx=40)


def test_num_epochs():
    shots = (1, 2, 4, 8, 16)
    assert [num_epochs('coop', k) for k in shots] == [50, 100, 100, 200, 200]
    assert [num_epochs('task_res', k) for k in shots] == [100, 100, 100, 200, 200]
    assert num_epochs(7, 1) == 7
    with pytest.raises(ValueError, match="must be a number, 'coop' or 'task_res'"):
        num_epochs('clap', 1)


def test_epochs_and_iterations_exclude_each_other(data):
    method = METHODS['clip_adapter']
    with pytest.raises(ValueError, match='exactly one of them must be None'):
        method.fit(data, **{**method.defaults, 'epochs': 3})


@pytest.mark.parametrize(
    ('option', 'sentence'),
    [
        (dict(iterations=-5), 'number of steps must be at least 0, got -5'),
        (dict(batch_size=0), 'batch_size must be None or at least 1, got 0'),
        (dict(batch_size=1, text_batches=True), 'at least 2, got 1'),
        (dict(optimizer='Lion'), 'optimizer must be one of'),
        (dict(decay_by='step'), 'decay_by must be one of'),
    ],
)
def test_bad_recipes(data, option, sentence):
    method = METHODS['clip_adapter']
    with pytest.raises(ValueError, match=sentence):
        method.fit(data, **{**method.defaults, **option})


# --- Selection --------------------------------------------------------------------


def test_val_selection_takes_the_best_accuracy(data):
    val = draw(4, 5)
    fit = select(METHODS['tip_adapter'], data, val)
    assert (fit.selection, fit.tried) == ('val', 72)
    assert evaluate(fit.classifier, val).accuracy == fit.val_accuracy
    everything = [
        evaluate(METHODS['tip_adapter'].fit(data, alpha=a, beta=b), val).accuracy
        for a in METHODS['tip_adapter'].late_grid['alpha']
        for b in METHODS['tip_adapter'].late_grid['beta']
    ]
    assert fit.val_accuracy == max(everything)
    assert len(fit.classifier.keys) == CLASSES * SHOTS


def test_cross_validation_fits_to_all_images_at_the_end(data):
    fit = select(METHODS['linear_probe'], data, None, 'cv')
    assert (fit.selection, fit.tried) == ('cv', 4)
    again = METHODS['linear_probe'].fit(data, weight_decay=fit.options['weight_decay'])
    assert torch.equal(fit.classifier.weight, again.weight)
    overrides = dict(weight_decay=fit.options['weight_decay'])
    same = select(METHODS['linear_probe'], data, None, 'cv', overrides)
    assert (same.selection, same.tried) == ('fixed', 1)
    assert same.val_accuracy == fit.val_accuracy
    assert torch.equal(same.classifier.weight, again.weight)


def test_cross_validation_folds_are_balanced(data, monkeypatch):
    seen = []

    def fit(part):
        seen.append(part)
        return fit_zero_shot(part)

    method = Method('spy', lambda part, x: fit(part), dict(x=0), dict(x=(0, 1)))
    select(method, data, None, 'cv')
    for part in seen[:-1]:
        assert part.shots == 6
        assert part.train.labels.bincount().tolist() == [6] * CLASSES
    assert len(seen[-1].train) == CLASSES * SHOTS


def test_defaults_are_taken_without_validation_features(data):
    for val, selection in ((None, 'val'), (draw(4, 5), 'fixed')):
        fit = select(METHODS['linear_probe'], data, val, selection)
        assert (fit.selection, fit.tried) == ('fixed', 1)
        assert fit.options == dict(METHODS['linear_probe'].defaults)
    overridden = select(
        METHODS['linear_probe'], data, draw(4, 5), 'val', dict(weight_decay=0.5)
    )
    assert overridden.options == dict(weight_decay=0.5)
    with pytest.raises(ValueError, match='selection must be one of'):
        select(METHODS['linear_probe'], data, None, 'test')


def test_calibration_error():
    sure = torch.full((10,), 0.95)
    right = torch.tensor([1.0] * 7 + [0.0] * 3)
    assert calibration_error(sure, right) == pytest.approx(0.25)
    both = torch.cat([sure, torch.full((10,), 0.5)])
    right = torch.cat([right, torch.tensor([1.0, 0.0] * 5)])
    assert calibration_error(both, right) == pytest.approx(0.125)


def test_evaluation_does_not_depend_on_the_chunk_size(data):
    test, classifier = draw(50, 6), fit_zero_shot(data)
    whole, parts = evaluate(classifier, test), evaluate(classifier, test, chunk=7)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss)

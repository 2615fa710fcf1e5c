"""All methods on synthetic features, and the selection of hyper-parameters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsnet_mm.datasets import sample_few_shot
from dsnet_mm.datasets.feature_file import read_feature_file
from dsnet_mm.datasets.features import FeatureCache, Features
from dsnet_mm.few_shot import METHODS, FewShotConfig, load_classifier, save_classifier
from dsnet_mm.few_shot.encode import encode
from dsnet_mm.few_shot.evaluation import calibration_error, evaluate
from dsnet_mm.few_shot.methods import (
    FewShotData,
    Method,
    register_classifier,
    register_method,
)
from dsnet_mm.few_shot.methods.base import CLASSIFIERS, describe_crops, num_learnt
from dsnet_mm.few_shot.methods.clip_adapter import COPIES
from dsnet_mm.few_shot.methods.coop import PromptLearner
from dsnet_mm.few_shot.methods.tip_adapter import TipAdapter
from dsnet_mm.few_shot.methods.training import by_shots
from dsnet_mm.few_shot.methods.zero_shot import CosineClassifier
from dsnet_mm.few_shot.selection import select
from dsnet_mm.few_shot.sources import FeatureSource, ImageSource

CLASSES, WIDTH, SHOTS = 4, 16, 8
QUICK = {
    'clip_adapter_paper': dict(alpha=0.8, epochs={1: 50, 8: 200}),
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
        unlabelled=draw(200, 3).features[0],
    )


@pytest.mark.parametrize('name', METHODS)
def test_method_fits_and_is_saved_and_loaded(name, data, encoder, tmp_path):
    method, test = METHODS[name], draw(200, 3)
    short = dict(epochs=30, iterations=100)
    short = {k: v for k, v in short.items() if method.defaults.get(k)}
    options = {**short, **QUICK.get(name, {})}
    classifier = method.fit(data, **options)
    assert type(classifier) is method.returns
    start = METHODS['zero_shot'].fit(data)
    if name == 'coop':  # starts from the class names, and this encoder is random
        start = CosineClassifier(
            encoder.encode_classes(data.class_names, 'photo'), data.logit_scale
        )
    before, after = evaluate(start, data.train), evaluate(classifier, data.train)
    closed = ('zero_shot', 'prototypes', 'tip_adapter', 'proker', 'ss_text')
    closed += ('transclip', 'transclip_zs')
    assert (num_learnt(classifier) == 0) == (name in closed)
    assert (after.loss < before.loss) == (name != 'zero_shot')

    file = tmp_path / 'classifier.safetensors'
    save_classifier(file, classifier, encoder, data.class_names, 'clip')
    loaded = load_classifier(file, encoder)
    again = method.fit(data, **options)
    with torch.no_grad():
        expected = classifier(test.features[0])
        torch.testing.assert_close(loaded.classifier(test.features[0]), expected)
        assert torch.equal(again(test.features[0]), expected), 'the seed is the same'
    assert loaded.class_names == data.class_names


def test_docs_have_all_methods_and_what_is_searched():
    text = (Path(__file__).parents[2] / 'docs' / 'clip_adapter.md').read_text()
    for name, method in METHODS.items():
        star = ' *' if name in ('zero_shot', *FewShotConfig.methods) else ''
        (row,) = (x for x in text.splitlines() if x.startswith(f'| `{name}`{star} |'))
        assert row.endswith(f'| {", ".join(method.grid) or "-"} |')


# --- Registries -------------------------------------------------------------------


@register_classifier('centres')
class Nearest(nn.Module):
    """A classifier of a user."""

    def __init__(self, centres, power=1.0):
        super().__init__()
        self.register_buffer('centres', centres)
        self.options = dict(power=power)

    def forward(self, f):
        return -(torch.cdist(f, self.centres) ** self.options['power'])


def test_own_method(data, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr('dsnet_mm.few_shot.methods.base.METHODS', {})
    register = register_method('own', Nearest, 'Own', defaults=dict(power=1.0))

    @register
    def fit(data, *, power):
        return Nearest(data.text_features, power)

    from dsnet_mm.few_shot.methods.base import METHODS

    classifier = METHODS['own'].fit(data, power=2.0)
    file = tmp_path / 'own.safetensors'
    save_classifier(file, classifier, encoder, data.class_names, 'clip')
    f = torch.randn(3, WIDTH)
    assert torch.equal(load_classifier(file, encoder).classifier(f), classifier(f))
    monkeypatch.delitem(CLASSIFIERS, 'Nearest')
    with pytest.raises(ValueError, match='Nearest'):
        load_classifier(file, encoder)


def test_method_whose_classifier_cannot_be_saved_is_refused_before_its_fit(tmp_path):
    fitted = []
    for call in (
        lambda: Method('Own', fitted.append, nn.Linear),
        lambda: save_classifier(tmp_path / 'a', nn.Linear(1, 1), {}, ['a'], 'clip'),
    ):
        with pytest.raises(ValueError, match=r'Linear.*register_classifier'):
            call()
    assert not fitted and not list(tmp_path.iterdir())


def test_unknown_options_are_refused(data):
    for name, method in METHODS.items():
        with pytest.raises(ValueError, match="'gamma'"):
            method.fit(data, gamma=1)
        with pytest.raises(ValueError, match="'gamma'"):
            FewShotConfig('a', 'b', overrides={name: dict(gamma=1)})
    with pytest.raises(ValueError, match="'beta'"):
        Method('Own', None, CosineClassifier, dict(alpha=1), dict(beta=(1, 2)))


@pytest.mark.parametrize('name', COPIES)
def test_old_names_of_copies_say_their_settings(name, data):
    with pytest.raises(ValueError, match='clip_adapter_released') as error:
        FewShotConfig('a', 'b', methods=(name,))
    found = dict(x.split('=') for x in str(error.value).rstrip('.').split() if '=' in x)
    options = {
        k: v if k in ('preset', 'optimizer', 'decay_by') else eval(v)
        for k, v in found.items()
    }
    long = {k: 5 for k in ('epochs', 'iterations') if options.get(k)}
    METHODS['clip_adapter_released'].fit(data, **{**options, **long})
    FewShotConfig('a', 'b', overrides={'clip_adapter_released': options})


# --- Formulas and recipes ---------------------------------------------------------


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
    with pytest.raises(ValueError, match='n_ctx'):
        PromptLearner(encoder, ['disc'], n_ctx=40)


def test_options_by_shots():
    shots = (1, 2, 4, 8, 16)

    def num_epochs(value, shots):
        return by_shots('epochs', value, shots)

    coop, task_res = (METHODS[name].defaults['epochs'] for name in ('coop', 'task_res'))
    assert [num_epochs(coop, k) for k in shots] == [50, 100, 100, 200, 200]
    assert [num_epochs(task_res, k) for k in shots] == [100, 100, 100, 200, 200]
    assert num_epochs(7, 1) == 7
    assert num_epochs({'1': 3, '16': 4, '2': 5}, 15) == 5, 'as in JSON'
    for bad in ('coop', {2: 50}):
        with pytest.raises(ValueError, match='epochs'):
            num_epochs(bad, 1)
    with pytest.raises(ValueError, match='epochs'):
        FewShotConfig('a', 'b', overrides={'coop': dict(epochs='coop')})


@pytest.mark.parametrize(
    ('option', 'fact'),
    [
        (dict(epochs=3), 'epochs=3.*iterations=200'),
        (dict(iterations=-5), '-5'),
        (dict(batch_size=0), 'batch_size.*1.*0'),
        (dict(batch_size=1, text_batches=True), 'batch_size.*2.*1'),
        (dict(optimizer='Lion'), "optimizer.*'Lion'"),
        (dict(decay_by='step'), "decay_by.*'step'"),
    ],
)
def test_bad_recipes(data, option, fact):
    with pytest.raises(ValueError, match=fact):
        METHODS['clip_adapter'].fit(data, **option)


def test_text_length_of_encoder_file_and_option(tiny_clip, image_folder, tmp_path):
    """A file says what its encoder has, the option comes first, 10 comes last."""
    file = tmp_path / 'features.safetensors'
    images = dict(tiny_clip, dataset=str(image_folder), views=0)
    images |= dict(shots=(1,), cache_dir=str(tmp_path / 'cache'))
    encode(FewShotConfig(**images), file, quiet=True)
    source = ImageSource(FewShotConfig(**images), quiet=True)
    source.prepare()
    tokens = source.encoder.tokenizer(['a photo of a cat.'])
    length = source.encoder.encode_text(tokens).norm().item()
    assert source.text_length == pytest.approx(length) and abs(length - 1) > 1e-3

    def of_file(**options):
        source = FeatureSource(FewShotConfig(features=str(file), **options))
        source.prepare()
        return source.text_length, [n for n in source.notes if 'no text_length' in n]

    assert of_file() == (pytest.approx(length, rel=1e-3), [])
    assert of_file(text_length=3.0) == (3.0, [])
    read = read_feature_file(file)
    replace(read, about={**read.about, 'text_length': '0'}).write(file)
    with pytest.raises(ValueError, match='text_length'):
        of_file()
    about = {k: v for k, v in read.about.items() if k != 'text_length'}
    replace(read, about=about).write(file)
    assert of_file()[0] == 10 and 'TaskRes' in of_file()[1][0]
    for bad in (0, 'long'):
        with pytest.raises(ValueError, match=f'text_length.*{bad}'):
            FewShotConfig('a', 'b', text_length=bad)
    with pytest.raises(ValueError, match=r'length.*clap.*text_length'):
        FewShotConfig('a', 'b', overrides={'clap': dict(length=10)})


def test_training_features_have_the_crops_of_the_method(
    tiny_clip, image_folder, tmp_path
):
    images = dict(tiny_clip, dataset=str(image_folder), views=2)
    images |= dict(shots=(1,), cache_dir=str(tmp_path), methods=('gda', 'clap'))
    config = FewShotConfig(**images)
    source = ImageSource(config, quiet=True)
    source.prepare()
    source.encode([(1, 1)], plain=False)
    own = {
        name: source.cropped(METHODS[name].crop_scale).draw(1, 1, False).train
        for name in config.methods
    }
    items = sample_few_shot(source.task.split, 1, 1)['train']
    for name, scale in (('gda', (0.5, 1.0)), ('clap', (0.08, 1.0))):
        cache = FeatureCache(tmp_path, source.encoder, crop_scale=scale)
        assert not cache.count_missing(items, 2), 'all is encoded before the fits'
        assert torch.equal(cache.images(items, 2).features, own[name].features)
    assert not torch.equal(own['gda'].features, own['clap'].features)
    note = describe_crops(config.methods)
    assert '0.5 to 1 for GDA' in note and '0.08 to 1 for CLAP' in note

    given = ImageSource(FewShotConfig(**images, crop_scale=(0.9, 1.0)), quiet=True)
    given.prepare()
    assert given.cropped((0.5, 1.0)).cache.crop_scale == (0.9, 1.0)


# --- Selection --------------------------------------------------------------------


def test_val_selection_takes_the_best_accuracy(data):
    val, method = draw(4, 5), METHODS['tip_adapter']
    fit = select(method, data, val)
    assert (fit.selection, fit.tried) == ('val', 72)
    assert evaluate(fit.classifier, val).accuracy == fit.val_accuracy
    everything = [
        evaluate(method.fit(data, alpha=a, beta=b), val).accuracy
        for a in method.grid['alpha']
        for b in method.grid['beta']
    ]
    assert fit.val_accuracy == max(everything)
    assert fit.options == fit.classifier.options


def test_nothing_is_fitted_again_for_attributes(data, monkeypatch):
    fits = []

    def fit(data, **options):
        fits.append(options)
        return METHODS['tip_adapter'].fit(data, alpha=options['alpha'], beta=1.0)

    grid = dict(power=(1, 2), alpha=(0.5, 1.0, 2.0))
    defaults = dict(power=0, alpha=0.0)
    method = Method('spy', fit, TipAdapter, defaults, grid, ('alpha',))
    assert select(method, data, draw(4, 5)).tried == 6
    assert fits == [dict(power=1, alpha=0.0), dict(power=2, alpha=0.0)]


def test_cross_validation_fits_to_all_images_at_the_end(data):
    method = METHODS['linear_probe']
    fit = select(method, data, None, 'cv')
    assert (fit.selection, fit.tried) == ('cv', 4)
    again = method.fit(data, **fit.options)
    assert torch.equal(fit.classifier.weight, again.weight)
    same = select(method, data, None, 'cv', fit.options)
    assert (same.selection, same.tried) == ('fixed', 1)
    assert same.val_accuracy == fit.val_accuracy
    assert torch.equal(same.classifier.weight, again.weight)


def test_cross_validation_folds_are_balanced(data):
    seen = []

    def fit(part, x):
        seen.append(part)
        return METHODS['zero_shot'].fit(part)

    method = Method('spy', fit, CosineClassifier, dict(x=0), dict(x=(0, 1)))
    select(method, data, None, 'cv')
    for part in seen[:-1]:
        assert part.shots == 6
        assert part.train.labels.bincount().tolist() == [6] * CLASSES
    assert len(seen[-1].train) == CLASSES * SHOTS


def test_defaults_are_taken_without_validation_features(data):
    method = METHODS['linear_probe']
    for val, selection in ((None, 'val'), (draw(4, 5), 'fixed')):
        fit = select(method, data, val, selection)
        assert (fit.selection, fit.tried) == ('fixed', 1)
        assert fit.options == method.defaults
    overridden = select(method, data, draw(4, 5), 'val', dict(weight_decay=0.5))
    assert overridden.options == dict(weight_decay=0.5)
    with pytest.raises(ValueError, match="'test'"):
        select(method, data, None, 'test')


def test_calibration_error():
    sure = torch.full((10,), 0.95)
    right = torch.tensor([1.0] * 7 + [0.0] * 3)
    assert calibration_error(sure, right) == pytest.approx(0.25)
    both = torch.cat([sure, torch.full((10,), 0.5)])
    right = torch.cat([right, torch.tensor([1.0, 0.0] * 5)])
    assert calibration_error(both, right) == pytest.approx(0.125)


def test_evaluation_does_not_depend_on_the_chunk_size(data):
    test, classifier = draw(50, 6), METHODS['zero_shot'].fit(data)
    whole, parts = evaluate(classifier, test), evaluate(classifier, test, chunk=7)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss)

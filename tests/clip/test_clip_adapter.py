"""CLIPAdapter: the equations, the presets, and the arguments."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.clip import CLIPAdapter
from dsnet_mm.clip.adapter import PRESETS, zero_shot_logits

TEXT = F.normalize(torch.randn(7, 32, generator=torch.Generator().manual_seed(0)))
IMAGES = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def count(adapter):
    return sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize(
    'options', [*({'preset': p} for p in PRESETS), {'text': True, 'beta': 0.0}], ids=str
)
def test_logits_with_alpha_zero_are_exactly_those_of_zero_shot(options):
    adapter = CLIPAdapter(TEXT, 100.0, alpha=0.0, **options)
    assert torch.equal(adapter(IMAGES), zero_shot_logits(IMAGES, TEXT, 100.0))


def test_paper_equations():
    adapter = CLIPAdapter(TEXT, 10.0, text=True, alpha=0.6, beta=0.3)
    w1, w2 = (adapter.visual_adapter[i].weight for i in (0, 2))
    f = 0.6 * (IMAGES @ w1.t()).relu() @ w2.t() + 0.4 * IMAGES
    w1, w2 = (adapter.text_adapter[i].weight for i in (0, 2))
    w = 0.3 * (TEXT @ w1.t()).relu() @ w2.t() + 0.7 * TEXT
    expected = 10 * F.cosine_similarity(f[:, None], w[None], dim=-1)
    torch.testing.assert_close(adapter(IMAGES), expected)
    assert count(adapter) == 4 * 32 * 8
    of_paper = CLIPAdapter(F.normalize(torch.randn(3, 1024), dim=-1), 100.0, 'paper')
    assert count(of_paper) == 524_288


def test_distance_from_zero_shot_counts_where_zero_shot_is_right():
    adapter, labels = CLIPAdapter(TEXT, 10.0, text=True), torch.arange(5)
    images = IMAGES + 5 * TEXT[labels]
    logits, distance = adapter.logits_and_distance(images, labels)
    assert torch.equal(logits, adapter(images))
    f_star, w_star = adapter.adapt(images)
    log_p = zero_shot_logits(images, TEXT, 10.0).log_softmax(1)
    u = 1 + sum(log_p[i, y].item() for i, y in enumerate(labels)) / 5 / math.log(7)
    assert 0 < u < 1
    total = 0.0
    for i, y in enumerate(labels):
        moved = (f_star[i] - F.normalize(images[i], dim=0)).square().sum()
        total += moved + (w_star[y] - TEXT[y]).square().sum()
    torch.testing.assert_close(distance, u * total / 5)

    worst = log_p.argmin(1)  # below chance
    assert adapter.logits_and_distance(images, worst)[1] == 0
    one_class = CLIPAdapter(TEXT[:1], 10.0)
    assert one_class.logits_and_distance(IMAGES, 0 * labels)[1] == 0


def test_start_of_the_residual():
    """The equations in float64, with unequal numbers of images, and an unseen class."""
    images = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 6])
    images[:6] += 2 * TEXT[labels[:6]]
    adapter = CLIPAdapter(TEXT, 10.0)
    beta = adapter.start(images, labels)
    text, f = TEXT.double(), F.normalize(images.double(), dim=1)
    classes = [0, 1, 2, 4, 5, 6]
    log_p = (10 * f @ text.t()).log_softmax(1)
    loss = -sum(log_p[labels == c, c].mean() for c in classes) / 6
    u = max(0.0, 1 - loss.item() / math.log(7))
    assert 0 < u < 1
    assert beta == pytest.approx(0.7 * (1 - u) ** 2, rel=1e-5)
    means = torch.stack([f[labels == c].mean(0) for c in classes])
    centre = means.mean(0)
    covariance = torch.zeros(32, 32, dtype=torch.float64)
    for row, c in zip(f - centre, labels, strict=True):
        covariance += row.outer(row) / (labels == c).sum() / 6
    ridge = 10 / 9 * covariance.trace() * torch.eye(32)
    m = (means - centre) @ (covariance + ridge).inverse()
    m /= (m.square().sum() / 6).sqrt()
    expected = text.clone()
    expected[classes] = (1 - beta) * text[classes] + beta * m
    w = adapter.adapt(images)[1]
    torch.testing.assert_close(w.double(), expected, atol=1e-4, rtol=1e-4)


def test_start_trusts_a_sure_and_right_zero_shot_classifier():
    for scale, images, low, high in (
        (100.0, TEXT, 0.0, 1e-6),  # right
        (100.0, TEXT.roll(1, 0), 0.7, 0.7),  # sure and wrong
        (1e-4, TEXT, 0.69, 0.7),  # knows nothing
    ):
        beta = CLIPAdapter(TEXT, scale).start(images, torch.arange(7))
        assert low <= beta <= high + 1e-6
    one_class = CLIPAdapter(TEXT[:1], 10.0)
    assert one_class.start(IMAGES, torch.zeros(5, dtype=torch.long)) == 0
    assert CLIPAdapter(TEXT, 10.0, 'paper').start(IMAGES, torch.arange(5)) == 0


def test_presets():
    released = CLIPAdapter(TEXT, 10.0, 'released', alpha=1.0)
    assert released.visual_adapter(IMAGES).min() >= 0
    lpp = CLIPAdapter(TEXT, 10.0, 'lp++')
    f = F.normalize(IMAGES, dim=-1)
    f = 0.5 * lpp.visual_adapter(f) + 0.5 * f
    torch.testing.assert_close(lpp(IMAGES), 10 * f @ TEXT.t())
    assert CLIPAdapter(TEXT, 10.0, 'cross_modal').text_features.requires_grad
    assert count(CLIPAdapter(TEXT, 10.0, 'biased')) == 2 * 32 * 8 + 8 + 32


@pytest.mark.parametrize('preset', PRESETS)
def test_classifier_files_hold_state_and_options(preset):
    """The names are those in files of earlier versions."""
    adapter = CLIPAdapter(TEXT, 10.0, preset, learn_ratio=True, second_relu=False)
    names = {'text_features', 'logit_scale', 'alpha_logit'}
    names |= {'residual'} if preset == 'default' else set()
    names |= {f'visual_adapter.{i}.weight' for i in (0, 2)}
    if preset == 'biased':
        names |= {f'visual_adapter.{i}.bias' for i in (0, 2)}
    assert set(adapter.state_dict()) == names
    assert set(adapter.options) == {
        *('preset', 'visual', 'text', 'reduction', 'alpha', 'beta', 'learn_ratio'),
        *('bias', 'second_relu', 'input_norm', 'output_norm', 'zero_init'),
        *('learn_classifier', 'residual', 'keep'),
    }
    same = CLIPAdapter(torch.zeros(7, 32), 1.0, **adapter.options)
    same.load_state_dict(adapter.state_dict())
    assert torch.equal(same(IMAGES), adapter(IMAGES))


@pytest.mark.parametrize(
    'options',
    [dict(), dict(text=True, learn_ratio=True), dict(preset='cross_modal')],
    ids=['visual', 'both', 'classifier'],
)
def test_every_parameter_gets_a_gradient(options):
    torch.manual_seed(0)
    adapter = CLIPAdapter(TEXT, 10.0, **options)
    F.cross_entropy(adapter(IMAGES), torch.arange(5)).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_start_of_training():
    learnt = CLIPAdapter(TEXT, 10.0, alpha=0.6, learn_ratio=True)
    assert learnt.alpha.item() == pytest.approx(0.6) and learnt.alpha.requires_grad
    zero = CLIPAdapter(TEXT, 10.0, zero_init=True, alpha=0.5)
    torch.testing.assert_close(zero(IMAGES), zero_shot_logits(IMAGES, TEXT, 10.0))


@pytest.mark.parametrize(
    ('options', 'fact'),
    [
        (dict(preset='best'), 'paper, default, released'),
        (dict(alpha=1.5), 'alpha'),
        (dict(alpha=0.0, learn_ratio=True), 'learn_ratio'),
        (dict(visual=False), 'visual'),
        (dict(text=True, learn_classifier=True), 'learn_classifier'),
        (dict(text=True, residual=True), 'residual'),
        (dict(keep=-1.0), 'keep'),
        (dict(zero_init=True, second_relu=True), 'zero_init'),
        (dict(reduction=64), '32'),
        (dict(text_features=TEXT.long()), 'int64'),
    ],
)
def test_bad_arguments(options, fact):
    with pytest.raises(ValueError, match=fact):
        CLIPAdapter(**dict(text_features=TEXT, logit_scale=10.0) | options)


def test_wrong_width_of_features():
    with pytest.raises(ValueError, match=r'\(N, 32\).*\(5, 16\)'):
        CLIPAdapter(TEXT, 10.0)(IMAGES[:, :16])

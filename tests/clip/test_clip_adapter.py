"""CLIPAdapter with its presets, and OpenCLIPEncoder."""

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.clip.adapter import PRESETS, zero_shot_logits
from dsnet_mm.models import CLIPAdapter, OpenCLIPEncoder

TEXT = F.normalize(torch.randn(7, 32, generator=torch.Generator().manual_seed(0)))
IMAGES = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('preset', PRESETS)
def test_logits_with_alpha_zero_are_exactly_those_of_zero_shot(preset):
    adapter = CLIPAdapter(TEXT, 100.0, preset, alpha=0.0)
    assert torch.equal(adapter(IMAGES), zero_shot_logits(IMAGES, TEXT, 100.0))


def test_logits_with_alpha_and_beta_zero():
    adapter = CLIPAdapter(TEXT, 100.0, text=True, alpha=0.0, beta=0.0)
    assert torch.equal(adapter(IMAGES), zero_shot_logits(IMAGES, TEXT, 100.0))


def test_paper_equations():
    adapter = CLIPAdapter(TEXT, 10.0, text=True, alpha=0.6, beta=0.3)
    w1, w2 = (adapter.visual_adapter[i].weight for i in (0, 2))
    f = 0.6 * (IMAGES @ w1.t()).relu() @ w2.t() + 0.4 * IMAGES
    w1, w2 = (adapter.text_adapter[i].weight for i in (0, 2))
    w = 0.3 * (TEXT @ w1.t()).relu() @ w2.t() + 0.7 * TEXT
    expected = 10 * F.cosine_similarity(f[:, None], w[None], dim=-1)
    torch.testing.assert_close(adapter(IMAGES), expected)
    assert sum(p.numel() for p in adapter.parameters()) == 4 * 32 * 8


def test_distance_from_zero_shot_counts_where_zero_shot_is_right():
    adapter, labels = CLIPAdapter(TEXT, 10.0, text=True), torch.tensor([3, 0, 0, 6, 2])
    logits, distance = adapter.logits_and_distance(IMAGES, labels)
    assert torch.equal(logits, adapter(IMAGES))
    f_star, w_star = adapter.adapt(IMAGES)
    probability = zero_shot_logits(IMAGES, TEXT, 10.0).softmax(1)
    total = 0.0
    for i, y in enumerate(labels):
        right = max(0.0, probability[i, y].item() - 1 / 7) / (1 - 1 / 7)
        moved = (f_star[i] - F.normalize(IMAGES[i], dim=0)).square().sum()
        total += right * (moved + (w_star[y] - TEXT[y]).square().sum())
    torch.testing.assert_close(distance, total / 5)

    worst = probability.argmin(1)  # below chance
    assert adapter.logits_and_distance(IMAGES, worst)[1] == 0
    one_class = CLIPAdapter(TEXT[:1], 10.0)
    assert one_class.logits_and_distance(IMAGES, 0 * labels)[1] == 0


def test_number_of_parameters_of_the_paper():
    text = F.normalize(torch.randn(3, 1024), dim=-1)
    adapter = CLIPAdapter(text, 100.0)
    assert sum(p.numel() for p in adapter.parameters()) == 524_288


def test_presets():
    released = CLIPAdapter(TEXT, 10.0, 'released', alpha=1.0)
    assert released.visual_adapter(IMAGES).min() >= 0

    lpp = CLIPAdapter(TEXT, 10.0, 'lp++')
    f = F.normalize(IMAGES, dim=-1)
    f = 0.5 * lpp.visual_adapter(f) + 0.5 * f
    torch.testing.assert_close(lpp(IMAGES), 10 * f @ TEXT.t())

    cross = CLIPAdapter(TEXT, 10.0, 'cross_modal')
    assert cross.text_features.requires_grad
    biased = CLIPAdapter(TEXT, 10.0, 'biased')
    assert sum(p.numel() for p in biased.parameters()) == 2 * 32 * 8 + 8 + 32
    assert not CLIPAdapter(TEXT, 10.0, 'released', second_relu=False).second_relu


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


def test_learnt_ratio_starts_at_alpha():
    adapter = CLIPAdapter(TEXT, 10.0, alpha=0.6, learn_ratio=True)
    assert adapter.alpha.item() == pytest.approx(0.6)
    assert adapter.alpha.requires_grad


def test_zero_init_starts_at_zero_shot():
    adapter = CLIPAdapter(TEXT, 10.0, zero_init=True, alpha=0.5)
    expected = zero_shot_logits(IMAGES, TEXT, 10.0)
    torch.testing.assert_close(adapter(IMAGES), expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(preset='best'), 'preset must be one of paper, released'),
        (dict(alpha=1.5), 'alpha must be from 0 to 1'),
        (dict(alpha=0.0, learn_ratio=True), 'neither 0 nor 1 with learn_ratio'),
        (dict(visual=False), 'nothing to learn'),
        (dict(text=True, learn_classifier=True), 'both learn the text features'),
        (dict(zero_init=True, second_relu=True), 'no gradient'),
        (dict(reduction=64), 'reduction must be from 1 to 32'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CLIPAdapter(TEXT, 10.0, **options)


def test_wrong_width_of_features():
    adapter = CLIPAdapter(TEXT, 10.0)
    with pytest.raises(ValueError, match=r'must be \(N, 32\).*got \(5, 16\)'):
        adapter(IMAGES[:, :16])


# --- Encoder ----------------------------------------------------------------------


def test_encoder_is_frozen_and_in_eval(encoder):
    assert encoder.train() is encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert (encoder.embed_dims, encoder.image_size) == (16, 32)
    (features,) = encoder(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 16)
    assert encoder(features)[0] is features


def test_prompt_ensemble_is_the_mean_of_normalised_features(encoder):
    names, prompts = ['cat', 'sea_lake'], ['a {}.', 'the {}.']
    single = [encoder.encode_classes(names, [prompt]) for prompt in prompts]
    expected = F.normalize((single[0] + single[1]) / 2, dim=-1)
    torch.testing.assert_close(encoder.encode_classes(names, prompts), expected)
    same = encoder.encode_classes(['cat', 'sea lake'], prompts)
    assert torch.equal(encoder.encode_classes(names, prompts), same)


def test_digest_depends_on_the_weights(tiny_clip, encoder):
    assert OpenCLIPEncoder(**tiny_clip).digest() == encoder.digest()
    assert OpenCLIPEncoder(tiny_clip['model']).digest() != encoder.digest()


@pytest.mark.parametrize(
    ('model', 'tag', 'right'),
    [
        ('RN50', 'openai', 'RN50-quickgelu'),
        ('ViT-B-16', 'openai', 'ViT-B-16-quickgelu'),
        ('ViT-B-32-quickgelu', 'laion2b_s34b_b79k', 'ViT-B-32'),
    ],
)
def test_error_of_wrong_gelu_names_the_right_model(model, tag, right):
    with pytest.raises(ValueError, match=f"use model='{right}'"):
        OpenCLIPEncoder(model, tag)


def test_bad_arguments_of_the_encoder(tiny_clip, encoder):
    with pytest.raises(ValueError, match="no model 'RN51'"):
        OpenCLIPEncoder('RN51')
    with pytest.raises(ValueError, match="'opnai' is neither a file nor a tag"):
        OpenCLIPEncoder('RN50-quickgelu', 'opnai')
    with pytest.raises(FileNotFoundError, match='no model configuration'):
        OpenCLIPEncoder('none.json')
    half = OpenCLIPEncoder(**tiny_clip, amp='float16')
    with pytest.raises(ValueError, match='float16 does not run on the CPU'):
        half(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match='float16 does not run on the CPU'):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.float16))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    import open_clip

    def create_model(*args, **kwargs):
        raise RuntimeError('Failed to download weights')

    monkeypatch.setattr(open_clip, 'create_model', create_model)
    with pytest.raises(FileNotFoundError, match='give its file as pretrained'):
        OpenCLIPEncoder('RN50-quickgelu', 'openai')


def test_bfloat16_is_close_to_float32(tiny_clip, encoder):
    images = torch.randn(4, 3, 32, 32)
    low, full = (
        OpenCLIPEncoder(**tiny_clip, amp=amp)(images)[0] for amp in ('bfloat16', None)
    )
    assert torch.equal(full, encoder(images)[0])
    assert not torch.equal(low, full)
    assert F.cosine_similarity(low, full).min() > 0.99

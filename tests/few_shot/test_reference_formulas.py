"""The methods against the formulas of their papers, written plainly in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot.methods import METHODS, FewShotData
from dsnet_mm.few_shot.methods.training import RECIPE, train

CLASSES, WIDTH, SHOTS, SCALE = 5, 12, 3, 30.0


def make_data(views=1, shots=SHOTS, seed=0, **more):
    """Random features in float64."""
    rng = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    text = F.normalize(draw(CLASSES, WIDTH), dim=-1)
    labels = torch.arange(CLASSES).repeat(shots)
    features = 4 * (text[labels] + 0.4 * draw(views, len(labels), WIDTH))
    names = tuple(f'class {k}' for k in range(CLASSES))
    train = Features(features, labels)
    return FewShotData(train, shots, text, SCALE, names, seed=seed, **more)


def logits_of(classifier):
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(20, WIDTH, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        return classifier.double()(x), F.normalize(x, dim=-1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def probabilities(logits):
    return torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)


@pytest.mark.parametrize('start', [1.0, 3.0])
@pytest.mark.parametrize('name', ['linear_probe_zs', 'clap'])
def test_zs_lp_and_clap(name, start):
    """Three steps of SGD with momentum on the prototypes, by hand."""
    data = make_data(text_length=start)
    f, y = F.normalize(data.train.features[0], dim=-1), data.train.labels
    t = data.text_features
    one_hot = F.one_hot(y).double()
    multiplier = torch.zeros(CLASSES, dtype=torch.float64)
    if name == 'clap':
        multiplier = (probabilities(SCALE * f @ t.t()) * one_hot).sum(0) / SHOTS
    p, speed = start * t, torch.zeros_like(t)
    for step in range(3):
        length = p.norm(dim=1, keepdim=True)
        unit = p / length
        error = (probabilities(SCALE * f @ unit.t()) - one_hot) / len(y)
        towards = SCALE * error.t() @ f
        gradient = (towards - (towards * unit).sum(1, keepdim=True) * unit) / length
        gradient += 2 / CLASSES * multiplier[:, None] * (p - start * t)
        speed = 0.9 * speed + gradient
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 3)) if step else 1e-5
        p = p - lr * speed
    method = METHODS[name]
    actual, x = logits_of(method.fit(data, epochs=3))
    close(actual, SCALE * x @ F.normalize(p, dim=-1).t())
    assert (method.defaults['lr'], method.defaults['epochs']) == (0.1, 300)


def test_lp_plus_plus():
    data = make_data()
    f, y = F.normalize(data.train.features[0], dim=-1), data.train.labels
    t, one_hot = data.text_features, F.one_hot(y).double()
    w, b = one_hot.t() @ f, torch.zeros(CLASSES, dtype=torch.float64)
    alpha = torch.full_like(b, 250 * (f * t[y]).sum(1).mean().item())
    lr = 4 * len(y) / torch.linalg.eigvalsh(f.t() @ f).max()
    alpha_lr = len(y) / (4 * (f @ t.t()).square().sum(0).max())
    total, w_speed, b_speed = torch.zeros_like(b), 0, 0
    for step in range(4):
        error = probabilities(f @ w.t() + b + alpha * (f @ t.t())) - one_hot
        error /= len(y)
        total = total + (error * (f @ t.t())).sum(0)
        w_speed = 0.9 * w_speed + error.t() @ f
        b_speed = 0.9 * b_speed + error.sum(0)
        w, b = w - lr * w_speed, b - lr * b_speed
        if step % 2 == 1:
            alpha = alpha - alpha_lr * total
    fit = METHODS['lp++'].fit
    actual, x = logits_of(fit(data, iterations=4, momentum=0.9, alpha_every=2))
    close(actual, x @ w.t() + b + alpha * (x @ t.t()))


def test_gda():
    data = make_data(views=2)
    t = data.text_features
    f = F.normalize(data.train.features, dim=-1)
    by_class = [f[:, data.train.labels == k].reshape(-1, WIDTH) for k in range(CLASSES)]
    means = torch.stack([rows.mean(0) for rows in by_class])
    centred = torch.cat(
        [rows - mean for rows, mean in zip(by_class, means, strict=True)]
    )
    count = len(centred)
    assert count == 2 * SHOTS * CLASSES
    covariance = centred.t() @ centred / (count - 1)
    ridge = covariance.trace() * torch.eye(WIDTH, dtype=torch.float64)
    inverse = WIDTH * torch.linalg.inv((count - 1) * covariance + ridge)
    actual, x = logits_of(METHODS['gda'].fit(data, alpha=0.3))
    bias = -0.5 * torch.stack([m @ inverse @ m for m in means])

    def spread(logits):
        return (logits - logits.mean(1, keepdim=True)).square().mean(1).sqrt().mean()

    rows = f.reshape(-1, WIDTH)
    alpha = 0.3 * spread(SCALE * rows @ t.t())
    alpha = alpha / spread(rows @ inverse @ means.t() + bias)
    close(actual, SCALE * x @ t.t() + alpha * (x @ inverse @ means.t() + bias))

    copies = replace(data.train, features=data.train.features.repeat(5, 1, 1))
    copied = METHODS['gda'].fit(replace(data, train=copies), alpha=0.3)
    with_copies, _ = logits_of(copied)
    moved = [y - SCALE * x @ t.t() for y in (with_copies, actual)]
    assert 0.9 < moved[0].norm() / moved[1].norm() < 1.1, 'views are no new images'

    single = make_data(shots=1)
    actual, x = logits_of(METHODS['gda'].fit(single, alpha=0.3))
    close(actual, SCALE * x @ t.t())


def test_proker():
    data = make_data()
    t, f = data.text_features, F.normalize(data.train.features[0], dim=-1)
    beta, lmbda = 1.5, 0.2

    def kernel(a, b):
        return torch.exp(-beta / 2 * torch.cdist(a, b).square())

    target = F.one_hot(data.train.labels).double() - f @ t.t()
    identity = torch.eye(len(f), dtype=torch.float64)
    values = torch.linalg.inv(kernel(f, f) / lmbda + identity) @ target
    actual, x = logits_of(METHODS['proker'].fit(data, beta=beta, lmbda=lmbda))
    close(actual / SCALE, x @ t.t() + kernel(x, f) @ values)


def test_linear_adapter():
    """The first step of Adam moves each weight by lr g / (|g| + eps)."""
    data = make_data()
    f, y, t = data.train.features[0], data.train.labels, data.text_features
    matrix = torch.eye(WIDTH, dtype=torch.float64)
    g = []
    for step in range(2):  # the penalty has no gradient at the first
        mapped = f @ matrix.t()
        length = mapped.norm(dim=1, keepdim=True)
        unit = mapped / length
        error = (probabilities(SCALE * unit @ t.t()) - F.one_hot(y)) / len(y)
        towards = SCALE * error @ t
        towards = (towards - (towards * unit).sum(1, keepdim=True) * unit) / length
        identity = torch.eye(WIDTH, dtype=torch.float64)
        g.append(towards.t() @ f + 2 / SHOTS * (matrix - identity))
        mean = sum(0.1 * 0.9 ** (step - i) * g[i] for i in range(step + 1))
        square = sum(
            0.001 * 0.999 ** (step - i) * g[i].square() for i in range(step + 1)
        )
        mean /= 1 - 0.9 ** (step + 1)
        square /= 1 - 0.999 ** (step + 1)
        lr = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 2))
        matrix = matrix - lr * mean / (square.sqrt() + 1e-4)
    method = METHODS['linear_adapter']
    actual, x = logits_of(method.fit(data, lr=1e-2, epochs=2))
    close(actual, SCALE * F.normalize(x @ matrix.t(), dim=-1) @ t.t())


def test_cross_modal_batches_are_half_text():
    """With all text features and as many images in a batch, by hand."""
    data = make_data(shots=1)
    f, t = F.normalize(data.train.features[0], dim=-1), data.text_features
    x, y = torch.cat([f, t]), torch.cat([data.train.labels, torch.arange(CLASSES)])
    error = (probabilities(SCALE * x @ t.t()) - F.one_hot(y)) / len(y)
    w = t - 0.01 * SCALE * error.t() @ x
    fit = METHODS['cross_modal'].fit
    recipe = dict(optimizer='SGD', lr=0.01, weight_decay=0.0)
    actual, z = logits_of(fit(data, iterations=1, batch_size=2 * CLASSES, **recipe))
    close(actual, SCALE * z @ w.t())


def test_released_clip_adapter():
    """A step of the released network: two ReLUs, ratio 0.2, SGD."""
    data = replace_float(make_data())
    fit = METHODS['clip_adapter_released'].fit
    options = dict(batch_size=None, warmup_epochs=0)
    start = fit(data, **options, epochs=0).double()
    w1, w2 = (start.visual_adapter[i].weight.detach().clone() for i in (0, 2))
    w1.requires_grad_(), w2.requires_grad_()
    f, t = data.train.features[0].double(), data.text_features.double()
    mixed = 0.2 * ((f @ w1.t()).relu() @ w2.t()).relu() + 0.8 * f
    cosine = mixed @ t.t() / mixed.norm(dim=1, keepdim=True)
    F.cross_entropy(SCALE * cosine, data.train.labels).backward()
    step = fit(data, **options, epochs=1).double()
    for i, w in ((0, w1), (2, w2)):
        expected = -0.002 * (w.grad + 5e-4 * w)
        moved = step.visual_adapter[i].weight - w
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


def test_default_clip_adapter():
    """A step of AdamW on the adapter and the class residual, kept near zero-shot."""
    data, method = replace_float(make_data()), METHODS['clip_adapter']
    start = method.fit(data, batch_size=None, iterations=0).double()
    w1, w2 = (start.visual_adapter[i].weight.detach().clone() for i in (0, 2))
    residual = start.residual.detach().clone()
    assert residual.any()
    for parameter in (w1, w2, residual):
        parameter.requires_grad_()
    f, t = data.train.features[0].double(), data.text_features.double()
    mixed = 0.2 * (f @ w1.t()).relu() @ w2.t() + 0.8 * f
    unit = mixed / mixed.norm(dim=1, keepdim=True)
    zero_shot = f / f.norm(dim=1, keepdim=True)
    moved = (unit - zero_shot).square().sum(1)
    y = data.train.labels
    lost = F.cross_entropy(SCALE * zero_shot @ t.t(), y).item()
    u = max(0.0, 1 - lost / math.log(len(t)))
    loss = F.cross_entropy(SCALE * unit @ (t + 0.05 * residual).t(), y)
    (loss + 20.0 * u * moved.mean()).backward()
    step = method.fit(data, batch_size=None, iterations=1).double()
    layers = step.visual_adapter
    for new, w in (
        (layers[0].weight, w1),
        (layers[2].weight, w2),
        (step.residual, residual),
    ):
        expected = -1e-3 * (w.grad / (w.grad.abs() + 1e-8) + 0.01 * w)
        torch.testing.assert_close(new - w, expected, rtol=1e-2, atol=1e-6)


def replace_float(data):
    return replace(
        data,
        train=Features(data.train.features.float(), data.train.labels),
        text_features=data.text_features.float(),
    )


def test_tip_adapter_keys_are_means_of_raw_features():
    data = make_data(views=4)
    keys = METHODS['tip_adapter'].fit(data, alpha=1.0, beta=1.0).keys
    close(keys, F.normalize(data.train.features.mean(0), dim=-1))


@pytest.mark.parametrize('length', [1.0, 10.0])
def test_task_res_recipe(length):
    """Text features of the tower's length, and Dassl's schedule, by torch itself."""
    data, method = make_data(text_length=length), METHODS['task_res']
    f, t = F.normalize(data.train.features[0], dim=-1), data.text_features
    residual = torch.zeros_like(t, requires_grad=True)
    adam = torch.optim.Adam([residual], 2e-3, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 5)
    for epoch in range(5):
        adam.param_groups[0]['lr'] = cosine.get_last_lr()[0] if epoch else 1e-5
        unit = F.normalize(length * t + 0.5 * residual, dim=-1)
        adam.zero_grad()
        F.cross_entropy(SCALE * f @ unit.t(), data.train.labels).backward()
        adam.step()
        if epoch:
            cosine.step()
    expected = F.normalize(length * t + 0.5 * residual.detach(), dim=-1)
    actual, x = logits_of(method.fit(data, epochs=5, batch_size=None))
    close(actual, SCALE * x @ expected.t())
    wanted = dict(batch_size=256, epochs={1: 100, 8: 200}, drop_last=True)
    assert wanted.items() <= method.defaults.items()


def test_batches_that_are_not_full_are_dropped_where_dassl_drops_them():
    data = make_data()  # 15 images: batches of 4, 4, 4 and 3

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.sizes = torch.nn.Parameter(torch.ones(())), []

        def loss(self, features, labels):
            self.sizes.append(len(labels))
            return self.weight

    recipe = dict(RECIPE, lr=0.1, epochs=2, batch_size=4)
    for drop_last, sizes in ((False, [4, 4, 4, 3]), (True, [4, 4, 4])):
        train(spy := Spy(), data, **dict(recipe, drop_last=drop_last))
        assert spy.sizes == 2 * sizes


def test_hoso_learns_the_ratio_on_held_out_images():
    data = replace_float(make_data(shots=4))
    method = METHODS['clip_adapter_hoso']
    adapter = method.fit(data, iterations=40)
    assert adapter.alpha != method.defaults['alpha']
    assert adapter.options['alpha'] == pytest.approx(adapter.alpha)
    fixed = method.fit(replace_float(make_data(shots=1)), iterations=40)
    assert fixed.alpha == method.defaults['alpha']


def test_seed_reaches_the_methods():
    data = replace_float(make_data(views=3))
    for name in ('clip_adapter', 'linear_probe_zs', 'task_res', 'tip_adapter_f'):
        method = METHODS[name]
        options = dict(epochs=3) if method.defaults['epochs'] else {}
        first, same, other = (
            logits_of(method.fit(replace(data, seed=seed), **options))[0]
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, same), name
        assert not torch.allclose(first, other), name

"""SS-Text, TransCLIP, base-to-new, and the test of a run on other data sets."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dsnet_mm.datasets.feature_file import read_feature_file
from dsnet_mm.datasets.features import Features
from dsnet_mm.few_shot import METHODS, FewShotConfig, run, transfer
from dsnet_mm.few_shot.base_to_new import with_classes
from dsnet_mm.few_shot.choice import choose
from dsnet_mm.few_shot.deployment import load_classifier, read_classifier
from dsnet_mm.few_shot.methods import FewShotData
from dsnet_mm.few_shot.report import write_report

CLASSES, WIDTH, SCALE = 5, 12, 30.0


def draw(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def unequal(counts, unlabelled=40):
    """Random data in float64, with another number of images for each class."""
    text = F.normalize(draw(CLASSES, WIDTH), dim=-1)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(counts))
    features = 4 * (text[labels] + 0.4 * draw(2, len(labels), WIDTH, seed=1))
    names = tuple(map(str, range(CLASSES)))
    seen = text[torch.arange(unlabelled) % CLASSES]
    seen = 3 * (seen + 0.3 * draw(unlabelled, WIDTH, seed=2))
    train = Features(features, labels)
    return FewShotData(train, 1, text, SCALE, names, unlabelled=seen)


@pytest.mark.parametrize(
    ('counts', 'scale'), [((3, 1, 0, 2, 4), 30.0), ((1100, 1, 2, 1, 1), 0.001)]
)
def test_ss_text_is_the_minimum_of_its_objective(counts, scale):
    """The mean of -logit_scale w_y f, and lambda_k / 2 |w_k - t_k|^2 of all classes."""
    data = replace(unequal(counts), logit_scale=scale)
    f = F.normalize(F.normalize(data.train.features, dim=-1).mean(0), dim=-1)
    w = data.text_features.clone().requires_grad_()
    (-scale * (w[data.train.labels] * f).sum(-1).mean()).backward()
    penalty = torch.tensor([max(1 / n, 0.001) if n else 1 for n in counts])
    expected = F.normalize(w - w.grad / penalty[:, None], dim=-1)
    actual = METHODS['ss_text'].fit(data).text_features
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['transclip_zs', 'transclip'])
def test_transclip(name):
    """Loops over images and classes, and a dense matrix of neighbours."""
    data, gamma = unequal((3, 1, 2, 2, 4)), 0.2
    f, labels = F.normalize(data.unlabelled, dim=-1), data.train.labels
    s = F.normalize(F.normalize(data.train.features, dim=-1).mean(0), dim=-1)
    shots = name == 'transclip'
    s, labels = (s, labels) if shots else (s[:0], labels[:0])
    p = (SCALE * f @ data.text_features.t()).softmax(1)
    rows, n, power = torch.cat([f, s]), len(f), 0.5 if shots else 1.0
    w = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows)):
        others = [j for j in range(n) if j != i]
        for j in sorted(others, key=lambda j: -(rows[i] @ f[j]))[:3]:
            w[i, j] = rows[i] @ f[j]
    z = torch.cat([p, F.one_hot(labels, CLASSES).double()])
    mu = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    for k in range(CLASSES):
        best = p[:, k].topk(8).indices
        mu[k] = s[labels == k].sum(0) if shots else p[best, k] @ f[best]
    mu, v = F.normalize(mu, dim=-1), torch.full((WIDTH,), 1 / WIDTH).double()
    weight = torch.full((len(rows),), 1 / n).double()
    weight[n:] = 50 * gamma / max(len(s), 1)
    for step in range(11):
        if step:
            mu = F.normalize((weight[:, None] * z).t() @ rows, dim=-1)
            parts = weight[:, None] * z, (rows[:, None] - mu).square()
            v = torch.einsum('ik,ikd->d', *parts) / weight.sum()
        g = -0.5 * ((f[:, None] - mu).square() / v).sum(-1)
        for _ in range(5):
            score = p**power * torch.exp((g + 50 / 6 * ((w + w.t()) @ z)[:n]) / 50)
            z = torch.cat([score / score.sum(1, keepdim=True), z[n:]])
    fitted = METHODS[name].fit(data, **dict(shot_weight=gamma) if shots else {})
    order = torch.randperm(n)  # a seen image has its own probabilities
    actual = fitted(5 * data.unlabelled[order]).softmax(1)
    torch.testing.assert_close(actual, z[:n][order], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match='unlabelled'):
        METHODS[name].fit(replace(data, unlabelled=None))


@pytest.fixture
def file(tmp_path):
    """Features of five classes: 4 training, 2 validation and 8 test images of each."""
    text, tensors = F.normalize(draw(CLASSES, WIDTH), dim=-1), {}
    for seed, (part, count) in enumerate({'train_4': 4, 'val': 2, 'test': 8}.items()):
        labels = torch.arange(CLASSES).repeat_interleave(count)
        noise = 0.35 * draw(len(labels), WIDTH, seed=seed)
        tensors |= {f'{part}_features': text[labels] + noise, f'{part}_labels': labels}
    text = F.normalize(text + 0.2 * draw(CLASSES, WIDTH, seed=9), dim=-1)
    about = {'class_names': json.dumps([*'abcde']), 'logit_scale': '30'}
    path = tmp_path / 'five.safetensors'
    save_file({**tensors, 'text_features': text}, path, about)
    return path


def test_transductive_methods_of_a_run(file, tmp_path):
    options = dict(methods=('transclip', 'ss_text'), shots=(2,), seeds=(1,))
    config = FewShotConfig(features=str(file), **options)
    records = run(config, tmp_path / 'one', quiet=True)
    log = (tmp_path / 'one/run.log').read_text()
    before, after = log.split('test split opened')
    assert 'fitted ss_text_2' in before and 'fitted transclip' not in before
    assert '2 classifiers are fixed' in after and 'fitted transclip_2' in after
    for method in METHODS.values():
        assert method.transductive == ('sees unlabelled test' in method.title)
    scores = dict(val_loss=1.0, val_zero_shot=None)
    best = [{**r, **scores, 'val_accuracy': len(r['method'])} for r in records]
    assert choose(best).record['method'] == 'ss_text'

    about = json.loads((tmp_path / 'one/run.json').read_text())
    del about['config']['base_to_new']  # an older version did not have it
    (tmp_path / 'one/run.json').write_text(json.dumps(about))
    assert run(config, tmp_path / 'one', quiet=True) == records

    data = read_feature_file(file)
    test = replace(data.test, labels=data.test.labels.flip(0))  # they are not used
    replace(data, test=test).write(tmp_path / 'other')
    run(replace(config, features=str(tmp_path / 'other')), tmp_path / 'two', quiet=True)
    name = 'classifiers/transclip_2shot_seed1.safetensors'
    one, two = (read_classifier(tmp_path / part / name)[0] for part in ('one', 'two'))
    assert torch.equal(one.log_probabilities, two.log_probabilities)


def test_base_to_new(file, tool, tmp_path):
    names = ('clip_adapter', 'clip_adapter_both', 'linear_adapter', 'gda')
    options = dict(shots=(2,), seeds=(1,), methods=names, base_to_new=True)
    short = {name: dict(iterations=9, epochs=None) for name in names[:3]}
    config = FewShotConfig(features=str(file), overrides=short, **options)
    records = run(config, tmp_path / 'run', quiet=True)
    assert [r['method'] for r in records] == ['zero_shot', *names[:3]]
    text, data = write_report(tmp_path / 'run', records), read_feature_file(file)
    f, new_text = data.test.features[0], data.text_features[3:]
    for record in records:
        path = tmp_path / f'run/classifiers/{record["name"]}.safetensors'
        fitted, about = read_classifier(path)
        assert about['class_names'] == [*'abc']
        other = with_classes(fitted, new_text)
        if record['method'] == 'clip_adapter_both':  # both adapters go with it
            t = 0.2 * fitted.text_adapter(new_text) + 0.8 * new_text
            expected = SCALE * fitted.adapt(f)[0] @ F.normalize(t, dim=-1).t()
            torch.testing.assert_close(other(f), expected)
        for kind, classifier, part in (
            ('test', fitted, slice(0, 24)),
            ('new', other, slice(24, 40)),
        ):
            labels = data.test.labels[part] - data.test.labels[part.start]
            right = (classifier(f[part]).argmax(1) == labels).double().mean().item()
            assert record[kind]['accuracy'] == pytest.approx(100 * right)
        a, b = record['test']['accuracy'], record['new']['accuracy']
        row = f'{METHODS[record["method"]].title} | {a:.2f} | {b:.2f}'
        assert f'| {row} | {2 * a * b / (a + b):.2f} |' in text
    assert 'cannot classify new classes: gda' in text
    options = ('--shots', 2, '--seeds', 1, '--methods', 'gda', '--base-to-new')
    tool('run', '--features', file, *options, '--work-dir', tmp_path / 'by_command')
    assert '## New classes' in (tmp_path / 'by_command/results.md').read_text()


def test_all_methods_of_a_run(tool, tiny_clip, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(views=0, cache_dir='cache', selection='fixed', oracle=('gda',))
    config = FewShotConfig(
        dataset=str(image_folder),
        **tiny_clip,
        **options,
        methods=('tip_adapter', 'gda', 'transclip_zs'),
        shots=(1, 4),
        seeds=(1, 2),
    )
    run(config, 'mine', quiet=True)
    for name, last in (('red', 5), ('blue', 9)):
        for folder in ('near', 'far')[: 1 + (name == 'red')]:
            for i in range(last):
                (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(image_folder / name / f'{i}.png', f'{folder}/{name}')
    models = [x for k, v in tiny_clip.items() for x in (f'--{k}', v)]
    test = ('test', 'mine', 'near', 'far', '--cache-dir', 'cache', *models)
    tool(*test)
    tool(*test)  # the same test may be repeated
    found = json.loads((tmp_path / 'work_dirs/test_mine/test.json').read_text())
    assert [*found['rows']] == ['Zero-shot CLIP', 'GDA', 'Tip-Adapter']
    first = load_classifier('mine/classifiers/gda_4shot_seed1.safetensors', **tiny_clip)
    rows = found['rows']['GDA']
    for name in ('near', 'far'):
        score = transfer(first, name, cache_dir='cache').score
        assert rows[0][name] == pytest.approx(score.accuracy)
    near, far = (sum(row[name] for row in rows) / 2 for name in ('near', 'far'))
    text = (tmp_path / 'work_dirs/test_mine/test.md').read_text()
    assert f'| {near:.2f} | {far:.2f} | {(near + far) / 2:.2f} |' in text
    with pytest.raises(SystemExit, match='--out'):
        tool('test', 'mine', 'near', '--cache-dir', 'cache', *models)
    with pytest.raises(SystemExit, match=r'cache.*run'):
        tool('test', 'cache', 'near', *models)

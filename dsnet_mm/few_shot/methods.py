"""The methods: what each fits, and the values of its paper or repository.

A method is a function from few-shot features and hyper-parameters to a classifier of
image features. Adding one is adding an entry to ``METHODS``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.models.heads import CLIPAdapter

from .classifiers import CosineClassifier, LinearClassifier, TipAdapter
from .features import Features


@dataclass(frozen=True)
class FewShotData:
    """What a method is fitted to.

    Attributes:
        train: Features of the training pictures, with augmented views.
        shots: Training pictures of each class.
        text_features: Zero-shot classifier (K, D), rows of length 1.
        logit_scale: Factor of the cosine.
        class_names: Names by label.
        encoder: The towers, for methods that learn in the text tower.
    """

    train: Features
    shots: int
    text_features: Tensor
    logit_scale: float
    class_names: tuple[str, ...]
    encoder: OpenCLIPEncoder | None = None

    def subset(self, index: Tensor, shots: int) -> 'FewShotData':
        """The same with a part of the training pictures."""
        return replace(self, train=self.train.take(index), shots=shots)


@dataclass(frozen=True)
class Method:
    """A few-shot method.

    Attributes:
        title: Name in tables.
        fit: Data and hyper-parameters to a classifier.
        defaults: Hyper-parameters where nothing is selected.
        grid: Values tried for some of them, each combination fitted anew.
        late_grid: Values tried for attributes of the fitted classifier.
        source: Where the defaults come from.
    """

    title: str
    fit: Callable[..., nn.Module]
    defaults: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    late_grid: Mapping[str, Sequence] = field(default_factory=dict)
    source: str = ''


# --- Training ---------------------------------------------------------------------


def coop_epochs(shots: int) -> int:
    """Epochs of CoOp by shots (its ImageNet has 50 always)."""
    return 50 if shots == 1 else 100 if shots <= 4 else 200


def train(
    model: nn.Module,
    data: FewShotData,
    *,
    optimizer: str = 'AdamW',
    lr: float,
    epochs: int | str,
    batch_size: int | None = 256,
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    warmup_epochs: int = 0,
    decay_by: str = 'iteration',
    seed: int = 0,
) -> nn.Module:
    """Minimises the cross-entropy over all parameters that require a gradient.

    Each picture is seen once an epoch, in a random one of its views. The learning
    rate falls along a cosine.

    Args:
        model: Image features (N, D) to logits (N, K).
        data: What to train on.
        optimizer: ``'SGD'`` (momentum 0.9), ``'Adam'`` or ``'AdamW'``.
        lr: Learning rate.
        epochs: Their number, or ``'coop'`` for :func:`coop_epochs`.
        batch_size: Pictures of a step, None for all.
        weight_decay: Weight decay.
        eps: Constant of Adam and AdamW.
        warmup_epochs: First epochs, at a learning rate of 1e-5.
        decay_by: ``'iteration'`` or ``'epoch'``.
        seed: Seed of order and views.

    Returns:
        The model, in eval mode.
    """
    if epochs == 'coop':
        epochs = coop_epochs(data.shots)
    features, labels = data.train.features, data.train.labels
    views, count, _ = features.shape
    batch_size = min(batch_size or count, count)
    steps = -(-count // batch_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer == 'SGD':
        optim = torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay)
    else:
        kind = {'Adam': torch.optim.Adam, 'AdamW': torch.optim.AdamW}[optimizer]
        optim = kind(parameters, lr, eps=eps, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with _fast_products():
        for epoch in range(epochs):
            order = torch.randperm(count, generator=generator)
            view = torch.randint(views, (count,), generator=generator)
            for step, index in enumerate(order.split(batch_size)):
                done = epoch + (step / steps if decay_by == 'iteration' else 0)
                now = lr * 0.5 * (1 + math.cos(math.pi * done / epochs))
                for group in optim.param_groups:
                    group['lr'] = 1e-5 if epoch < warmup_epochs else now
                logits = model(features[view[index], index])
                optim.zero_grad()
                F.cross_entropy(logits, labels[index]).backward()
                optim.step()
    return model.eval()


@contextmanager
def _fast_products() -> Iterator[None]:
    """Matrix products of bfloat16 numbers added up in float32, where a CPU has them.

    Cosines keep four digits, and training takes half the time.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- Methods ----------------------------------------------------------------------


def fit_zero_shot(data: FewShotData) -> nn.Module:
    """Zero-shot CLIP."""
    return CosineClassifier(data.text_features, data.logit_scale)


def fit_linear_probe(data: FewShotData, *, weight_decay: float) -> nn.Module:
    """Logistic regression on features of length 1, by L-BFGS from zero.

    Args:
        data: What to fit to; of several views their mean is taken.
        weight_decay: Weight of half the squared norm of the weights.
    """
    features = mean_features(data.train)
    classes, width = data.text_features.shape
    model = LinearClassifier(features.new_zeros(classes, width))
    optim = torch.optim.LBFGS(
        model.parameters(), max_iter=200, line_search_fn='strong_wolfe'
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = F.cross_entropy(model(features), data.train.labels)
        loss = loss + 0.5 * weight_decay * model.weight.square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    return model.eval()


def fit_linear_probe_zs(data: FewShotData, **recipe) -> nn.Module:
    """Linear layer that starts as the zero-shot classifier (ZS-LP of CLAP)."""
    return train(
        LinearClassifier(data.logit_scale * data.text_features), data, **recipe
    )


def fit_clip_adapter(
    data: FewShotData,
    *,
    preset: str = 'paper',
    visual: bool = True,
    text: bool = False,
    alpha: float | None = None,
    learn_ratio: bool = False,
    **recipe,
) -> nn.Module:
    """CLIP-Adapter; ``alpha`` is beta too where there is a text adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.get('seed', 0))
        adapter = CLIPAdapter(
            data.text_features,
            data.logit_scale,
            preset,
            visual=visual,
            text=text,
            alpha=alpha,
            beta=0.2 if alpha is None else alpha,
            learn_ratio=learn_ratio,
        )
    return train(adapter, data, **recipe)


def fit_tip_adapter(data: FewShotData, *, alpha: float, beta: float) -> nn.Module:
    """Tip-Adapter without training."""
    return TipAdapter(
        mean_features(data.train),
        data.train.labels,
        data.text_features,
        data.logit_scale,
        alpha,
        beta,
    )


def fit_tip_adapter_f(
    data: FewShotData, *, alpha: float, beta: float, **recipe
) -> nn.Module:
    """Tip-Adapter whose keys are trained."""
    model = TipAdapter(
        mean_features(data.train),
        data.train.labels,
        data.text_features,
        data.logit_scale,
        alpha,
        beta,
        learn_keys=True,
    )
    return train(model, data, **recipe)


class TaskResidual(nn.Module):
    """Text features plus a learnt residual (TaskRes, arXiv 2211.10277).

    Args:
        text_features: Zero-shot classifier (K, D).
        logit_scale: Factor of the cosine.
        alpha: Weight of the residual.
    """

    def __init__(self, text_features: Tensor, logit_scale: float, alpha: float) -> None:
        super().__init__()
        self.text_features, self.logit_scale, self.alpha = (
            text_features,
            logit_scale,
            alpha,
        )
        self.residual = nn.Parameter(torch.zeros_like(text_features))

    def classifier(self) -> Tensor:
        """Adapted text features (K, D), rows of length 1."""
        return F.normalize(self.text_features + self.alpha * self.residual, dim=-1)

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        return self.logit_scale * f @ self.classifier().t()


def fit_task_res(data: FewShotData, *, alpha: float, **recipe) -> nn.Module:
    """TaskRes, folded into a classifier of text features."""
    model = train(
        TaskResidual(data.text_features, data.logit_scale, alpha), data, **recipe
    )
    return _folded(model, data)


class PromptLearner(nn.Module):
    """Learnt context words before the class name (CoOp, arXiv 2109.01134).

    One context for all classes, class name at the end. Gradients run through the
    frozen text tower.

    Args:
        encoder: The towers.
        class_names: Names by label.
        n_ctx: Number of context words.
    """

    def __init__(
        self, encoder: OpenCLIPEncoder, class_names: Sequence[str], n_ctx: int
    ) -> None:
        super().__init__()
        texts = [f'{" ".join(["X"] * n_ctx)} {name}.' for name in class_names]
        self.tokens = encoder.tokenizer(texts)
        if (self.tokens != 0).sum(1).max() == self.tokens.shape[1]:
            raise ValueError(
                f'{n_ctx} context words and the class names fill the '
                f'{self.tokens.shape[1]} tokens of the text tower; use a smaller n_ctx.'
            )
        self.encoder = [encoder]  # not a submodule: it is not learnt
        self.logit_scale = encoder.logit_scale
        text_tower = getattr(encoder.clip, 'text', encoder.clip)
        self.embedding = [text_tower.token_embedding]
        width = text_tower.token_embedding.embedding_dim
        self.context = nn.Parameter(0.02 * torch.randn(n_ctx, width))

    def classifier(self) -> Tensor:
        """Text features (K, D), rows of length 1."""
        n_ctx = len(self.context)

        def put_context(module: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
            context = self.context.to(embedded).expand(len(embedded), -1, -1)
            return torch.cat(
                [embedded[:, :1], context, embedded[:, 1 + n_ctx :]], dim=1
            )

        hook = self.embedding[0].register_forward_hook(put_context)
        try:
            tokens = self.tokens.to(self.embedding[0].weight.device)
            features = self.encoder[0].encode_text(tokens).to(self.context)
            return F.normalize(features, dim=-1)
        finally:
            hook.remove()

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        return self.logit_scale * f @ self.classifier().t()


def fit_coop(data: FewShotData, *, n_ctx: int, **recipe) -> nn.Module:
    """CoOp, folded into a classifier of text features."""
    if data.encoder is None:
        raise ValueError('CoOp learns through the text tower and needs the encoder.')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.get('seed', 0))
        learner = PromptLearner(data.encoder, data.class_names, n_ctx)
    return _folded(train(learner, data, **recipe), data)


@torch.no_grad()
def _folded(model: TaskResidual | PromptLearner, data: FewShotData) -> CosineClassifier:
    """A model that only changes the text features, as those text features."""
    folded = CosineClassifier(model.classifier(), data.logit_scale)
    folded.num_learnt = num_learnt(model)
    return folded


def num_learnt(model: nn.Module) -> int:
    """Number of parameters that a fit has learnt."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return getattr(model, 'num_learnt', count)


def mean_features(train: Features) -> Tensor:
    """Mean over views of the features of length 1, of length 1 again, (N, D)."""
    return F.normalize(F.normalize(train.features, dim=-1).mean(0), dim=-1)


_COOP = dict(
    optimizer='SGD',
    lr=0.002,
    epochs='coop',
    batch_size=32,
    weight_decay=5e-4,
    warmup_epochs=1,
    decay_by='epoch',
)
_FAST = dict(optimizer='AdamW', lr=1e-3, epochs=100, batch_size=256)
_ALPHAS = (0.2, 0.4, 0.6, 0.8)
_FAST_GRID = dict(lr=(1e-3, 1e-4), epochs=(50, 200))
_TIP = dict(alpha=1.0, beta=1.0)
_TIP_GRID = dict(
    alpha=(0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
    beta=(0.1, 0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0),
)

METHODS: dict[str, Method] = {
    'zero_shot': Method('Zero-shot CLIP', fit_zero_shot),
    'linear_probe': Method(
        'Linear probe',
        fit_linear_probe,
        dict(weight_decay=1e-3),
        dict(weight_decay=(1e-5, 1e-4, 1e-3, 1e-2)),
        source='L-BFGS as in CLIP and CoOp; a shorter search',
    ),
    'linear_probe_zs': Method(
        'Linear probe from zero-shot',
        fit_linear_probe_zs,
        dict(optimizer='SGD', lr=0.1, epochs=300, weight_decay=0.0),
        dict(lr=(0.1, 0.01, 0.001)),
        source='ZS-LP of CLAP',
    ),
    'clip_adapter': Method(
        'CLIP-Adapter',
        fit_clip_adapter,
        dict(alpha=0.2, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='adapter of the paper, our recipe for cached features',
    ),
    'clip_adapter_learnt': Method(
        'CLIP-Adapter, learnt ratio',
        fit_clip_adapter,
        dict(alpha=0.5, learn_ratio=True, **_FAST),
        _FAST_GRID,
        source='adapter of the paper with a constant ratio that is learnt',
    ),
    'clip_adapter_text': Method(
        'CLIP-Adapter, text',
        fit_clip_adapter,
        dict(alpha=0.2, visual=False, text=True, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='text adapter of the paper, our recipe',
    ),
    'clip_adapter_both': Method(
        'CLIP-Adapter, visual and text',
        fit_clip_adapter,
        dict(alpha=0.2, text=True, **_FAST),
        dict(alpha=_ALPHAS, **_FAST_GRID),
        source='both adapters of the paper, our recipe',
    ),
    'clip_adapter_paper': Method(
        'CLIP-Adapter (paper)',
        fit_clip_adapter,
        dict(_COOP, alpha=0.2, lr=1e-5),
        dict(alpha=_ALPHAS),
        source='text of the paper: as CoOp, but learning rate 1e-5',
    ),
    'clip_adapter_released': Method(
        'CLIP-Adapter (released)',
        fit_clip_adapter,
        dict(_COOP, preset='released', alpha=0.2),
        source='released code with the commands of CoOp, alpha 0.2',
    ),
    'clip_adapter_clap': Method(
        'CLIP-Adapter (CLAP)',
        fit_clip_adapter,
        dict(
            preset='released',
            alpha=0.2,
            optimizer='SGD',
            lr=0.1,
            epochs=300,
            weight_decay=0.0,
        ),
        dict(lr=(0.1, 0.01, 0.001), alpha=_ALPHAS),
        source="CLAP's copy and grid, which there is searched on the test split",
    ),
    'clip_adapter_lp++': Method(
        'CLIP-Adapter (LP++)',
        fit_clip_adapter,
        dict(
            preset='lp++',
            alpha=0.5,
            optimizer='SGD',
            lr=0.01,
            epochs=300,
            batch_size=32,
            weight_decay=0.0,
        ),
        dict(alpha=_ALPHAS),
        source="LP++'s copy, with a schedule that falls once",
    ),
    'clip_adapter_prolip': Method(
        'CLIP-Adapter (ProLIP)',
        fit_clip_adapter,
        dict(
            preset='released',
            alpha=0.2,
            optimizer='Adam',
            lr=1e-3,
            eps=1e-4,
            epochs=300,
            batch_size=None,
            weight_decay=0.0,
        ),
        dict(alpha=_ALPHAS, lr=(1e-2, 1e-3, 1e-4, 1e-5)),
        source="ProLIP's copy, whose ratio is 1 - alpha; it has no single lr",
    ),
    'clip_adapter_cross_modal': Method(
        'CLIP-Adapter (cross-modal)',
        fit_clip_adapter,
        dict(
            preset='cross_modal',
            alpha=0.2,
            optimizer='AdamW',
            lr=1e-4,
            epochs=200,
            batch_size=8,
            weight_decay=1e-3,
        ),
        dict(lr=(1e-4, 1e-5), weight_decay=(0.0, 1e-3)),
        source="cross-modal adaptation's copy on pictures only, a shorter run",
    ),
    'tip_adapter': Method(
        'Tip-Adapter', fit_tip_adapter, _TIP, late_grid=_TIP_GRID, source='its code'
    ),
    'tip_adapter_f': Method(
        'Tip-Adapter-F',
        fit_tip_adapter_f,
        dict(_TIP, optimizer='AdamW', lr=1e-3, eps=1e-4, epochs=20),
        dict(epochs=(20, 100)),
        _TIP_GRID,
        source='its code (EuroSAT has 100 epochs)',
    ),
    'task_res': Method(
        'TaskRes',
        fit_task_res,
        dict(alpha=0.5, optimizer='Adam', lr=2e-3, epochs=200, weight_decay=0.0),
        dict(alpha=(0.5, 1.0), lr=(2e-3, 2e-4), epochs=(100, 200)),
        source='its paper: 100 epochs for 1 to 4 shots, alpha 1 for Flowers',
    ),
    'coop': Method(
        'CoOp',
        fit_coop,
        dict(_COOP, n_ctx=16),
        source='its code, 16 words, class name at the end',
    ),
}
"""All methods by name."""

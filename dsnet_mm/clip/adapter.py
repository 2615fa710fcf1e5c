"""CLIP-Adapter (arXiv 2110.04544)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRESETS: dict[str, dict] = {
    # The equations of the paper, which searches alpha. The others change some values.
    'paper': dict(
        alpha=0.2,
        bias=False,
        second_relu=False,
        input_norm=False,
        output_norm=True,
        learn_classifier=False,
        residual=False,
        keep=0.0,
    ),
    # Ours: safe without validation images, see docs/clip_adapter.md.
    'default': dict(residual=True, keep=20.0),
    # github.com/gaopengcuhk/CLIP-Adapter, also used by CLAP and ProLIP.
    'released': dict(second_relu=True),
    # CLIP-Adapter as in the paper of Tip-Adapter.
    'biased': dict(bias=True),
    # github.com/FereshteShakeri/FewShot-CLIP-Strong-Baseline.
    'lp++': dict(second_relu=True, input_norm=True, output_norm=False, alpha=0.5),
    # github.com/linzhiqiu/cross_modal_adaptation.
    'cross_modal': dict(
        second_relu=True, input_norm=True, output_norm=False, learn_classifier=True
    ),
}
"""Arguments of :class:`CLIPAdapter` in published implementations."""


RESIDUAL_SCALE = 0.05
"""Factor of the residual R. With Adam, W* moves that much slower than the adapter."""


class CLIPAdapter(nn.Module):
    r"""Classifier of frozen CLIP features with a residual bottleneck.

    The equations of the paper, with image features f and text features W::

        A_v(f) = ReLU(f W1) W2,  A_t(W) likewise
        f* = alpha A_v(f) + (1 - alpha) f
        W* = beta A_t(W) + (1 - beta) W
        logits = logit_scale * cos(f*, W*)

    With alpha and beta 0, the logits are exactly those of zero-shot CLIP.

    The preset ``'default'`` has W* = W + 0.05 R instead, with a learnt residual R of
    the class weights that :meth:`start` sets, and a second term in the :meth:`loss`.

    Args:
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        preset: One of ``PRESETS``. The other arguments override it. ``'paper'`` has the
            equations above and the cross-entropy alone.
        visual: Whether image features are adapted (paper, Eq. 3).
        text: Whether text features are adapted (paper, Eq. 4).
        reduction: Ratio of D to the width of the bottleneck.
        alpha: Weight of the visual adapter.
        beta: Weight of the text adapter.
        learn_ratio: Whether alpha and beta are learnt, with these initial values.
        bias: Whether both layers have a bias.
        second_relu: Whether a ReLU follows the second layer.
        input_norm: Whether image features are normalised before the adapter.
        output_norm: Whether image features are normalised after the sum.
        zero_init: Whether the weights of the second layer are initialised with 0, so
            that training starts from (1 - alpha) f. Otherwise they are initialised as
            in ``nn.Linear``.
        learn_classifier: Whether the text features are parameters. They are then not
            normalised.
        residual: Whether R is learnt, instead of a text adapter. It is 0 until
            :meth:`start`.
        keep: Weight of the distance from zero-shot CLIP in the :meth:`loss`.

    Attributes:
        options: All arguments except the first two, with the values of the preset.

    Raises:
        ValueError: If a value is out of range, or two arguments exclude each other.
    """

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float,
        preset: str = 'default',
        *,
        visual: bool = True,
        text: bool = False,
        reduction: int = 4,
        alpha: float | None = None,
        beta: float = 0.2,
        learn_ratio: bool = False,
        bias: bool | None = None,
        second_relu: bool | None = None,
        input_norm: bool | None = None,
        output_norm: bool | None = None,
        zero_init: bool = False,
        learn_classifier: bool | None = None,
        residual: bool | None = None,
        keep: float | None = None,
    ) -> None:
        given = locals()
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(
                f'preset must be one of {", ".join(PRESETS)}, got {preset!r}.'
            )
        of_preset = PRESETS['paper'] | PRESETS[preset]
        of_preset['residual'] &= not text and not learn_classifier
        self.options = {
            name: of_preset[name] if value is None else value
            for name, value in given.items()
            if name not in ('self', '__class__', 'text_features', 'logit_scale')
        }
        bias, second_relu = self.options['bias'], self.options['second_relu']
        learn_classifier = self.options['learn_classifier']
        if text_features.dim() != 2 or not text_features.is_floating_point():
            raise ValueError(
                f'text_features must be floats of shape (K, D), got '
                f'{text_features.dtype} of shape {tuple(text_features.shape)}.'
            )
        if not visual and not text:
            raise ValueError('visual=False and text=False leave nothing to learn.')
        learn_w = dict(
            text=text,
            learn_classifier=learn_classifier,
            residual=self.options['residual'],
        )
        if sum(map(bool, learn_w.values())) > 1:
            both = ' and '.join(f'{name}=True' for name, on in learn_w.items() if on)
            raise ValueError(f'{both} exclude each other: each learns W.')
        if self.options['keep'] < 0:
            raise ValueError(f'keep must be at least 0, got {self.options["keep"]}.')
        if zero_init and second_relu:
            raise ValueError(
                'zero_init=True and second_relu=True exclude each other: no gradient.'
            )
        for name in ('alpha', 'beta'):
            value = self.options[name]
            if not 0 <= value <= 1 or (learn_ratio and value in (0, 1)):
                raise ValueError(
                    f'{name} must be from 0 to 1, and neither 0 nor 1 with '
                    f'learn_ratio=True, got {value}.'
                )
        width = text_features.shape[1]
        if not 1 <= reduction <= width:
            raise ValueError(f'reduction must be from 1 to {width}, got {reduction}.')

        def adapter() -> nn.Sequential:
            layers: list[nn.Module] = [
                nn.Linear(width, width // reduction, bias=bias),
                nn.ReLU(inplace=True),
                nn.Linear(width // reduction, width, bias=bias),
            ]
            if zero_init:
                for parameter in layers[2].parameters():
                    nn.init.zeros_(parameter)
            return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * second_relu)

        text_features = text_features.detach().float().clone()
        if learn_classifier:
            self.text_features = nn.Parameter(text_features)
        else:
            self.register_buffer('text_features', text_features)
        self.register_buffer('logit_scale', torch.tensor(float(logit_scale)))
        self.visual_adapter = adapter() if visual else None
        self.text_adapter = adapter() if text else None
        if self.options['residual']:
            self.residual = nn.Parameter(torch.zeros_like(text_features))
        for name, used in (('alpha', visual), ('beta', text)):
            if learn_ratio and used:
                value = torch.tensor(self.options[name], dtype=torch.float64)
                logit = nn.Parameter(torch.logit(value).float())
                self.register_parameter(f'{name}_logit', logit)

    @torch.no_grad()
    def start(self, image_features: Tensor, labels: Tensor) -> float:
        r"""Sets R to its value before training. Without a residual it does nothing.

        ::

            W* = (1 - beta) W + beta M
            beta = 0.7 min(1, L / log K)^2

        M is the linear discriminant analysis of the training images: the class means,
        less their mean, times the inverse of C + 10 / N trace(C), where C is the
        covariance of all images, and scaled to a root mean square norm of 1. L is the
        cross-entropy of zero-shot CLIP on these images, and log K that of chance. So
        beta is near 0 if zero-shot CLIP is sure and right, and 0.7 if it does no better
        than chance. All classes count the same.

        Args:
            image_features: Features of the training images (N, D), not normalised.
            labels: Labels (N,).

        Returns:
            beta.
        """
        w = self.text_features
        if not self.options['residual'] or len(w) < 2:
            return 0.0
        f = F.normalize(image_features, dim=-1)
        count = labels.bincount(minlength=len(w))
        seen, weight = count > 0, 1 / count[labels]
        weight = (weight / weight.sum())[:, None]
        logits = zero_shot_logits(f, w, self.logit_scale)
        loss = F.cross_entropy(logits, labels, reduction='none') @ weight
        beta = ratio(loss.item(), len(w))
        centred = f - (weight * f).sum(0)
        means = torch.zeros_like(w).index_add(0, labels, weight * centred)[seen]
        covariance = (weight * centred).t() @ centred
        ridge = 10 / len(f) * covariance.trace().clamp(min=1e-12)
        covariance.diagonal().add_(ridge)
        m = torch.linalg.solve(covariance, means.t()).t()
        m /= m.square().sum(1).mean().sqrt().clamp(min=1e-12)
        self.residual.zero_()
        self.residual[seen] = beta * (m - w[seen]) / RESIDUAL_SCALE
        return beta

    def adapt(self, image_features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f* (N, D) and W* (K, D), whose product :meth:`forward` scales.

        Args:
            image_features: Features of the image tower (N, D), not normalised.

        Raises:
            ValueError: If the features have another width than the text features.
        """
        f, w = image_features, self.text_features
        alpha, beta = self.alpha, self.beta
        if f.dim() != 2 or f.shape[1] != w.shape[1]:
            raise ValueError(
                f'image features must be (N, {w.shape[1]}), as wide as the text '
                f'features, got {tuple(f.shape)}; both must come from one CLIP model.'
            )
        if self.options['input_norm']:
            f = F.normalize(f, dim=-1)
        if self.visual_adapter is not None:  # f* = alpha A_v(f) + (1 - alpha) f
            f = alpha * self.visual_adapter(f) + (1 - alpha) * f
        if self.options['output_norm']:
            f = F.normalize(f, dim=-1)
        if self.text_adapter is not None and self.options['beta'] != 0:  # W*
            w = beta * self.text_adapter(w) + (1 - beta) * w
            w = F.normalize(w, dim=-1)
        if self.options['residual']:
            w = w + RESIDUAL_SCALE * self.residual
        return f, w

    def forward(self, image_features: Tensor) -> Tensor:
        """Classifies image features.

        Args:
            image_features: Features of the image tower (N, D), not normalised.

        Returns:
            Logits (N, K).

        Raises:
            ValueError: If the features have another width than the text features.
        """
        f, w = self.adapt(image_features)
        return self.logit_scale * f @ w.t()

    def logits_and_distance(
        self, image_features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the logits (N, K), and the distance from zero-shot CLIP.

        ::

            distance = u mean (|f* - f|^2 + |W*_y - W_y|^2)
            u = max(0, 1 - L / log K)

        f and W have unit norm, and y is the label. L is the cross-entropy of zero-shot
        CLIP on these images, and log K that of chance: u is 1 if zero-shot CLIP is sure
        and right, and 0 if it does no better than chance. The second part is that of a
        text adapter. A residual R has no part in it.

        Args:
            image_features: Features of the image tower (N, D), not normalised.
            labels: Labels (N,).

        Raises:
            ValueError: If the features have another width than the text features.
        """
        f_star, w_star = self.adapt(image_features)
        w = self.text_features
        with torch.no_grad():
            f = F.normalize(image_features, dim=-1)
            loss = F.cross_entropy(zero_shot_logits(f, w, self.logit_scale), labels)
            u = max(0.0, 1 - loss.item() / math.log(len(w))) if len(w) > 1 else 0.0
        moved = (f_star - f).square().sum(-1)
        if self.text_adapter is not None:
            moved = moved + (w_star - w)[labels].square().sum(-1)
        return self.logit_scale * f_star @ w_star.t(), u * moved.mean()

    def loss(self, image_features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, and ``keep`` times the distance from zero-shot CLIP.

        See :meth:`logits_and_distance` for the arguments and the distance.
        """
        if self.options['keep'] == 0:
            return F.cross_entropy(self(image_features), labels)
        logits, distance = self.logits_and_distance(image_features, labels)
        return F.cross_entropy(logits, labels) + self.options['keep'] * distance

    @property
    def alpha(self) -> Tensor | float:
        """Weight of the visual adapter."""
        return self._ratio('alpha')

    @property
    def beta(self) -> Tensor | float:
        """Weight of the text adapter."""
        return self._ratio('beta')

    def _ratio(self, name: str) -> Tensor | float:
        logit = getattr(self, f'{name}_logit', None)
        return float(self.options[name]) if logit is None else logit.sigmoid()

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={value!r}' for name, value in self.options.items())


def ratio(loss: float, classes: int) -> float:
    """Returns the weight of what is learnt, 0.7 min(1, L / log K)^2.

    Args:
        loss: Cross-entropy L of the frozen model on the training images.
        classes: Number K of its classes, at least 2.
    """
    return 0.7 * min(1.0, loss / math.log(classes)) ** 2


def zero_shot_logits(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """Computes the logits of zero-shot CLIP.

    Args:
        image_features: Image features (N, D), not normalised.
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.

    Returns:
        Logits (N, K).
    """
    return logit_scale * F.normalize(image_features, dim=-1) @ text_features.t()

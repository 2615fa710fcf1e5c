"""CLIP-Adapter (arXiv 2110.04544)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRESETS: dict[str, dict] = {
    # The equations of the paper. The paper searches alpha.
    'paper': dict(),
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


class CLIPAdapter(nn.Module):
    r"""Classifier of frozen CLIP features with a residual bottleneck.

    ::

        f -- W1 -- ReLU -- W2 --> A(f)
        f* = alpha A(f) + (1 - alpha) f,     W* likewise with beta
        logits = logit_scale * cos(f*, W*)

    ``alpha`` and ``beta`` are the weights of the adapters, as in the paper. With 0 for
    both, the logits are exactly those of zero-shot CLIP.

    Args:
        text_features: Text features (K, D), rows of unit norm.
        logit_scale: Scale of the cosine similarities.
        preset: One of ``PRESETS``. The other arguments override it.
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

    Attributes:
        options: All arguments except the first two, with the values of the preset.

    Raises:
        ValueError: If a value is out of range, or two arguments exclude each other.
    """

    def __init__(
        self,
        text_features: Tensor,
        logit_scale: float,
        preset: str = 'paper',
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
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(
                f'preset must be one of {", ".join(PRESETS)}, got {preset!r}.'
            )
        base = PRESETS[preset]

        def switch(name: str, value: bool | float | None, default: bool | float):
            return base.get(name, default) if value is None else value

        alpha = switch('alpha', alpha, 0.2)
        bias = switch('bias', bias, False)
        self.second_relu = switch('second_relu', second_relu, False)
        self.input_norm = switch('input_norm', input_norm, False)
        self.output_norm = switch('output_norm', output_norm, True)
        learn_classifier = switch('learn_classifier', learn_classifier, False)
        self.options = dict(
            preset=preset,
            visual=visual,
            text=text,
            reduction=reduction,
            alpha=alpha,
            beta=beta,
            learn_ratio=learn_ratio,
            bias=bias,
            second_relu=self.second_relu,
            input_norm=self.input_norm,
            output_norm=self.output_norm,
            zero_init=zero_init,
            learn_classifier=learn_classifier,
        )
        if text_features.dim() != 2 or not text_features.is_floating_point():
            raise ValueError(
                f'text_features must be floats of shape (K, D), got '
                f'{text_features.dtype} of shape {tuple(text_features.shape)}.'
            )
        if not visual and not text:
            raise ValueError('visual=False and text=False leave nothing to learn.')
        if text and learn_classifier:
            raise ValueError(
                'text=True and learn_classifier=True both learn the text features; '
                'use one of them.'
            )
        if zero_init and self.second_relu:
            raise ValueError(
                'zero_init=True and second_relu=True together give no gradient; use '
                'one of them.'
            )
        for name, value in (('alpha', alpha), ('beta', beta)):
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
            if self.second_relu:
                layers.append(nn.ReLU(inplace=True))
            return nn.Sequential(*layers)

        text_features = text_features.detach().float().clone()
        if learn_classifier:
            self.text_features = nn.Parameter(text_features)
        else:
            self.register_buffer('text_features', text_features)
        self.register_buffer('logit_scale', torch.tensor(float(logit_scale)))
        self.visual_adapter = adapter() if visual else None
        self.text_adapter = adapter() if text else None
        self.learn_ratio = learn_ratio
        for name, value, used in (('alpha', alpha, visual), ('beta', beta, text)):
            if learn_ratio and used:
                logit = torch.logit(torch.tensor(float(value), dtype=torch.float64))
                self.register_parameter(f'{name}_logit', nn.Parameter(logit.float()))
            else:
                setattr(self, f'_{name}', float(value))

    @property
    def alpha(self) -> Tensor | float:
        """Weight of the visual adapter."""
        return self._alpha if hasattr(self, '_alpha') else self.alpha_logit.sigmoid()

    @property
    def beta(self) -> Tensor | float:
        """Weight of the text adapter."""
        return self._beta if hasattr(self, '_beta') else self.beta_logit.sigmoid()

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

    def adapt(self, image_features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f* (N, D) and W* (K, D), whose product :meth:`forward` scales.

        Args:
            image_features: Features of the image tower (N, D), not normalised.

        Raises:
            ValueError: If the features have another width than the text features.
        """
        f, w = image_features, self.text_features
        if f.dim() != 2 or f.shape[1] != w.shape[1]:
            raise ValueError(
                f'image features must be (N, {w.shape[1]}), as wide as the text '
                f'features, got {tuple(f.shape)}; both must come from one CLIP model.'
            )
        if self.input_norm:
            f = F.normalize(f, dim=-1)
        if self.visual_adapter is not None:
            f = _blend(self.visual_adapter, f, self.alpha)
        if self.output_norm:
            f = F.normalize(f, dim=-1)
        if self.text_adapter is not None and not _is_zero(self.beta):
            w = F.normalize(_blend(self.text_adapter, w, self.beta), dim=-1)
        return f, w

    def logits_and_distance(
        self, image_features: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the logits (N, K), and the distance from zero-shot CLIP.

        ::

            distance = mean k (|f* - f|^2 + |W*_y - W_y|^2)
            k = max(0, p - 1 / K) / (1 - 1 / K)

        f and W have unit norm, y is the label, and p its probability by zero-shot CLIP.
        An image has no part in the distance if zero-shot CLIP does no better than
        chance on it. ``keep`` times the distance is the second term of the loss of
        :class:`CLIPAdapterHead` and of the method ``clip_adapter``.

        Args:
            image_features: Features of the image tower (N, D), not normalised.
            labels: Labels (N,).

        Raises:
            ValueError: If the features have another width than the text features.
        """
        f_star, w_star = self.adapt(image_features)
        w, count = self.text_features, len(self.text_features)
        with torch.no_grad():
            f = F.normalize(image_features, dim=-1)
            p = (self.logit_scale * f @ w.t()).softmax(-1)
            p = p.gather(1, labels[:, None])[:, 0]
            k = (count * p - 1).clamp(min=0) / max(count - 1, 1)
        moved = (f_star - f).square().sum(-1)
        if self.text_adapter is not None:
            moved = moved + (w_star - w)[labels].square().sum(-1)
        return self.logit_scale * f_star @ w_star.t(), (k * moved).mean()

    def extra_repr(self) -> str:
        return (
            f'input_norm={self.input_norm}, output_norm={self.output_norm}, '
            f'learn_ratio={self.learn_ratio}'
        )


def _is_zero(ratio: Tensor | float) -> bool:
    return isinstance(ratio, float) and ratio == 0


def _blend(adapter: nn.Module, x: Tensor, ratio: Tensor | float) -> Tensor:
    """Returns ``ratio * adapter(x) + (1 - ratio) * x``."""
    return x if _is_zero(ratio) else ratio * adapter(x) + (1 - ratio) * x


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

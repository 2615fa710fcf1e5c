"""CoOp (arXiv 2109.01134)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.models.backbones import OpenCLIPEncoder

from .base import FewShotData
from .training import train
from .zero_shot import fold_text_features


class PromptLearner(nn.Module):
    """Learnt context words before the class name.

    All classes share one context, and the class name is at the end. The gradient is
    computed through the frozen text tower.

    Args:
        encoder: Encoder with the text tower.
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
        """Text features (K, D), rows of unit norm."""
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
    """Trains CoOp and folds it into a cosine classifier."""
    if data.encoder is None:
        raise ValueError('CoOp learns through the text tower and needs the encoder.')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        learner = PromptLearner(data.encoder, data.class_names, n_ctx)
    return fold_text_features(train(learner, data, **recipe), data)

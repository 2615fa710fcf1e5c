"""CoOp (arXiv 2109.01134)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip import OpenCLIPEncoder

from .base import FewShotData, register_method
from .training import COOP
from .zero_shot import CosineClassifier, TextLearner


class PromptLearner(TextLearner):
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
        super().__init__(encoder.logit_scale)

        def tokenize(word: str, end: str = '') -> Tensor:
            context = ' '.join([word] * n_ctx)
            return encoder.tokenizer([f'{context} {n}.{end}' for n in class_names])

        self.tokens = tokenize('X')
        if (self.tokens == tokenize('X', ' X')).all(1).any():
            raise ValueError(
                f'{n_ctx} context words and the class names fill the '
                f'{self.tokens.shape[1]} tokens of the text tower; use a smaller n_ctx.'
            )
        # Tokenizers differ in what they put before the first word and after the last.
        is_context = self.tokens != tokenize('Y')
        if (is_context != is_context[0]).any() or is_context[0].sum() != n_ctx:
            raise ValueError(
                f'the tokenizer of {encoder.model_name!r} does not have one token for '
                f'each context word, which CoOp needs.'
            )
        self.places = is_context[0].nonzero()[:, 0]
        self.encoder = [encoder]  # not a submodule: it is not learnt
        text_tower = getattr(encoder.clip, 'text', encoder.clip)
        if hasattr(text_tower, 'token_embedding'):
            self.embedding = [text_tower.token_embedding]
        else:  # a tower of transformers
            self.embedding = [text_tower.transformer.get_input_embeddings()]
        width = self.embedding[0].embedding_dim
        self.context = nn.Parameter(0.02 * torch.randn(n_ctx, width))

    def classifier(self) -> Tensor:
        def put_context(module: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
            context = self.context.to(embedded).expand(len(embedded), -1, -1)
            places = self.places.to(embedded.device)
            return embedded.index_copy(1, places, context)

        hook = self.embedding[0].register_forward_hook(put_context)
        try:
            tokens = self.tokens.to(self.embedding[0].weight.device)
            features = self.encoder[0].encode_text(tokens).to(self.context)
            return F.normalize(features, dim=-1)
        finally:
            hook.remove()


@register_method(
    'coop',
    CosineClassifier,
    'CoOp',
    defaults=dict(COOP, n_ctx=16),
    source='its code, with 16 words and the class name at the end; on ImageNet it '
    'always has 50 epochs',
    needs_encoder=True,
)
def fit_coop(data: FewShotData, *, n_ctx: int, **recipe: object) -> CosineClassifier:
    """Trains CoOp."""
    if data.encoder is None:
        raise ValueError('CoOp learns through the text tower and needs the encoder.')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        learner = PromptLearner(data.encoder, data.class_names, n_ctx)
    return learner.fit(data, **recipe)

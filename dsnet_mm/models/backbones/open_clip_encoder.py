"""CLIP's image and text tower from open_clip, frozen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from dsnet_mm.datasets.few_shot import resolve_prompts
from dsnet_mm.registry import MODELS


@MODELS.register_module()
class OpenCLIPEncoder(BaseModule):
    """Image and text tower of any open_clip model.

    All of it is frozen and stays in eval mode, so batch norm and dropout never move.
    As the backbone of an mmpretrain ``ImageClassifier`` it gives the image feature,
    not normalised, which is what CLIP-Adapter takes.

    Args:
        model: Name of an open_clip model (``'RN50-quickgelu'``), or a JSON file with
            the configuration of one.
        pretrained: Tag of its weights (``'openai'``), a checkpoint file, or None for
            random weights.
        amp: Precision of the towers under autocast, ``'float16'`` (GPU only) or
            ``'bfloat16'``; None runs in float32.

    Attributes:
        embed_dims: Width D of the image and text features.
        logit_scale: Factor of the cosine in CLIP's logits.
        image_size: Height and width of the pictures.
        mean: Mean that the pictures are normalised with, RGB from 0 to 1.
        std: Standard deviation, likewise.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If the weights were trained with the other kind of GELU than the
            model has, or the model or ``amp`` is unknown.
        FileNotFoundError: If the weights can be neither found nor downloaded.
    """

    def __init__(
        self, model: str, pretrained: str | None = None, *, amp: str | None = None
    ) -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(
                'OpenCLIPEncoder needs open_clip: pip install open_clip_torch.'
            ) from error
        if amp not in (None, 'float16', 'bfloat16'):
            raise ValueError(
                f"amp must be None, 'float16' or 'bfloat16', got {amp!r}; the weights "
                f'stay in float32.'
            )
        self.model_name, self.pretrained, self.amp = str(model), pretrained, amp
        name = str(model)
        if name.endswith('.json'):
            if not Path(name).is_file():
                raise FileNotFoundError(f'there is no model configuration {name}.')
            open_clip.add_model_config(name)
            name = Path(name).stem
        if not name.startswith(('hf-hub:', 'local-dir:')):
            _check_model(name, pretrained)
        try:
            self.clip = open_clip.create_model(name, pretrained=pretrained)
        except RuntimeError as error:
            if 'download' not in str(error):
                raise
            raise FileNotFoundError(
                f'the weights {pretrained!r} of {name!r} are not on this machine and '
                f'cannot be downloaded; get them elsewhere and give their file as '
                f'pretrained.'
            ) from error
        self.tokenizer = open_clip.get_tokenizer(name)
        self.requires_grad_(False)
        self.eval()

        size = self.clip.visual.image_size
        self.image_size = size[0] if isinstance(size, Sequence) else size
        preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        self.mean, self.std = tuple(preprocess['mean']), tuple(preprocess['std'])
        self.logit_scale = self.clip.logit_scale.exp().item()
        with torch.no_grad():
            self.embed_dims = self.clip.encode_text(self.tokenizer(['a'])).shape[-1]
        self._digest: str | None = None

    def train(self, mode: bool = True) -> 'OpenCLIPEncoder':
        """Stays in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def init_weights(self) -> None:
        """Keeps the weights that the constructor loaded."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Encodes pictures.

        Args:
            x: Normalised pictures (N, 3, H, W), or features (N, D) from a cache,
                which pass through.

        Returns:
            The features (N, D), not normalised, in float32.

        Raises:
            ValueError: If half precision is asked for on the CPU.
        """
        if x.dim() == 2:
            return (x,)
        with torch.no_grad(), self._autocast(x):
            return (self.clip.encode_image(x).float(),)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encodes tokenised texts (N, L) to features (N, D), not normalised.

        Gradients flow where the caller made something in the tower learn.
        """
        with self._autocast(tokens):
            return self.clip.encode_text(tokens).float()

    @torch.no_grad()
    def encode_classes(
        self, class_names: Sequence[str], prompts: str | Sequence[str]
    ) -> Tensor:
        """Builds the zero-shot classifier.

        Args:
            class_names: Names by label; underscores become spaces.
            prompts: See :func:`dsnet_mm.datasets.few_shot.resolve_prompts`. Features
                of several prompts are normalised, averaged and normalised again.

        Returns:
            Text features (K, D) of length 1.

        Raises:
            ValueError: If a prompt is wrong.
        """
        names = [name.replace('_', ' ') for name in class_names]
        prompts = resolve_prompts(prompts)
        texts = [prompt.replace('{}', name) for name in names for prompt in prompts]
        device = next(self.parameters()).device
        features = [
            F.normalize(
                self.encode_text(self.tokenizer(texts[i : i + 256]).to(device)), dim=-1
            )
            for i in range(0, len(texts), 256)
        ]
        grouped = torch.cat(features).view(len(names), len(prompts), -1)
        return F.normalize(grouped.mean(1), dim=-1)

    def digest(self) -> str:
        """SHA-256 of all weights, the name by which caches know this model."""
        if self._digest is None:
            sha = hashlib.sha256()
            for key, value in sorted(self.clip.state_dict().items()):
                sha.update(key.encode())
                sha.update(value.detach().cpu().contiguous().view(-1).numpy().data)
            self._digest = sha.hexdigest()
        return self._digest

    def _autocast(self, x: Tensor) -> torch.autocast:
        on_cpu = x.device.type == 'cpu'
        if on_cpu and (self.amp == 'float16' or x.dtype == torch.float16):
            raise ValueError(
                'float16 does not run on the CPU; use amp=None or amp="bfloat16", or '
                'move the encoder to a GPU.'
            )
        return torch.autocast(
            x.device.type,
            dtype=torch.float16 if self.amp == 'float16' else torch.bfloat16,
            enabled=self.amp is not None,
        )


def _check_model(name: str, pretrained: str | None) -> None:
    """Refuses unknown models and weights trained with the other kind of GELU."""
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f'open_clip has no model {name!r}; open_clip.list_models() names all, and '
            f'a JSON file can describe another.'
        )
    if pretrained is None or Path(pretrained).is_file():
        return
    has_quick_gelu = bool(config.get('quick_gelu', False))
    other = (
        name.removesuffix('-quickgelu')
        if name.endswith('-quickgelu')
        else f'{name}-quickgelu'
    )
    for candidate in (name, other):
        tag = open_clip.get_pretrained_cfg(candidate, pretrained)
        if tag:
            if bool(tag.get('quick_gelu', False)) != has_quick_gelu:
                trained = 'QuickGELU' if tag.get('quick_gelu') else 'plain GELU'
                raise ValueError(
                    f'the weights {pretrained!r} were trained with {trained} and '
                    f'{name!r} has the other: use model={other!r}.'
                )
            return
    raise ValueError(
        f'{pretrained!r} is neither a file nor a tag of {name!r}; its tags are '
        f'{", ".join(open_clip.list_pretrained_tags_by_model(name))}.'
    )

"""Classifiers of image features, and the small files they are deployed as."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dsnet_mm.files import write_atomic
from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.models.heads import CLIPAdapter
from dsnet_mm.models.heads.clip_adapter import zero_shot_logits

from .features import build_transform


class CosineClassifier(nn.Module):
    """Zero-shot CLIP, and whatever only changes its text features.

    Args:
        text_features: Rows of length 1, (K, D).
        logit_scale: Factor of the cosine.
    """

    def __init__(self, text_features: Tensor, logit_scale: float | Tensor) -> None:
        super().__init__()
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return zero_shot_logits(image_features, self.text_features, self.logit_scale)


class LinearClassifier(nn.Module):
    """A linear layer on image features of length 1.

    Args:
        weight: (K, D).
        bias: (K,), or None for none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(
            weight.new_zeros(len(weight)) if bias is None else bias.detach().clone()
        )

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return F.linear(F.normalize(image_features, dim=-1), self.weight, self.bias)


class TipAdapter(nn.Module):
    """Zero-shot CLIP and a key-value cache (Tip-Adapter, arXiv 2207.09519).

    Args:
        keys: Features of the training pictures, rows of length 1, (N, D).
        labels: Their labels (N,).
        text_features: Rows of length 1, (K, D).
        logit_scale: Factor of the cosine.
        alpha: Weight of the cache.
        beta: Sharpness of the affinity exp(-beta (1 - cos)).
        learn_keys: Whether the keys are parameters (Tip-Adapter-F).
    """

    def __init__(
        self,
        keys: Tensor,
        labels: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        alpha: float = 1.0,
        beta: float = 1.0,
        learn_keys: bool = False,
    ) -> None:
        super().__init__()
        if learn_keys:
            self.keys = nn.Parameter(keys.detach().clone())
        else:
            self.register_buffer('keys', keys.detach().clone())
        self.register_buffer('labels', labels.clone())
        self.register_buffer('text_features', text_features.detach().clone())
        self.register_buffer('logit_scale', torch.as_tensor(logit_scale).clone())
        self.alpha, self.beta = alpha, beta

    def forward(self, image_features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        f = F.normalize(image_features, dim=-1)
        affinity = torch.exp(self.beta * (f @ self.keys.t() - 1))
        cache = f.new_zeros(len(f), len(self.text_features))
        cache = cache.index_add(1, self.labels, affinity)
        return self.logit_scale * f @ self.text_features.t() + self.alpha * cache


def save_classifier(
    path: str | Path,
    classifier: nn.Module,
    encoder: OpenCLIPEncoder,
    class_names: Sequence[str],
    preprocessing: str,
) -> None:
    """Write a classifier as a safetensors file, atomically.

    Args:
        path: File to write.
        classifier: A :class:`CLIPAdapter` or a classifier of this module.
        encoder: The encoder whose features it takes; the file only names it.
        class_names: Names by label.
        preprocessing: One of ``PREPROCESSINGS``.
    """
    options = {}
    if isinstance(classifier, CLIPAdapter):
        options = classifier.options
    elif isinstance(classifier, TipAdapter):
        options = {'alpha': classifier.alpha, 'beta': classifier.beta}
    description = {
        'kind': type(classifier).__name__,
        'options': options,
        'class_names': list(class_names),
        'preprocessing': preprocessing,
        'model': encoder.model_name,
        'pretrained': encoder.pretrained,
        'weights': encoder.digest(),
    }
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in classifier.state_dict().items()
    }
    write_atomic(path, save(tensors, {'dsnet_mm': json.dumps(description)}))


class DeployedClassifier:
    """A classifier of pictures: encoder, adapter and class names.

    Attributes:
        classifier: Image features (N, D) to logits (N, K).
        encoder: The frozen towers.
        class_names: Names by label.
        preprocessing: One of ``PREPROCESSINGS``.
    """

    def __init__(
        self,
        classifier: nn.Module,
        encoder: OpenCLIPEncoder,
        class_names: Sequence[str],
        preprocessing: str,
    ) -> None:
        self.classifier = classifier
        self.encoder = encoder
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.transform = build_transform(encoder, preprocessing)

    @torch.no_grad()
    def __call__(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Probabilities (N, K) of pictures, given as files or PIL images."""
        opened = []
        for image in images:
            if not isinstance(image, Image.Image):
                with Image.open(image) as file:
                    image = file.convert('RGB')
            opened.append(self.transform(image.convert('RGB')))
        device = next(self.encoder.parameters()).device
        features = self.encoder(torch.stack(opened).to(device))[0]
        return self.classifier.to(device)(features).softmax(-1)


def load_classifier(
    path: str | Path, encoder: OpenCLIPEncoder | None = None
) -> DeployedClassifier:
    """Read a file of :func:`save_classifier`.

    Args:
        path: The file.
        encoder: The encoder, if it is at hand; None builds the one that the file
            names.

    Returns:
        The classifier, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, or the encoder has other weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no classifier file {path}.')
    with safe_open(path, 'pt') as file:
        text = (file.metadata() or {}).get('dsnet_mm')
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if text is None:
        raise ValueError(f'{path} is no classifier that save_classifier wrote.')
    about = json.loads(text)
    if encoder is None:
        encoder = OpenCLIPEncoder(about['model'], about['pretrained'])
    if encoder.digest() != about['weights']:
        raise ValueError(
            f'{path} belongs to {about["model"]!r} with the weights '
            f'{about["pretrained"]!r}, and the encoder at hand has other weights.'
        )
    if about['kind'] == 'CLIPAdapter':
        classifier: nn.Module = CLIPAdapter(
            tensors['text_features'], 1.0, **about['options']
        )
    elif about['kind'] == 'TipAdapter':
        names = ('keys', 'labels', 'text_features', 'logit_scale')
        classifier = TipAdapter(*(tensors[n] for n in names), **about['options'])
    elif about['kind'] == 'LinearClassifier':
        classifier = LinearClassifier(tensors['weight'])
    else:
        classifier = CosineClassifier(tensors['text_features'], 1.0)
    classifier.load_state_dict(tensors)
    return DeployedClassifier(
        classifier.eval(), encoder, about['class_names'], about['preprocessing']
    )

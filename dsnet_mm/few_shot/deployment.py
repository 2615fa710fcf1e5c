"""Saving, loading and use of classifiers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dsnet_mm.datasets.pictures import build_transform, open_picture
from dsnet_mm.files import write_atomic
from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.models.heads import CLIPAdapter

from .methods.linear_adapter import LinearAdapter
from .methods.linear_probe import LinearClassifier
from .methods.proker import ProKeR
from .methods.tip_adapter import TipAdapter
from .methods.zero_shot import CosineClassifier


def save_classifier(
    path: str | Path,
    classifier: nn.Module,
    encoder: OpenCLIPEncoder | Mapping[str, object],
    class_names: Sequence[str],
    preprocessing: str,
    record: Mapping[str, object] | None = None,
) -> None:
    """Writes a classifier as a safetensors file, atomically.

    Args:
        path: File to write.
        classifier: Classifier that a method of ``METHODS`` returned.
        encoder: Encoder of its input, or what is known of it: a mapping with the keys
            of :meth:`OpenCLIPEncoder.source`, each of which may be None. The file has
            the encoder's name and identity, but not its weights.
        class_names: Names by label.
        preprocessing: One of ``PREPROCESSINGS``.
        record: How it was made: method, shots, seed, selection and options.
    """
    description = {
        'kind': type(classifier).__name__,
        'options': getattr(classifier, 'options', {}),
        'class_names': list(class_names),
        'preprocessing': preprocessing,
        **(encoder.source() if isinstance(encoder, OpenCLIPEncoder) else encoder),
        'record': dict(record or {}),
    }
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in classifier.state_dict().items()
    }
    write_atomic(path, save(tensors, {'dsnet_mm': json.dumps(description)}))


class DeployedClassifier:
    """A classifier of pictures: encoder, classifier of features and class names.

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
        """Classifies pictures.

        Args:
            images: Files or PIL images.

        Returns:
            Probabilities (N, K).

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a picture cannot be read.
        """
        opened = []
        for image in images:
            if not isinstance(image, Image.Image):
                image = open_picture(image)
            opened.append(self.transform(image.convert('RGB')))
        device = next(self.encoder.parameters()).device
        features = self.encoder(torch.stack(opened).to(device))[0]
        return self.classifier.to(device)(features).softmax(-1)


def read_classifier(path: str | Path) -> tuple[nn.Module, dict]:
    """Reads a file of :func:`save_classifier`, without its encoder.

    Args:
        path: The file.

    Returns:
        The classifier of features, in eval mode, and the description in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a file of :func:`save_classifier`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no classifier file {path}.')
    with safe_open(path, 'pt') as file:
        text = (file.metadata() or {}).get('dsnet_mm')
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if text is None:
        raise ValueError(f'{path} is not a file of save_classifier.')
    about = json.loads(text)
    if about['kind'] == 'CLIPAdapter':
        classifier: nn.Module = CLIPAdapter(
            tensors['text_features'], 1.0, **about['options']
        )
    elif about['kind'] == 'TipAdapter':
        names = ('keys', 'labels', 'text_features', 'logit_scale')
        classifier = TipAdapter(*(tensors[n] for n in names), **about['options'])
    elif about['kind'] == 'ProKeR':
        names = ('keys', 'values', 'text_features', 'logit_scale')
        classifier = ProKeR(*(tensors[n] for n in names), **about['options'])
    elif about['kind'] == 'LinearAdapter':
        classifier = LinearAdapter(tensors['text_features'], 1.0)
    elif about['kind'] == 'LinearClassifier':
        classifier = LinearClassifier(tensors['weight'])
    else:
        classifier = CosineClassifier(tensors['text_features'], 1.0)
    classifier.load_state_dict(tensors)
    return classifier.eval(), about


def load_classifier(
    path: str | Path, encoder: OpenCLIPEncoder | None = None
) -> DeployedClassifier:
    """Reads a file of :func:`save_classifier`.

    Args:
        path: The file.
        encoder: The encoder. None loads the one that is named in the file.

    Returns:
        The classifier, in eval mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a file of :func:`save_classifier`, or the encoder has
            other weights.
    """
    classifier, about = read_classifier(path)
    if encoder is None:
        encoder = OpenCLIPEncoder.shared(about['model'], about['pretrained'])
    identity = encoder.identity()
    wanted = about['identity'] or identity
    # Another version of open_clip is no reason to refuse: the rest is the same.
    other = [k for k in wanted if k != 'open_clip' and wanted[k] != identity[k]]
    if other:
        raise ValueError(
            f'{path} was saved for {about["model"]!r} with the weights '
            f'{about["pretrained"]!r}, but the encoder has other {", ".join(other)}.'
        )
    return DeployedClassifier(
        classifier, encoder, about['class_names'], about['preprocessing']
    )

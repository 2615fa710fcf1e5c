"""Saving, loading and use of classifiers."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets.images import (
    PREPROCESSINGS,
    build_transform,
    open_image,
    upright_rgb,
)
from dsnet_mm.files import write_atomic
from dsnet_mm.weights import check_finite, check_kinds

from .calibration import Calibration
from .methods.base import CLASSIFIERS

logger = logging.getLogger(__name__)

# CLIP's features are at most 1536 wide. An adapter has weights of the square of it.
MAX_WIDTH = 8192


def save_classifier(
    path: str | Path,
    classifier: nn.Module,
    encoder: OpenCLIPEncoder | Mapping[str, object],
    class_names: Sequence[str],
    preprocessing: str,
    record: Mapping[str, object] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Writes a classifier as a safetensors file, atomically.

    Args:
        path: File to write.
        classifier: Classifier that a method of ``METHODS`` returned. Its class is
            registered by :func:`register_classifier`.
        encoder: Encoder of its input, or what is known of it: a mapping with the keys
            of :meth:`OpenCLIPEncoder.source`, each of which may be None. The file has
            the encoder's name and identity, but not its weights.
        class_names: Names by label.
        preprocessing: One of ``PREPROCESSINGS``.
        record: How it was made: method, shots, seed, selection and options.
        calibration: What :func:`calibrate` returned, None if it was not called.

    Raises:
        ValueError: If its class is not registered.
    """
    kind = type(classifier).__name__
    if kind not in CLASSIFIERS:
        raise ValueError(
            f'a {kind} cannot be saved; decorate the class with register_classifier.'
        )
    description = {
        'kind': kind,
        'options': getattr(classifier, 'options', {}),
        'class_names': list(class_names),
        'preprocessing': preprocessing,
        **(encoder.source() if isinstance(encoder, OpenCLIPEncoder) else encoder),
        'record': dict(record or {}),
        'calibration': asdict(calibration or Calibration()),
    }
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in classifier.state_dict().items()
    }
    write_atomic(path, save(tensors, {'dsnet_mm': json.dumps(description)}))


class DeployedClassifier:
    """A classifier of images: encoder, classifier of features and class names.

    Attributes:
        classifier: Image features (N, D) to logits (N, K).
        encoder: The frozen towers.
        class_names: Names by label.
        preprocessing: One of ``PREPROCESSINGS``.
        transform: An image to an input of the encoder, (3, H, W).
        calibration: Its temperature, and what sets and rejection need.
    """

    def __init__(
        self,
        classifier: nn.Module,
        encoder: OpenCLIPEncoder,
        class_names: Sequence[str],
        preprocessing: str,
        calibration: Calibration = Calibration(),
    ) -> None:
        self.calibration = calibration
        self.encoder = encoder
        self.classifier = classifier.to(self.device)
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.transform = build_transform(encoder, preprocessing)

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return next(self.encoder.parameters()).device

    def __call__(
        self,
        images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
        batch_size: int = 64,
    ) -> Tensor:
        """Classifies images, ``batch_size`` at once. Returns probabilities (N, K).

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If an image cannot be read.
        """
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        found = [torch.empty(0, len(self.class_names))]
        for start in range(0, len(images), batch_size):
            batch = [self.prepare(x) for x in images[start : start + batch_size]]
            found.append(self.probabilities(batch))
        return torch.cat(found)

    def prepare(self, image: str | Path | Image.Image) -> Tensor:
        """Returns the input of the encoder for a file or PIL image, (3, H, W)."""
        is_open = isinstance(image, Image.Image)
        return self.transform(upright_rgb(image) if is_open else open_image(image))

    @torch.no_grad()
    def probabilities(self, prepared: Sequence[Tensor]) -> Tensor:
        """Returns the probabilities (N, K) of a batch of :meth:`prepare`."""
        features = self.encoder(torch.stack(list(prepared)).to(self.device))[0]
        return self.calibration.probabilities(self.classifier(features).float()).cpu()


def read_classifier(path: str | Path) -> tuple[nn.Module, dict]:
    """Reads a file of :func:`save_classifier`, without its encoder.

    Returns:
        The classifier of features, in eval mode, and the description in the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a file of :func:`save_classifier`, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no classifier file {path}.')
    try:
        with safe_open(path, 'pt') as file:
            text = (file.metadata() or {}).get('dsnet_mm')
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f'{path} is not a classifier file, or is damaged ({error}); classifier '
            f'files are written by tools/few_shot.py run, and from a checkpoint of '
            f'MMEngine by tools/few_shot.py export.'
        ) from error
    if text is None:
        raise ValueError(
            f'{path} is a safetensors file, but no classifier: it lacks the '
            f'description that save_classifier writes.'
        )
    try:
        about = json.loads(text)
        classifier = _build(about, tensors)
    except Exception as error:  # a damaged description raises errors of many types
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(
            f'{path} is a damaged classifier file ({type(error).__name__}: {reason}).'
        ) from error
    return classifier, about


def _build(about: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """Builds the classifier of a description, and checks that the two fit."""
    # None if the classifier was fitted to features from elsewhere.
    types = dict(model=str | None, pretrained=str | None, identity=dict | None)
    for key, type_ in {**types, 'class_names': list, 'options': dict}.items():
        if not isinstance(about[key], type_):
            raise ValueError(f'{key} is {about[key]!r}')
    names, kind, identity = (about[k] for k in ('class_names', 'kind', 'identity'))
    if not all(isinstance(name, str) for name in names):
        raise ValueError('class names must be text')
    if identity and about['model'] is None:
        raise ValueError('the encoder has no name')
    if identity and not isinstance(identity.get('config'), dict | None):
        raise ValueError('the configuration of the encoder is no dict')
    if about['preprocessing'] not in PREPROCESSINGS:
        raise ValueError(f'unknown preprocessing {about["preprocessing"]!r}')
    if kind not in CLASSIFIERS:
        raise ValueError(
            f'unknown kind {kind!r}; import the module that registers its class'
        )
    Calibration.read(about)  # raises if it is damaged
    check_finite(tensors, 'it')
    cls, arguments = CLASSIFIERS[kind]
    if tensors[arguments[0]].shape[1] > MAX_WIDTH:
        raise ValueError(f'its features are wider than {MAX_WIDTH}')
    classifier = cls(*(tensors[name] for name in arguments), **about['options'])
    check_kinds(classifier.state_dict(), tensors, 'it')
    classifier.load_state_dict(tensors)
    classifier.requires_grad_(False).eval()
    classes = classifier(torch.ones(1, feature_width_of(classifier))).shape[1]
    if classes != len(names):
        raise ValueError(f'{classes} classes, but {len(names)} names')
    return classifier


def feature_width_of(classifier: nn.Module) -> int:
    """Returns the width D of the features of a classifier."""
    _, (first, *_) = CLASSIFIERS[type(classifier).__name__]
    return classifier.state_dict()[first].shape[1]


def load_classifier(
    path: str | Path,
    encoder: OpenCLIPEncoder | None = None,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    download: bool = False,
    device: str | torch.device = 'cpu',
) -> DeployedClassifier:
    """Reads a file of :func:`save_classifier`.

    Args:
        path: The file.
        encoder: The encoder. None loads the one that the file names, with the
            arguments below.
        model: Model of open_clip instead of the one that the file names.
        pretrained: Weights instead of those that the file names. A file of a model or
            of weights must be given: one that the classifier names is not opened.
        download: Whether weights that are not on this machine may be fetched.
        device: Device of the encoder.

    Returns:
        The classifier, in eval mode.

    Raises:
        FileNotFoundError: If the file does not exist, or the weights of the encoder are
            not on this machine.
        ValueError: If it is not a file of :func:`save_classifier`, belongs to another
            encoder, or names files that are not given.
    """
    classifier, about = read_classifier(path)
    if encoder is None:
        encoder = _named_encoder(path, about, model, pretrained, download, device)
    identity = encoder.identity()
    wanted = about['identity'] or identity
    # Another version of a library is no reason to refuse: the rest is the same.
    versions = ('open_clip', 'timm')
    other = [k for k in wanted if k not in versions and wanted[k] != identity.get(k)]
    if other:
        raise ValueError(
            f'{path} was saved for {about["model"]!r} with the weights '
            f'{about["pretrained"]!r}, but the encoder has other {", ".join(other)}.'
        )
    width = feature_width_of(classifier)
    if width != encoder.embed_dims:
        raise ValueError(
            f'{path} classifies features of width {width}, but those of '
            f'{encoder.model_name!r} are {encoder.embed_dims} wide.'
        )
    names, preprocessing = about['class_names'], about['preprocessing']
    calibration = Calibration.read(about)
    return DeployedClassifier(classifier, encoder, names, preprocessing, calibration)


def _named_encoder(
    path: str | Path,
    about: Mapping,
    model: str | None,
    pretrained: str | None,
    download: bool,
    device: str | torch.device,
) -> OpenCLIPEncoder:
    """Loads the encoder that a classifier file names, or its replacement."""
    if needed := files_to_name(about, model, pretrained):
        elsewhere = ' from elsewhere' if about['identity'] is None else ''
        raise ValueError(
            f'{path} was fitted to features{elsewhere} of {about["model"]} with the '
            f'weights {about["pretrained"]}; a file is not opened because a classifier '
            f'names it: name it with {" and ".join(f"--{key}" for key in needed)} '
            f'({", ".join(needed)}).'
        )
    model, weights = model or about['model'], pretrained or about['pretrained']
    if about['identity'] is None:
        logger.warning(
            '%s was fitted to features from elsewhere, so it cannot be checked that '
            'they are those of %s with the weights %s.',
            *(path, model, weights),
        )
    return OpenCLIPEncoder.shared(model, weights, device=device, download=download)


def files_to_name(
    about: Mapping, model: str | None = None, pretrained: str | None = None
) -> dict[str, str | None]:
    """Returns what a user must name to load the encoder of a classifier file.

    The file itself may name models and weights that open_clip publishes.

    Args:
        about: Description in the file.
        model: Model that the user names.
        pretrained: Weights that the user names.

    Returns:
        ``model``, ``pretrained``, both or nothing, with their values in the file.
    """

    def is_file(name: str) -> bool:
        own = name.startswith(('local-dir:', 'model-')) or name.endswith('.json')
        return own or Path(name).is_absolute() or Path(name).exists()

    with_weights = str(model or about['model']).startswith(('hf-hub:', 'local-dir:'))
    needed = {
        'model': not model and (about['model'] is None or is_file(about['model'])),
        'pretrained': not pretrained
        and (is_file(about['pretrained']) if about['pretrained'] else not with_weights),
    }
    return {key: about[key] for key, value in needed.items() if value}

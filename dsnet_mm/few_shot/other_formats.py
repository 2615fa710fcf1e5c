"""Classifiers in other formats: a weight matrix, open_clip; from MMEngine."""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from dsnet_mm.clip import CLIPAdapter, OpenCLIPEncoder
from dsnet_mm.environment import require
from dsnet_mm.files import check_new, write_atomic
from dsnet_mm.weights import check_kinds

from .deployment import DeployedClassifier, feature_width_of, save_classifier
from .methods.linear_adapter import LinearAdapter


@torch.no_grad()
def export_matrix(
    classifier: nn.Module,
    class_names: tuple[str, ...],
    path: str | Path,
    temperature: float = 1.0,
) -> None:
    """Writes a linear classifier as a safetensors file of ``weight`` and ``bias``.

    Its logits are ``normalise(f) @ weight.T + bias`` for image features f. With a bias
    of 0, ``weight.T`` is what open_clip calls a zero-shot classifier, scale included.
    Both are divided by ``temperature``.

    Raises:
        FileExistsError: If the file exists.
        ValueError: If the classifier is not linear.
    """
    check_new(path)
    unit = torch.eye(feature_width_of(classifier))
    plus, minus = classifier(unit), classifier(-unit)
    weight, bias = (plus - minus).t() / 2, (plus + minus).mean(0) / 2
    f = torch.randn(64, len(unit), generator=torch.Generator().manual_seed(0))
    logits = classifier(f)
    gap = (logits - F.linear(F.normalize(f, dim=-1), weight, bias)).abs().max()
    if gap > 1e-3 * logits.abs().max():
        raise ValueError(
            f'a {type(classifier).__name__} is not linear in the normalised image '
            f'features, so it has no weight matrix; export it to onnx.'
        )
    about = {
        'class_names': json.dumps(class_names),
        'logits': 'normalise(f) @ weight.T + bias',
    }
    tensors = {'weight': weight / temperature, 'bias': bias / temperature}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomic(path, save(tensors, about))


@torch.no_grad()
def export_open_clip(deployed: DeployedClassifier, path: str | Path) -> None:
    """Writes open_clip's weights with the linear adapter in the image projection.

    ``open_clip.create_model(model, pretrained=path)`` then encodes images as encoder
    and adapter together do. The text tower is unchanged.

    Raises:
        FileExistsError: If the file exists.
        ValueError: If the classifier is not a linear adapter, or the image tower does
            not end in a projection.
    """
    check_new(path)
    if not isinstance(deployed.classifier, LinearAdapter):
        raise ValueError(
            f'only a LinearAdapter can be a part of the image projection, not a '
            f'{type(deployed.classifier).__name__}; export it as matrix or onnx.'
        )
    clip, matrix = copy.deepcopy(deployed.encoder.clip), deployed.classifier.matrix
    visual = clip.visual
    if isinstance(getattr(visual, 'proj', None), Tensor):  # ViT
        visual.proj.copy_(visual.proj @ matrix.t())
    else:
        layer = getattr(getattr(visual, 'attnpool', None), 'c_proj', None)  # ResNet
        layer = layer or getattr(getattr(visual, 'head', None), 'proj', None)  # timm
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(matrix @ layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(matrix @ layer.bias)
    if deployed.encoder.tokenizer is None:
        raise ValueError(
            f'{deployed.encoder.model_name!r} is no model of open_clip; export to onnx.'
        )
    size = deployed.encoder.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(deployed.encoder(pixels)[0], matrix)
    if not torch.allclose(clip.encode_image(pixels), wanted, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f'the image tower of {deployed.encoder.model_name!r} does not end in a '
            f'projection that can hold the adapter; export it to onnx.'
        )
    state = {k: v.detach().clone().contiguous() for k, v in clip.state_dict().items()}
    write_atomic(path, save(state))


def convert_checkpoint(
    checkpoint: str | Path,
    config: str | Path,
    path: str | Path,
    pretrained: str | None = None,
    download: bool = False,
) -> None:
    """Turns a checkpoint of MMEngine with a ``CLIPAdapterHead`` into a classifier file.

    Args:
        checkpoint: The checkpoint.
        config: Configuration that it was trained with, or name of one.
        path: File to write.
        pretrained: Weights of the encoder instead of those in the configuration.
        download: Whether weights that are not on this machine may be fetched.

    Raises:
        FileExistsError: If the file exists.
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint has no adapter, or none with text features, or the
            class names are unknown.
        ImportError: If mmengine is not installed.
    """
    require('mmengine', user='A checkpoint of MMEngine')
    from dsnet_mm.checkpoint import read_checkpoint
    from dsnet_mm.engine.config import read_config

    check_new(path)
    cfg = read_config(config)
    backbone = dict(cfg.get('model', {}).get('backbone', {}))
    head = cfg.get('model', {}).get('head', {})
    if 'CLIPAdapterHead' not in head.get('type', ''):
        raise ValueError(f'{config} has no model with a CLIPAdapterHead.')
    found = read_checkpoint(str(checkpoint))
    state = found['state_dict']
    prefix = 'head.adapter.'
    tensors = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if 'text_features' not in tensors or tensors['text_features'].dim() != 2:
        raise ValueError(
            f'{checkpoint} holds no CLIP-Adapter with text features; it is of another '
            f'model.'
        )
    names = found['meta'].get('dataset_meta') or {}
    names = names.get('classes') or head.get('class_names')
    if isinstance(names, str) or names is None:
        raise ValueError(
            f'{checkpoint} does not hold its class names; list them in {config} as '
            f'model.head.class_names.'
        )
    if len(names) != len(tensors['text_features']):
        count = len(tensors['text_features'])
        raise ValueError(
            f'{checkpoint} has {count} classes, but {len(names)} class names.'
        )
    adapter = CLIPAdapter(tensors['text_features'], 1.0, **head.get('adapter', {}))
    check_kinds(adapter.state_dict(), tensors, checkpoint)
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f'the adapter in {checkpoint} is not that of {config}; give the '
            f'configuration that it was trained with.'
        ) from error
    backbone.pop('type', None)
    backbone.update(amp=None)
    if pretrained is not None:
        backbone['pretrained'] = pretrained
    encoder = OpenCLIPEncoder.shared(**backbone, download=download)
    for name, value in encoder.state_dict().items():
        stored = state.get(f'backbone.{name}', value)
        if not torch.equal(stored.to(value), value):
            raise ValueError(
                f'{checkpoint} was trained with other weights of the encoder than '
                f'{encoder.pretrained!r} ({name} differs).'
            )
    features = cfg.get('test_dataloader', {}).get('dataset', {}).get('features') or {}
    save_classifier(
        path,
        adapter.eval(),
        encoder,
        [str(name).replace('_', ' ') for name in names],
        features.get('preprocessing', 'clip'),
        {'method': 'CLIPAdapterHead', 'checkpoint': str(Path(checkpoint).resolve())},
    )

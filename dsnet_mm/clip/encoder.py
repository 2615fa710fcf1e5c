"""The image and text tower of CLIP, and image encoders without text, frozen."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loading import (
    import_open_clip,
    load_timm,
    load_towers,
    model_config,
    register_model,
)
from .prompts import resolve_prompts

LOGIT_SCALE = 30.0
"""Scale of the cosine similarities of encoders without text. Of 5, 10, 20, 30, 50 and
100 it has the lowest cross-entropy on test images of CIFAR-10, with EfficientNet-Lite0,
for the rows of its classifier and for prototypes of four images. For prototypes of one
image it is 10, for those of 16 it is 50."""

_encoders: 'WeakSet[OpenCLIPEncoder]' = WeakSet()
"""The encoders of this process."""

_TOKENIZER_PROBES = (
    'a photo of a cat.',
    'Two  DOGS, one_zebra & 365 "hot-air" balloons; isn\'t it?',
    "un château à l'été, 猫 und Käse",
)
"""Texts with capitals, blanks, punctuation, digits and accents. Two tokenizers with the
same tokens of all of them are taken to be the same."""


class OpenCLIPEncoder(nn.Module):
    """Image and text tower of an open_clip model.

    Both towers are frozen and stay in eval mode. As the backbone of an mmpretrain
    ``ImageClassifier`` the encoder returns image features (N, D), not normalised. They
    are the input of CLIP-Adapter.

    The constructor always loads the weights. :meth:`shared` reuses them if an encoder
    of this process has loaded them.

    Args:
        model: Name of an open_clip model (``'RN50-quickgelu'``), or a JSON file or
            dict with the configuration of a model.
        pretrained: Tag of the weights (``'openai'``), a checkpoint file, or None for
            random weights. A file may be one of OpenAI's TorchScript archives.
        amp: Autocast precision of the towers, ``'float16'`` (GPU only) or
            ``'bfloat16'``. None runs in float32.
        download: Whether open_clip may fetch files that are not on this machine.

    Attributes:
        config: Configuration of the model, as open_clip reads it.
        embed_dims: Width D of the image and text features.
        logit_scale: Scale of the cosine similarities in CLIP's logits.
        text_length: Length of the feature of "a photo of a cat." before normalisation.
        image_size: Height and width of the images in pixels.
        mean: RGB mean for normalisation, from 0 to 1.
        std: RGB standard deviation for normalisation, from 0 to 1.
        preprocess: Preprocessing of the model, the fields of open_clip's
            ``PreprocessCfg``.

    Raises:
        ImportError: If open_clip, or a library that the model needs, is not installed.
        ValueError: If the model, its weights or ``amp`` are unknown, the weights are
            damaged, or they were trained with another kind of GELU than the model has.
        FileNotFoundError: If the weights are neither on this machine nor can be
            downloaded.
    """

    text_length: float = 1.0

    def __init__(
        self,
        model: str | dict,
        pretrained: str | None = None,
        *,
        amp: str | None = None,
        download: bool = True,
    ) -> None:
        super().__init__()
        self.amp = _checked_amp(amp)
        self._origin = _origin(model, pretrained)
        self.pretrained = pretrained
        self._load(model, download)
        self.requires_grad_(False)
        self.eval()
        self.mean, self.std = (tuple(self.preprocess[k]) for k in ('mean', 'std'))
        self._loaded = self._state()
        self._digest: dict[tuple, str] = {}
        _encoders.add(self)

    def _load(self, model: str | dict, download: bool) -> None:
        """Sets what depends on the library of the model."""
        open_clip = import_open_clip()
        name = register_model(model)
        self.model_name = name if isinstance(model, dict) else str(model)
        self.clip, self.tokenizer = load_towers(name, self.pretrained, download)
        self.config = open_clip.get_model_config(name)
        size = self.clip.visual.image_size
        self.image_size = size[0] if isinstance(size, Sequence) else size
        self.preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        self.logit_scale = self.clip.logit_scale.exp().item()
        with torch.no_grad():
            text = self.clip.encode_text(self.tokenizer(['a photo of a cat.']))
        self.embed_dims, self.text_length = text.shape[-1], text.norm().item()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Encodes images.

        Args:
            x: Normalised images (N, 3, H, W), or cached features (N, D), which are
                returned as they are.

        Returns:
            Image features (N, D), not normalised, in float32.

        Raises:
            ValueError: If the precision is float16 and the device is the CPU.
        """
        if x.dim() == 2:
            return (x,)
        with torch.no_grad(), self._autocast(x):
            return (self.clip.encode_image(x).float(),)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encodes tokenised texts (N, L) to features (N, D), not normalised.

        Unlike :meth:`forward` it is differentiable, for methods that learn the input
        of the text tower.
        """
        with self._autocast(tokens):
            return self.clip.encode_text(tokens).float()

    @torch.no_grad()
    def encode_classes(
        self, class_names: Sequence[str], prompts: str | Sequence[str]
    ) -> Tensor:
        """Computes the text features of classes, the weights of zero-shot CLIP.

        Args:
            class_names: Names by label. Underscores become spaces.
            prompts: See :func:`.resolve_prompts`. Features of several prompts are
                normalised, averaged and normalised again.

        Returns:
            Text features (K, D), rows of unit norm.

        Raises:
            ValueError: If a prompt is wrong, or classes have the same tokens.
        """
        names = [name.replace('_', ' ') for name in class_names]
        prompts = resolve_prompts(prompts)
        texts = [prompt.replace('{}', name) for name in names for prompt in prompts]
        tokens = self.tokenizer(texts)
        seen: dict[bytes, str] = {}
        for name, rows in zip(names, tokens.view(len(names), -1), strict=True):
            other = seen.setdefault(rows.numpy().tobytes(), name)
            if other != name:
                raise ValueError(
                    f'the classes {other!r} and {name!r} have the same first '
                    f'{tokens.shape[1]} tokens, all that the text tower reads; rename '
                    f'or shorten them.'
                )
        device = next(self.parameters()).device
        features = [self.encode_text(part.to(device)) for part in tokens.split(256)]
        features = F.normalize(torch.cat(features), dim=-1)
        means = features.view(len(names), len(prompts), -1).mean(1)
        return F.normalize(means, dim=-1)

    def train(self, mode: bool = True) -> 'OpenCLIPEncoder':
        """Stays in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def init_weights(self) -> None:
        """Keeps the weights that the constructor loaded."""

    @classmethod
    def shared(
        cls,
        model: str | dict,
        pretrained: str | None = None,
        *,
        amp: str | None = None,
        device: str | torch.device = 'cpu',
        download: bool = True,
    ) -> 'OpenCLIPEncoder':
        """Returns an encoder, with the towers of an existing one if possible.

        Towers are reused if they have the same model and weights, are on the device,
        and have not been changed since they were loaded. Otherwise they are loaded.
        Only the encoders that use the towers keep them in memory.

        Args:
            model: See the class.
            pretrained: See the class. A checkpoint file is identified by path, size
                and modification time.
            amp: See the class. It need not be that of the existing encoder.
            device: Device of the towers.
            download: See the class.

        Returns:
            The encoder.
        """
        if str(model).startswith('timm:'):
            cls = TimmEncoder
        origin = _origin(model, pretrained)
        device = torch.empty(0, device=device).device  # 'cuda' becomes 'cuda:0'
        for other in _encoders:
            if (
                other._origin == origin
                and next(other.parameters()).device == device
                and other._state() == other._loaded
            ):
                encoder = copy.copy(other)
                encoder.amp = _checked_amp(amp)
                _encoders.add(encoder)
                return encoder
        return cls(model, pretrained, amp=amp, download=download).to(device)

    def digest(self) -> str:
        """Returns the SHA-256 of all weights."""
        state = self._state()
        if state not in self._digest:
            sha = hashlib.sha256()
            for key, value in sorted(self.clip.state_dict().items()):
                sha.update(key.encode())
                sha.update(value.detach().cpu().contiguous().view(-1).numpy().data)
            self._digest.clear()
            self._digest[state] = sha.hexdigest()
        return self._digest[state]

    def identity(self) -> dict[str, object]:
        """Returns what the features depend on, apart from the input and ``amp``.

        Encoders with the same identity have the same features. Caches and classifier
        files hold it.

        Returns:
            A dict that JSON can hold: ``'weights'``, the SHA-256 of the weights;
            ``'config'``, the configuration of the model; ``'tokenizer'``, the SHA-256
            of the tokens of some texts; ``'preprocessing'``, size, mean, standard
            deviation and open_clip's other values; ``'open_clip'``, its version.
        """
        open_clip = import_open_clip()
        identity = {
            'weights': self.digest(),
            'config': self.config,
            'tokenizer': self._hash_tokens(),
            'preprocessing': {**self.preprocess, 'size': self.image_size},
            'open_clip': open_clip.__version__,
        }
        return json.loads(json.dumps(identity))

    def _hash_tokens(self) -> str | None:
        tokens = self.tokenizer(list(_TOKENIZER_PROBES))
        shape = f'{tuple(tokens.shape)}'.encode()
        return hashlib.sha256(shape + tokens.numpy().tobytes()).hexdigest()

    def source(self) -> dict[str, object]:
        """Returns ``'model'``, ``'pretrained'`` and ``'identity'``, for files.

        Paths are absolute, so that they hold in any folder.
        """

        def absolute(name: str | None) -> str | None:
            if name and name.startswith('local-dir:'):
                return f'local-dir:{Path(name.removeprefix("local-dir:")).resolve()}'
            return str(Path(name).resolve()) if name and Path(name).is_file() else name

        return {
            'model': absolute(self.model_name),
            'pretrained': absolute(self.pretrained),
            'identity': self.identity(),
        }

    def _state(self) -> tuple:
        """Returns a value that changes when a parameter is changed or replaced."""
        return tuple((id(p), p._version, p.dtype) for p in self.clip.parameters())

    def _autocast(self, x: Tensor) -> torch.autocast:
        on_cpu = x.device.type == 'cpu'
        if on_cpu and (self.amp == 'float16' or x.dtype == torch.float16):
            raise ValueError(
                'float16 does not run on the CPU; use a GPU, or amp None or bfloat16.'
            )
        return torch.autocast(
            x.device.type,
            dtype=torch.float16 if self.amp == 'float16' else torch.bfloat16,
            enabled=self.amp is not None,
        )


class _ImageTower(nn.Module):
    """An image model of timm, with the names that open_clip has for a CLIP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual = model

    def encode_image(self, x: Tensor) -> Tensor:
        features = self.visual.forward_features(x)
        return self.visual.forward_head(features, pre_logits=True)


class TimmEncoder(OpenCLIPEncoder):
    """An image model of timm, without text.

    The class matrix of the methods, which is text features with CLIP, is made of the
    training images (:func:`.methods.base.prototypes`) or of the rows of the model's own
    classifier (:meth:`encode_classes`). Images are resized to the input size of the
    model on their shorter side: timm's margin (``crop_pct``) is left out.

    Args:
        model: Name of a model of timm after ``timm:``.
        pretrained: See :func:`.load_timm`.
        amp: See :class:`OpenCLIPEncoder`.
        download: Whether timm may fetch weights that are not on this machine.

    Raises:
        ImportError: If timm, or the package of the weights, is not installed.
        ValueError: If the model, its weights or ``amp`` are unknown, or the weights are
            damaged or of another model.
        FileNotFoundError: If the weights are neither on this machine nor can be
            downloaded.
    """

    tokenizer = None

    def _load(self, model: str, download: bool) -> None:
        import_open_clip()
        from open_clip.transform import PreprocessCfg

        visual, data = load_timm(model, self.pretrained, download)
        self.model_name, self.clip = model, _ImageTower(visual)
        self.config = {'timm': model, 'classes': visual.num_classes}
        self.image_size = data['input_size'][-1]
        keys = ('mean', 'std', 'interpolation')
        self.preprocess = asdict(
            PreprocessCfg(self.image_size, **{key: data[key] for key in keys})
        )
        self.logit_scale = LOGIT_SCALE
        with torch.no_grad():
            images = torch.zeros(1, *data['input_size'])
            self.embed_dims = self.clip.encode_image(images).shape[-1]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raises a ValueError: there is no text tower."""
        raise ValueError(f'{self.model_name} has no text tower.')

    @torch.no_grad()
    def encode_classes(
        self,
        class_names: Sequence[str],
        prompts: str | Sequence[str] = (),
        rows: Mapping[str, Sequence[str]] = {},
    ) -> Tensor:
        """Returns rows of the model's own classifier, of unit norm (K, D).

        Its biases are left out.

        Args:
            class_names: Names by label. Each is a class of ImageNet, by one of the
                names that timm has for it, or by its WordNet number.
            prompts: Not used.
            rows: Several classes of ImageNet for a class name: the mean of their rows.

        Raises:
            ValueError: If the model has no classifier of ImageNet, or a class is not in
                it, or several have its name.
        """
        from timm.data import ImageNetInfo, infer_imagenet_subset

        head = self.clip.visual.get_classifier()
        head = head[0] if isinstance(head, tuple) else head  # of distilled models
        subset = infer_imagenet_subset({'num_classes': self.config['classes']})
        if subset is None:
            raise ValueError(
                f'{self.model_name} with these weights has no classifier of ImageNet; '
                f'leave out class_rows.'
            )
        known: dict[str, list[int]] = {}
        info = ImageNetInfo(subset)
        for i, synset in enumerate(info.label_names()):
            for name in (synset, *info.label_name_to_description(synset).split(',')):
                known.setdefault(name.strip().lower(), []).append(i)
        weight, matrix = head.weight.flatten(1), []
        for own in class_names:
            indices = []
            for name in rows.get(own, [own]):
                found = known.get(name.replace('_', ' ').lower(), [])
                if len(found) != 1:
                    raise ValueError(
                        f'ImageNet has {len(found) or "no"} classes named {name!r}; '
                        f'name those of {own!r} in class_rows, by their names or their '
                        f'WordNet numbers, or leave out class_rows.'
                    )
                indices += found
            matrix.append(weight[indices].mean(0))
        return F.normalize(torch.stack(matrix), dim=-1)

    def identity(self) -> dict[str, object]:
        """Adds the version of timm, see :meth:`OpenCLIPEncoder.identity`."""
        import timm

        return {**super().identity(), 'timm': timm.__version__}

    def _hash_tokens(self) -> None:
        return None


def feature_width(model: str) -> int:
    """Returns the width D of the features of a model, without loading it.

    Args:
        model: See :class:`OpenCLIPEncoder`.

    Returns:
        The width.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If the model is unknown.
        FileNotFoundError: If the configuration file does not exist.
    """
    return model_config(register_model(model))['embed_dim']


def _checked_amp(amp: str | None) -> str | None:
    if amp not in (None, 'float16', 'bfloat16'):
        raise ValueError(f"amp must be None, 'float16' or 'bfloat16', got {amp!r}.")
    return amp


def _origin(model: str | dict, pretrained: str | None) -> tuple:
    """Identifies a model and its weights, by name or by the state of their files."""

    def files(name: str | dict | None) -> str | tuple | None:
        if isinstance(name, dict):
            return json.dumps(name, sort_keys=True)
        path = Path(str(name).removeprefix('local-dir:'))
        if name is None or not path.exists():
            return name
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        stats = [(file.resolve(), file.stat()) for file in found]
        return tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in stats)

    return files(model), files(pretrained)

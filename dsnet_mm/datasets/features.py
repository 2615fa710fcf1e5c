"""Features of pictures and class names, stored on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsnet_mm.files import write_atomic
from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.tasks import Item

from .pictures import PREPROCESSINGS, build_transform, open_picture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of labelled pictures.

    Attributes:
        features: Features of each view (V, N, D), not normalised.
        labels: Labels (N,).
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> 'Features':
        """Returns the features of the pictures with these indices."""
        return Features(self.features[:, index], self.labels[index])


class FeatureCache:
    """Features on disk, one file for each list of pictures and set of options.

    The name of a file is a hash of the encoder's identity (weights, configuration,
    tokenizer, preprocessing, version of open_clip), the options below, the versions of
    Pillow and torchvision, and the path, size and modification time of each picture.
    Methods, seeds and runs share the files. Each file has a checksum. A damaged file is
    computed again.

    Args:
        folder: Folder of the files. It is created if needed.
        encoder: Encoder of the pictures and class names, on its device.
        preprocessing: One of ``PREPROCESSINGS``.
        crop_scale: Least and most area of the random crops of augmented views, as a
            fraction of the picture. The default is CoOp's; Tip-Adapter has (0.5, 1).
        batch_size: Pictures encoded at once.
        workers: Number of worker processes that load pictures.
        on_bad_image: What to do with a picture that cannot be read: ``'error'``
            raises an error, ``'skip'`` logs its path and omits it.
        progress: Called with the number of pictures encoded since the last call.

    Raises:
        ValueError: If an option is unknown.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: OpenCLIPEncoder,
        *,
        preprocessing: str = 'clip',
        crop_scale: tuple[float, float] = (0.08, 1.0),
        batch_size: int = 64,
        workers: int = 0,
        on_bad_image: str = 'error',
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if preprocessing not in PREPROCESSINGS:
            raise ValueError(
                f'preprocessing must be one of {PREPROCESSINGS}, got {preprocessing!r}.'
            )
        if on_bad_image not in ('error', 'skip'):
            raise ValueError(
                f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}."
            )
        self.folder = Path(folder)
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.crop_scale = tuple(crop_scale)
        self.batch_size = batch_size
        self.workers = workers
        self.on_bad_image = on_bad_image
        self.progress = progress

    def images(self, items: Sequence[Item], views: int = 0) -> Features:
        """Returns the features of pictures.

        Args:
            items: The pictures.
            views: Number of augmented views (random crop and flip). 0 gives one view,
                the picture itself.

        Returns:
            The features, with max(views, 1) views.

        Raises:
            FileNotFoundError: If a picture is missing.
            ValueError: If one cannot be read and ``on_bad_image`` is ``'error'``.
        """
        stats = []
        for path, label, _ in items:
            try:
                stat = os.stat(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f'the picture {path} is missing.') from error
            stats.append((path, label, stat.st_size, stat.st_mtime_ns))
        key = {
            'kind': 'images',
            'encoder': self.encoder.identity(),
            'amp': self.encoder.amp,
            'preprocessing': self.preprocessing,
            'libraries': _picture_libraries(),
            'views': views,
            'crop_scale': self.crop_scale if views else None,
            'on_bad_image': self.on_bad_image,
            'pictures': hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }
        stored = self._load_or_build(key, lambda: self._encode(items, views))
        return Features(stored['features'], stored['labels'])

    def texts(self, class_names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Returns text features (K, D), see :meth:`OpenCLIPEncoder.encode_classes`."""
        key = {
            'kind': 'texts',
            'encoder': self.encoder.identity(),
            'amp': self.encoder.amp,
            'class_names': list(class_names),
            'prompts': list(prompts),
        }

        def build() -> dict[str, Tensor]:
            features = self.encoder.encode_classes(class_names, prompts)
            return {'text_features': features.cpu()}

        return self._load_or_build(key, build)['text_features']

    def _load_or_build(
        self, key: dict, build: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        text = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = self.folder / f'{key["kind"]}_{name}.safetensors'
        tensors = _read_verified(path, text)
        if tensors is None:
            tensors = build()
            metadata = {'key': text, 'sha256': _checksum(tensors)}
            write_atomic(path, save(tensors, metadata))
        return tensors

    def _encode(self, items: Sequence[Item], views: int) -> dict[str, Tensor]:
        pictures = _Pictures(items, self.encoder, self.preprocessing, self.crop_scale)
        device = next(self.encoder.parameters()).device
        features, kept = [], None
        for view in range(max(views, 1)):
            pictures.view = view if views else None
            loader = DataLoader(
                pictures, self.batch_size, num_workers=self.workers, collate_fn=list
            )
            encoded, good = [], []
            for batch in loader:
                readable = [x for x in batch if not isinstance(x, str)]
                for problem in (x for x in batch if isinstance(x, str)):
                    if self.on_bad_image == 'error':
                        raise ValueError(
                            f'{problem}; repair or remove it, or set on_bad_image to '
                            f"'skip'."
                        )
                    if view == 0:
                        logger.warning('skipped: %s', problem)
                if readable:
                    encoded.append(
                        self.encoder(torch.stack(readable).to(device))[0].cpu()
                    )
                good += [not isinstance(x, str) for x in batch]
                if self.progress is not None:
                    self.progress(len(batch))
            if not encoded:
                raise ValueError('none of the pictures can be read.')
            features.append(torch.cat(encoded))
            kept = torch.tensor(good)
        labels = torch.tensor([item[1] for item in items])[kept]
        return {'features': torch.stack(features), 'labels': labels}


class _Pictures(Dataset):
    """Inputs of the encoder, and error messages in place of unreadable pictures."""

    def __init__(
        self,
        items: Sequence[Item],
        encoder: OpenCLIPEncoder,
        preprocessing: str,
        crop_scale: tuple[float, float],
    ) -> None:
        self.paths = [item[0] for item in items]
        self.plain = build_transform(encoder, preprocessing)
        self.augmented = build_transform(encoder, preprocessing, crop_scale)
        self.view: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = open_picture(self.paths[index])
        except ValueError as error:
            return str(error)
        if self.view is None:
            return self.plain(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.view * 1_000_003 + index)
            return self.augmented(image)


def _picture_libraries() -> dict[str, str]:
    return {name: version(name) for name in ('pillow', 'torchvision')}


def _checksum(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def _read_verified(path: Path, key: str) -> dict[str, Tensor] | None:
    """Returns the tensors of a cache file, or None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        logger.warning('rebuilding the damaged cache file %s (%s)', path, error)
        return None
    if metadata.get('key') != key or metadata.get('sha256') != _checksum(tensors):
        logger.warning(
            'rebuilding the cache file %s: its key or checksum is wrong', path
        )
        return None
    return tensors

"""Features of images and class names, stored on disk."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.files import sha256, write_atomic
from dsnet_mm.progress import progress_bar

from .images import PREPROCESSINGS, build_transform, hash_pixels, open_image
from .splits import Item

logger = logging.getLogger(__name__)

SHARD = 512
"""Views in a file of the cache. A process that is killed loses at most one file."""


@dataclass(frozen=True)
class Features:
    """Features of labelled images.

    Attributes:
        features: Features of each view (V, N, D), not normalised.
        labels: Labels (N,).
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> 'Features':
        """Returns the features of the images with these indices."""
        return Features(self.features[:, index], self.labels[index])


def balancing(labels: Tensor) -> Tensor:
    """Returns indices that repeat images up to the number of the largest class.

    For every method, also in closed form, that is a weight of the images.
    """
    most = int(labels.bincount().max())
    classes = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    rows = [own.repeat(-(-most // len(own)))[:most] for own in classes]
    return torch.cat(rows).sort().values


@dataclass(eq=False)
class FeatureCache:
    """Features of images and class names on disk.

    The features of all images with the same options are in one folder, in files of
    about ``SHARD`` views. An image is encoded once, whichever draw, seed, run or
    process asks for it. The name of the folder is a hash of the encoder's identity
    (weights, configuration, tokenizer, preprocessing, version of open_clip), of the
    options below, and of the versions of Pillow and torchvision. An image is known by
    path, size and modification time. One that these do not find is compared by content
    with those of its name, folder and size, so a copied or touched file is not encoded
    again. Each file has a checksum, and the images of a damaged one are encoded again.

    Args:
        folder: Folder of the cache. It is created if needed.
        encoder: Encoder of the images and class names, on its device.
        preprocessing: One of ``PREPROCESSINGS``.
        crop_scale: Least and most area of the random crops of augmented views, as a
            fraction of the image. The default is CoOp's; Tip-Adapter has (0.5, 1).
        batch_size: Views encoded at once.
        workers: Number of worker processes that load images.
        on_bad_image: What to do with an image that cannot be read: ``'error'``
            raises an error, ``'skip'`` logs its path and omits it.
        quiet: Whether to hide the bar of the encoding.

    Raises:
        ValueError: If an option is unknown, or ``folder`` is a file.
    """

    folder: str | Path
    encoder: OpenCLIPEncoder
    _: KW_ONLY
    preprocessing: str = 'clip'
    crop_scale: tuple[float, float] = (0.08, 1.0)
    batch_size: int = 64
    workers: int = 0
    on_bad_image: str = 'error'
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.preprocessing not in PREPROCESSINGS:
            raise ValueError(
                f'preprocessing must be one of {PREPROCESSINGS}, got '
                f'{self.preprocessing!r}.'
            )
        if self.on_bad_image not in ('error', 'skip'):
            raise ValueError(
                f"on_bad_image must be 'error' or 'skip', got {self.on_bad_image!r}."
            )
        self.folder = Path(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f'the cache {self.folder} is a file; choose a folder.')
        self._shards: dict[Path, _Shards] = {}

    def images(self, items: Sequence[Item], views: int = 0) -> Features:
        """Returns the features of images, and encodes those that are missing.

        Args:
            items: The images.
            views: Number of augmented views (random crop and flip). 0 gives one view,
                the image itself. The crops of an image depend on its name and
                folder, so they are the same in each draw.

        Returns:
            The features, with max(views, 1) views.

        Raises:
            FileNotFoundError: If an image is missing.
            ValueError: If one cannot be read and ``on_bad_image`` is ``'error'``.
        """
        good, features = self._read('features', items, views)
        labels = torch.tensor([items[i][1] for i in good])
        return Features(features.transpose(0, 1).contiguous(), labels)

    def encode(
        self,
        items: Sequence[Item],
        views: int = 0,
        what: str = 'encoding',
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Encodes the images that are not in the cache yet.

        Args:
            items: The images.
            views: See :meth:`images`.
            what: Name of the bar.
            share: Number of this process and number of processes. Each encodes its
                share of the images.

        Raises:
            FileNotFoundError: If an image is missing.
            ValueError: If one cannot be read and ``on_bad_image`` is ``'error'``.
        """
        shards = self._shards_of(views)
        size = max(1, SHARD // max(views, 1))
        rank, processes = share
        wanted = {
            key: item[0]
            for i, (key, item) in enumerate(zip(image_keys(items), items, strict=True))
            if i // size % processes == rank
        }
        shards.scan(wanted)
        missing = {key: p for key, p in wanted.items() if key not in shards.rows}
        if not missing:
            return
        keys, encoded = list(missing), []
        with progress_bar(len(keys), what, 'images', self.quiet) as bar:
            for batch in self._encode(list(missing.values()), views):
                encoded += batch
                bar.update(len(batch))
                while len(encoded) >= size or len(encoded) == len(keys) > 0:
                    shards.write(dict(zip(keys[:size], encoded[:size], strict=True)))
                    keys, encoded = keys[size:], encoded[size:]

    def count_missing(self, items: Sequence[Item], views: int = 0) -> int:
        """Returns the number of images that are not in the cache yet."""
        shards = self._shards_of(views)
        keys = image_keys(items)
        shards.scan(dict(zip(keys, (item[0] for item in items), strict=True)))
        return sum(key not in shards.rows for key in keys)

    def pixels(self, items: Sequence[Item], views: int = 0) -> dict[str, str]:
        """Returns a hash of the pixels of each image, by path.

        See :meth:`images` for the arguments and errors.
        """
        good, hashes = self._read('pixels', items, views)
        return {
            items[i][0]: bytes(row).hex()
            for i, row in zip(good, hashes.tolist(), strict=True)
        }

    def texts(self, class_names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Returns text features (K, D), see :meth:`OpenCLIPEncoder.encode_classes`."""
        key = {
            'encoder': self.encoder.identity(),
            'amp': self.encoder.amp,
            'class_names': list(class_names),
            'prompts': list(prompts),
        }
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f'texts_{_short_hash(text)}.safetensors'
        tensors = _read_file(path) if path.is_file() else None
        if tensors is None:
            features = self.encoder.encode_classes(class_names, prompts)
            tensors = {'text_features': features.cpu()}
            _write_file(path, text, tensors)
        return tensors['text_features']

    def _read(
        self, name: str, items: Sequence[Item], views: int
    ) -> tuple[list[int], Tensor]:
        """Returns which images can be read, and their rows of a tensor."""
        keys, shards = image_keys(items), self._shards_of(views)
        rows = None
        while rows is None:  # a damaged file is found when it is read
            self.encode(items, views)
            found = [
                shards.rows.get(key, f'the image {item[0]} has just been changed')
                for key, item in zip(keys, items, strict=True)
            ]
            for problem in (x for x in found if isinstance(x, str)):
                self._refuse(problem)
                logger.warning('skipped: %s', problem)
            good = [i for i, x in enumerate(found) if not isinstance(x, str)]
            if not good:
                raise ValueError('none of the images can be read.')
            rows = shards.read(name, [found[i] for i in good])
        return good, rows

    def _shards_of(self, views: int) -> '_Shards':
        key = {
            'encoder': self.encoder.identity(),
            'amp': self.encoder.amp,
            'preprocessing': self.preprocessing,
            'libraries': {name: version(name) for name in ('pillow', 'torchvision')},
            'views': views,
            'crop_scale': tuple(self.crop_scale) if views else None,
        }
        text = json.dumps(key, sort_keys=True)
        folder = self.folder / f'images_{_short_hash(text)}'
        return self._shards.setdefault(folder, _Shards(folder, text))

    def _encode(
        self, paths: Sequence[str], views: int
    ) -> Iterator[list['_Encoded | str']]:
        """Yields batches of encoded images, or of error messages."""
        device = next(self.encoder.parameters()).device
        crop = self.crop_scale if views else None
        transform = build_transform(self.encoder, self.preprocessing, crop)
        loader = DataLoader(
            _Images(paths, views, transform),
            max(1, self.batch_size // max(views, 1)),
            num_workers=self.workers,
            collate_fn=list,
        )
        for batch in loader:
            good = [x for x in batch if not isinstance(x, str)]
            for problem in (x for x in batch if isinstance(x, str)):
                self._refuse(problem)
            if good:
                stacked = torch.cat([image for image, *_ in good]).to(device)
                features = self.encoder(stacked)[0].cpu().chunk(len(good))
                results = iter(
                    zip(features, *[*zip(*good, strict=True)][1:], strict=True)
                )
            yield [x if isinstance(x, str) else next(results) for x in batch]

    def _refuse(self, problem: str) -> None:
        if self.on_bad_image == 'error':
            raise ValueError(
                f"{problem}; repair or remove it, or set on_bad_image to 'skip'."
            )


class _Shards:
    """The files of the images that were encoded with the same options.

    Attributes:
        folder: Folder of the files.
        rows: File and row of each image, or the reason why it cannot be read.
        contents: The same by :func:`_name_key` and content.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.rows: dict[str, tuple[Path, int] | str] = {}
        self.contents: dict[str, dict[str, tuple[Path, int]]] = {}
        self._seen: set[Path] = set()

    def scan(self, images: Mapping[str, str]) -> None:
        """Reads the lists of images of files that are new.

        An image that they lack by its key is looked for by its content. Its file is
        read for that only if one of the same name, folder and size is known.
        """
        for path in sorted(set(self.folder.glob('*.safetensors')) - self._seen):
            if path.is_file():
                with _removing_damaged(path), safe_open(path, 'pt') as file:
                    self._add(path, file.metadata() or {})
        for key in images.keys() - self.rows.keys():
            with suppress(OSError):  # a forbidden file is refused when it is read
                known = self.contents.get(_name_key(images[key]))
                if known and (place := known.get(sha256(images[key]))):
                    self.rows[key] = place

    def write(self, images: Mapping[str, '_Encoded | str']) -> None:
        """Writes a file of features and pixel hashes."""
        good = {k: x for k, x in images.items() if not isinstance(x, str)}
        bad = {k: x for k, x in images.items() if isinstance(x, str)}
        tensors, contents = {}, ()
        if good:
            features, pixels, contents = zip(*good.values(), strict=True)
            tensors = {'features': torch.stack(features), 'pixels': torch.stack(pixels)}
        about = {
            'pictures': json.dumps(list(good)),
            'bad': json.dumps(bad),
            'contents': json.dumps(contents),
        }
        path = self.folder / f'{_short_hash(json.dumps(list(images)))}.safetensors'
        _write_file(path, self.key, tensors, about)
        self._add(path, about)

    def read(self, name: str, places: Sequence[tuple[Path, int]]) -> Tensor | None:
        """Returns rows of a tensor.

        If files are damaged, it returns None, and their images are missing from then
        on.
        """
        wanted: dict[Path, list[tuple[int, int]]] = {}
        for to, (path, row) in enumerate(places):
            wanted.setdefault(path, []).append((to, row))
        found, damaged = None, set()
        for path, rows in wanted.items():
            tensors = _read_file(path)
            if tensors is None:
                damaged.add(path)
                continue
            tensor = tensors[name]
            if found is None:
                found = tensor.new_empty(len(places), *tensor.shape[1:])
            to, at = zip(*rows, strict=True)
            found[list(to)] = tensor[list(at)]
        for known in (self.rows, *self.contents.values()):
            for key in [k for k, v in known.items() if v[0] in damaged]:
                del known[key]
        return None if damaged else found

    def _add(self, path: Path, about: Mapping[str, str]) -> None:
        images = json.loads(about['pictures'])
        self.rows.update({key: (path, row) for row, key in enumerate(images)})
        self.rows.update(json.loads(about['bad']))
        # An older version did not write them.
        for row, (name, content) in enumerate(json.loads(about.get('contents', '[]'))):
            self.contents.setdefault(name, {})[content] = path, row
        self._seen.add(path)


_Encoded = tuple[Tensor, Tensor, tuple[str, str]]
"""Features (V, D), a hash of the pixels, and those of name and content."""


@dataclass
class _Images(Dataset):
    """Inputs of the encoder with both hashes, and messages for unreadable images."""

    paths: Sequence[str]
    views: int
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Encoded | str:
        try:
            image = open_image(self.paths[index])
            content = _name_key(self.paths[index]), sha256(self.paths[index])
        except ValueError as error:
            return str(error)
        pixels = torch.tensor(list(hash_pixels(image)), dtype=torch.uint8)
        if self.views == 0:
            return self.transform(image)[None], pixels, content
        place = Path(self.paths[index])
        augmented = []
        for view in range(self.views):
            with torch.random.fork_rng(devices=[]):
                name = f'{place.parent.name}/{place.name}/{view}'
                torch.manual_seed(zlib.crc32(name.encode()))  # it takes 32 bits
                augmented.append(self.transform(image))
        return torch.stack(augmented), pixels, content


def image_keys(items: Sequence[Item]) -> list[str]:
    """Returns a hash of path, size and modification time of each image.

    Raises:
        FileNotFoundError: If an image is missing.
    """
    keys = []
    for path, *_ in items:
        try:
            stat = os.stat(path)
        except (OSError, ValueError) as error:  # of a name with a zero byte
            raise FileNotFoundError(
                f'the image {path} is missing or forbidden ({error}).'
            ) from error
        state = f'{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}'
        keys.append(_short_hash(state))
    return keys


def _name_key(path: str) -> str:
    """Returns a hash of name, folder and size of a file."""
    place = Path(path)
    return _short_hash(f'{place.parent.name}/{place.name}/{place.stat().st_size}')


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def _write_file(
    path: Path, key: str, tensors: dict[str, Tensor], about: Mapping[str, str] = {}
) -> None:
    metadata = {'key': key, 'sha256': _checksum(tensors), **about}
    write_atomic(path, save(tensors, metadata))


def _read_file(path: Path) -> dict[str, Tensor] | None:
    """Returns the tensors of a cache file, or None if it is missing or damaged."""
    with _removing_damaged(path):
        with safe_open(path, 'pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get('sha256')
        if checksum != _checksum(tensors):
            raise ValueError('its checksum is wrong')
        return tensors
    return None


@contextmanager
def _removing_damaged(path: Path) -> Iterator[None]:
    """Removes a damaged cache file with a warning, so that it is named once."""
    try:
        yield
    except FileNotFoundError:  # another process has just removed it
        pass
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning('removing the damaged cache file %s (%s)', path, error)
        path.unlink(missing_ok=True)

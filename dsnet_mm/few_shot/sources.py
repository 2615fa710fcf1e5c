"""Where a run has its features from: images and an encoder, or a file."""

import copy
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets import (
    PUBLIC_DATASETS,
    FewShotTask,
    Item,
    load_task,
    sample_few_shot,
)
from dsnet_mm.datasets.check import describe_copies, find_contradictions, find_copies
from dsnet_mm.datasets.feature_file import FeatureFile, read_feature_file
from dsnet_mm.datasets.features import FeatureCache, Features, image_keys
from dsnet_mm.files import sha256

from .config import FewShotConfig
from .methods import METHODS
from .methods.base import CROPS, TEXT_LENGTH

logger = logging.getLogger(__name__)

Draw = tuple[int, int]
"""Shots and seed."""


@dataclass(frozen=True)
class Drawn:
    """The images of a draw.

    Attributes:
        train: Training images, with augmented views.
        plain: The same without augmentation, or None if they are not needed.
        val: Validation images, or None if there are none.
        overlap: Share of the training images that two seeds have in common on average,
            0 to 1. With 1 nothing is redrawn.
    """

    train: Features
    plain: Features | None
    val: Features | None
    overlap: float = 0.0


class Source(ABC):
    """Features of a data set. :meth:`prepare` sets the last six attributes.

    Attributes:
        title: Names of data set and model.
        class_names: Names by label.
        prompts: Prompts of the text features.
        preprocessing: One of ``PREPROCESSINGS``.
        shots: Numbers of shots of the run.
        has_val: Whether there are validation images.
        notes: What is left out of the run, and why, in sentences.
        encoder: The encoder, or None if there is only a file.
        made_by: The encoder, as :func:`save_classifier` takes it.
        text_features: Text features (K, D), or the class matrix that stands for them.
            None if it is made of the training images of each draw.
        has_text: Whether there is an encoder with a text tower.
        has_matrix: Whether ``text_features`` will not be None.
        logit_scale: Scale of the cosine similarities.
        text_length: See :class:`FewShotData`.
        fingerprint: Hashes of the data, to compare with those of an interrupted run.
    """

    notes: list[str]
    encoder: OpenCLIPEncoder | None = None

    def possible(self, wanted: Sequence[int], most: int, has: str) -> tuple[int, ...]:
        """Returns the numbers of shots up to ``most``, and notes what is left out."""
        found = tuple(k for k in wanted if k <= most)
        if len(found) < len(wanted):
            none = ', '.join(str(k) for k in wanted if k > most)
            message = f'{has} training images, so there are no {none} shots.'
            if not found:
                raise ValueError(f'{message} Choose fewer with --shots.')
            self.notes.append(f'{message} Run: {", ".join(map(str, found))}.')
        return found

    def contents(self) -> str:
        """Returns a hash of the content of all images, empty if none is needed."""
        return ''

    @abstractmethod
    def prepare(self) -> None:
        """Loads the encoder, or hashes the file."""

    @abstractmethod
    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        """Encodes all images of a run, those of all draws together.

        Raises:
            ValueError: If an image cannot be read, or none of a class, or a test
                image is also a training or validation image.
        """

    @abstractmethod
    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        """Returns the images of a draw."""

    def cropped(self, crop_scale: tuple[float, float]) -> 'Source':
        """Returns the source with such random crops, where that can be chosen."""
        return self

    @abstractmethod
    def test(self) -> Features:
        """Returns the test images."""

    @abstractmethod
    def all_labelled(self, test: bool = True, plain: bool = False) -> Features:
        """Returns the images of train, val and perhaps test, with views or plain."""


class ImageSource(Source):
    """Features of the images of a data set."""

    def __init__(
        self, config: FewShotConfig, quiet: bool = False, whole: bool = False
    ) -> None:
        self.config, self.quiet, self.notes = config, quiet, []
        self.task = load_train_task(config, whole)
        self.title = f'{self.task.name}, {Path(config.model).stem}'
        self.class_names, self.prompts = self.task.class_names, self.task.prompts
        self.preprocessing = config.preprocessing
        self.has_text, rows = not config.model.startswith('timm:'), config.class_rows
        self.has_matrix = self.has_text or rows is not None
        if not self.has_text:
            self.prompts = ()
        elif rows is not None:
            raise ValueError(
                f'class_rows are for encoders timm:NAME, and {config.model} has text.'
            )
        self.has_val = bool(self.task.split['val'])
        counts = Counter(label for _, label, _ in self.task.split['train'])
        least = min(counts, key=counts.get)
        has = f'{self.class_names[least]!r} of {config.dataset} has {counts[least]}'
        self.shots = self.possible(config.shots, counts[least], has)

    def prepare(self) -> None:
        self.cache = open_cache(self.config, self.quiet)
        self.encoder = self.made_by = self.cache.encoder
        self.caches = {self.cache.crop_scale: self.cache}
        self.logit_scale = self.encoder.logit_scale
        self.text_length = self.config.text_length or self.encoder.text_length
        rows, names = self.config.class_rows, self.class_names
        self.text_features = None
        if self.has_text:
            self.text_features = self.cache.texts(names, self.prompts)
        elif self.has_matrix:
            self.text_features = self.encoder.encode_classes(names, (), rows).cpu()
        # Paths and labels, and the files of a user's own data set.
        items = self._items()
        if self.task.name not in PUBLIC_DATASETS:
            items += image_keys([item[1:] for item in items])
        self.fingerprint = {
            'pictures': _hash(items),
            'class names': _hash(self.class_names),
            'weights': self.encoder.digest(),
            'model': _hash({**self.encoder.identity(), 'weights': None}),
        }

    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        parts = collect_draws(self.task, draws)
        used = (METHODS[m] for m in (*self.config.methods, *self.config.oracle))
        scales = dict.fromkeys(m.crop_scale for m in used if m.defaults)
        first, *others = [self.cropped(scale) for scale in scales] or [self]
        encode_parts(self.task, first.cache, parts, self.config.views, plain)
        for source in others:
            source.cache.encode(parts['train'], self.config.views, 'encoding train')
        if self.config.on_bad_image == 'skip':
            for shots, seed in draws:  # raises before the fits
                first.draw(shots, seed, False)

    def cropped(self, crop_scale: tuple[float, float]) -> 'ImageSource':
        other, scale = copy.copy(self), tuple(self.config.crop_scale or crop_scale)
        cache = replace(self.cache, crop_scale=scale)
        other.cache = self.caches.setdefault(scale, cache)
        return other

    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        items = sample_few_shot(self.task.split, shots, seed)
        train = self.cache.images(items['train'], self.config.views)
        read = set(train.labels.tolist())
        for label, name in enumerate(self.class_names):
            if label not in read:
                raise ValueError(
                    f'none of the training images of {name!r} with {shots} shots and '
                    f'seed {seed} can be read; repair or remove them.'
                )
        return Drawn(
            train,
            self.cache.images(items['train']) if plain else None,
            self.cache.images(items['val']) if items['val'] else None,
            _overlap((item[1] for item in self.task.split['train']), shots),
        )

    def test(self) -> Features:
        return self.cache.images(self.task.split['test'])

    def all_labelled(self, test: bool = True, plain: bool = False) -> Features:
        parts = ('train', 'val', 'test')[: 2 + test]
        items = [item for part in parts for item in self.task.split[part]]
        return self.cache.images(items, 0 if plain else self.config.views)

    def contents(self) -> str:
        if self.task.name in PUBLIC_DATASETS:
            return ''
        return _hash([[*item, _content(item[1])] for item in self._items()])

    def _items(self) -> list[list]:
        return [[k, *item] for k, part in self.task.split.items() for item in part]


class FeatureSource(Source):
    """Features of a file, see :class:`FeatureFile`.

    Draws of k shots are CoOp's, from the part ``train`` or else from that with most
    shots. Seed 1 takes the part ``train_k`` as it is, if the file has it. If no part
    has more than k shots, all seeds have the same training images.
    """

    def __init__(self, config: FewShotConfig) -> None:
        self.config, self.notes = config, []
        self.file: FeatureFile = read_feature_file(config.features)
        self.class_names, about = self.file.class_names, self.file.about
        model = Path(about.get('model', 'features')).name.removesuffix('.json')
        self.title = f'{Path(config.features).stem}, {model}'
        self.prompts = json.loads(about.get('prompts', '[]'))
        self.preprocessing = about.get('preprocessing', 'clip')
        self.made_by = {
            'model': about.get('model'),
            'pretrained': about.get('pretrained') or None,
            'identity': json.loads(about.get('identity', 'null')),
        }
        self.has_val = self.file.val is not None
        self.has_text, self.has_matrix = False, self.file.text_features is not None
        # The part that draws are made from.
        counts = [k for k in self.file.train if k is not None]
        self.pool = None if None in self.file.train else max(counts)
        self.shots = self._possible(sorted(counts))
        if config.selection == 'cv' and self.pool not in self.file.plain:
            views = len(self.file.train[self.pool].features)
            which = 'only view' if views == 1 else f'first of {views} views'
            self.notes.append(
                f'Selection by `cv` validates on the {which} of the training images, '
                f'because the file has no features of them as test images are.'
            )
        starts = {'task_res', 'linear_probe_zs', 'clap'} & {*config.methods}
        if starts and not (config.text_length or 'text_length' in about):
            self.notes.append(
                f'The file has no text_length, so TaskRes, ZS-LP and CLAP take '
                f"{TEXT_LENGTH:g}, about that of OpenAI's CLIP."
            )
        if about.get('views', '0') != '0' and 'crop_scale' in about:
            self.notes.append(
                f'Area of the random crops: {about["crop_scale"]} for all methods.'
            )

    def _possible(self, here: list[int]) -> tuple[int, ...]:
        """Returns the numbers of shots that are wanted and possible."""
        wanted = self.config.shots or tuple(here) or (1, 2, 4, 8, 16)
        most = max(here, default=0)
        if self.pool is None:
            counts = self.file.train[None].labels.bincount(
                minlength=len(self.class_names)
            )
            most = max(most, int(counts.min()))
        return self.possible(
            wanted, most, f'a class of {self.config.features} has {most}'
        )

    def prepare(self) -> None:
        self.text_features = self.file.text_features
        self.logit_scale = self.file.logit_scale
        known = self.config.text_length or self.file.about.get('text_length')
        self.text_length = float(known or TEXT_LENGTH)
        content = Path(self.config.features).read_bytes()
        self.fingerprint = {
            'features': hashlib.sha256(content).hexdigest(),
            'class names': _hash(self.class_names),
        }

    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        """Encodes all images of a run, those of all draws together.

        Raises:
            ValueError: If an image cannot be read, or none of a class, or a test
                image is also a training or validation image.
        """
        parts = [part for part in (*self.file.train.values(), self.file.val) if part]
        rows = (row for part in parts for row in part.features.flatten(0, 1))
        seen = {row.numpy().tobytes() for row in rows}
        copies = [
            i
            for i, row in enumerate(self.file.test.features.transpose(0, 1))
            if any(view.numpy().tobytes() in seen for view in row)
        ]
        if copies:
            raise ValueError(
                f'{len(copies)} rows of test_features are also rows of training or '
                f'validation features, such as row {copies[0]}; remove them.'
            )

    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        pool, val = self.file.train[self.pool], self.file.val
        parts = {'train': pool, 'val': val}
        split = {  # the rows, as sample_few_shot takes images
            name: [
                (str(row), label, self.class_names[label])
                for row, label in enumerate(part.labels.tolist() if part else [])
            ]
            for name, part in parts.items()
        }
        drawn = {
            name: torch.tensor([int(item[0]) for item in items], dtype=torch.long)
            for name, items in sample_few_shot(split, shots, seed).items()
        }
        if seed == 1 and shots in self.file.train:
            train, kept = self.file.train[shots], self.file.plain.get(shots)
        else:
            train, kept = pool.take(drawn['train']), self.file.plain.get(self.pool)
            kept = kept and kept.take(drawn['train'])
        return Drawn(
            train,
            kept if plain else None,
            val and _first_view(val.take(drawn['val'])),
            _overlap(pool.labels.tolist(), shots),
        )

    def test(self) -> Features:
        return _first_view(self.file.test)

    def all_labelled(self, test: bool = True, plain: bool = False) -> Features:
        pool = self.file.train[self.pool]
        if plain:
            pool = _first_view(self.file.plain.get(self.pool) or pool)
        parts = (pool, self.file.val, self.file.test)
        parts = [part for part in parts[: 2 + test] if part]
        views = torch.arange(max(len(part.features) for part in parts))
        features = [part.features[views % len(part.features)] for part in parts]
        return Features(
            torch.cat(features, dim=1), torch.cat([part.labels for part in parts])
        )


def load_train_task(config: FewShotConfig, whole: bool = False) -> FewShotTask:
    """Reads the data set of a run, which must have training images."""
    task = load_task(config.dataset, config.data_root, config.prompts, whole=whole)
    if not task.split['train']:
        raise ValueError(
            f'{task.name} has no training images; test a classifier of another data '
            f'set on it.'
        )
    return task


def open_cache(config: FewShotConfig, quiet: bool) -> FeatureCache:
    """Loads the encoder of a run, and opens its cache."""
    encoder = OpenCLIPEncoder.shared(
        config.model,
        config.pretrained,
        amp=config.amp,
        device=config.device,
        download=config.download,
    )
    return FeatureCache(
        config.cache_dir,
        encoder,
        preprocessing=config.preprocessing,
        crop_scale=tuple(config.crop_scale or CROPS),
        workers=config.workers,
        on_bad_image=config.on_bad_image,
        quiet=quiet,
    )


def collect_draws(task: FewShotTask, draws: Sequence[Draw]) -> dict[str, list[Item]]:
    """Returns the images of all draws, each once, and the test images."""
    parts = [sample_few_shot(task.split, shots, seed) for shots, seed in draws]
    found = {
        name: list(dict.fromkeys(item for part in parts for item in part[name]))
        for name in ('train', 'val')
    }
    return {**found, 'test': task.split['test']}


def encode_parts(
    task: FewShotTask,
    cache: FeatureCache,
    parts: Mapping[str, Sequence[Item]],
    views: int,
    plain: bool,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Encodes the images of a task, and refuses copies when all are encoded.

    Training images get augmented views, and with ``plain`` they are also encoded as
    they are, like the others. ``share`` is the number of this process and the number of
    processes. Returns the number of images that other processes have not encoded yet.

    Raises:
        ValueError: If an image cannot be read, is of two classes, or is a test image
            and also a training or validation image. The published splits of the public
            data sets are used as they are, with a warning.
    """
    todo = [(k, items, views if k == 'train' else 0) for k, items in parts.items()]
    if plain and views:
        todo.append(('train, plain', parts['train'], 0))
    todo = [(what, items, count) for what, items, count in todo if items]
    for what, items, count in todo:
        cache.encode(items, count, f'encoding {what}', share)
    if missing := sum(cache.count_missing(items, count) for _, items, count in todo):
        return missing
    pixels: dict[str, str] = {}
    for _, items, count in todo:
        pixels |= cache.pixels(items, count)
    is_public = task.name in PUBLIC_DATASETS
    if copies := find_copies(parts if is_public else task.split, pixels):
        if not is_public:
            raise ValueError(describe_copies(copies))
        logger.warning(
            '%d test images of the published split of %s are also training or '
            'validation images; they are used as published.',
            *(len(copies), task.name),
        )
    if not is_public and (problem := find_contradictions(task.split, pixels)):
        raise ValueError(problem)
    return 0


def _overlap(labels: Iterable[int], shots: int) -> float:
    """Returns the share of images that two draws have in common, mean over classes."""
    counts = Counter(labels).values()
    return mean(min(1.0, shots / count) for count in counts)


def _first_view(part: Features) -> Features:
    return replace(part, features=part.features[:1])


def _content(path: str) -> str:
    try:
        return sha256(path)
    except OSError:  # it is refused, or skipped, when it is read
        return ''


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

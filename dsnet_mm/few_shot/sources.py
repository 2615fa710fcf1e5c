"""Where a run has its features from: images and an encoder, or a file."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets import (
    PUBLIC_DATASETS,
    FewShotTask,
    Item,
    load_task,
    sample_few_shot,
)
from dsnet_mm.datasets.check import describe_copies, find_copies
from dsnet_mm.datasets.feature_file import FeatureFile, read_feature_file
from dsnet_mm.datasets.features import FeatureCache, Features, image_keys

from .config import FewShotConfig

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
        redrawn: Whether another seed draws other images.
    """

    train: Features
    plain: Features | None
    val: Features | None
    redrawn: bool = True


class Source(ABC):
    """Features of a data set. :meth:`prepare` sets the last five attributes.

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
        fingerprint: Hashes of the data, to compare with those of an interrupted run.
    """

    notes: list[str]
    encoder: OpenCLIPEncoder | None = None

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

    @abstractmethod
    def test(self) -> Features:
        """Returns the test images."""

    @abstractmethod
    def all_labelled(self) -> Features:
        """Returns the images of train, val and test together, with views."""


class ImageSource(Source):
    """Features of the images of a data set."""

    def __init__(self, config: FewShotConfig, quiet: bool = False) -> None:
        self.config, self.quiet, self.notes = config, quiet, []
        self.task = load_train_task(config)
        self.title = f'{self.task.name}, {Path(config.model).stem}'
        self.class_names, self.prompts = self.task.class_names, self.task.prompts
        self.has_text, rows = not config.model.startswith('timm:'), config.class_rows
        self.has_matrix = self.has_text or rows is not None
        if not self.has_text:
            self.prompts = ()
        elif rows is not None:
            raise ValueError(
                f'class_rows are for encoders timm:NAME, and {config.model} has text.'
            )
        self.shots, self.preprocessing = tuple(config.shots), config.preprocessing
        self.has_val = bool(self.task.split['val'])
        for shots in self.shots:  # raises before the encoder is loaded
            sample_few_shot(self.task.split, shots, config.seeds[0])

    def prepare(self) -> None:
        self.cache = open_cache(self.config, self.quiet)
        self.encoder = self.made_by = self.cache.encoder
        self.logit_scale = self.encoder.logit_scale
        rows, names = self.config.class_rows, self.class_names
        self.text_features = None
        if self.has_text:
            self.text_features = self.cache.texts(names, self.prompts)
        elif self.has_matrix:
            self.text_features = self.encoder.encode_classes(names, (), rows).cpu()
        # Paths and labels, and the files of a user's own data set.
        items = [[k, *item] for k, part in self.task.split.items() for item in part]
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
        encode_parts(self.task, self.cache, parts, self.config.views, plain)
        if self.config.on_bad_image == 'skip':
            for shots, seed in draws:  # raises before the fits
                self.draw(shots, seed, False)

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
        )

    def test(self) -> Features:
        return self.cache.images(self.task.split['test'])

    def all_labelled(self) -> Features:
        items = [item for part in self.task.split.values() for item in part]
        return self.cache.images(items, self.config.views)


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

    def _possible(self, here: list[int]) -> tuple[int, ...]:
        """Returns the numbers of shots that are wanted and possible."""
        wanted = self.config.shots or tuple(here) or (1, 2, 4, 8, 16)
        most = max(here, default=0)
        if self.pool is None:
            counts = self.file.train[None].labels.bincount(
                minlength=len(self.class_names)
            )
            most = max(most, int(counts.min()))
        possible = tuple(k for k in wanted if k <= most)
        if len(possible) < len(wanted):
            left_out = ', '.join(str(k) for k in wanted if k > most)
            message = (
                f'{self.config.features} has at most {most} training images of each '
                f'class, so there are no {left_out} shots.'
            )
            if not possible:
                raise ValueError(message)
            only = ', '.join(map(str, possible))
            self.notes.append(f'{message} Only {only} are run.')
        return possible

    def prepare(self) -> None:
        self.text_features = self.file.text_features
        self.logit_scale = self.file.logit_scale
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
            self.pool != shots,
        )

    def test(self) -> Features:
        return _first_view(self.file.test)

    def all_labelled(self) -> Features:
        parts = (self.file.train[self.pool], self.file.val, self.file.test)
        parts = [part for part in parts if part]
        views = torch.arange(max(len(part.features) for part in parts))
        features = [part.features[views % len(part.features)] for part in parts]
        return Features(
            torch.cat(features, dim=1), torch.cat([part.labels for part in parts])
        )


def load_train_task(config: FewShotConfig) -> FewShotTask:
    """Reads the data set of a run, which must have training images."""
    task = load_task(config.dataset, config.data_root, config.prompts)
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
        crop_scale=tuple(config.crop_scale),
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
        ValueError: If an image cannot be read, or a test image is also a training or
            validation image. The published splits of the public data sets are used as
            they are, with a warning.
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
    return 0


def _first_view(part: Features) -> Features:
    return replace(part, features=part.features[:1])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

"""Where a run has its features from: images and an encoder, or a file."""

import hashlib
import json
import logging
from collections.abc import Sequence
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


class ImageSource:
    """Features of the images of a data set.

    Args:
        config: Options of the run.

    Attributes:
        title: Names of data set and model.
        class_names: Names by label.
        prompts: Prompts of the text features.
        encoder: The encoder.
        made_by: The encoder, as :func:`save_classifier` takes it.
        preprocessing: One of ``PREPROCESSINGS``.
        shots: Numbers of shots of the run.
        notes: What is left out of the run, and why, in sentences.
        has_val: Whether there are validation images.
        fingerprint: Hashes of the data, to compare with those of an interrupted run.
        text_features: Text features (K, D).
        logit_scale: Scale of the cosine similarities.
    """

    def __init__(self, config: FewShotConfig, quiet: bool = False) -> None:
        self.config, self.quiet, self.notes = config, quiet, []
        self.task = load_task(config.dataset, config.data_root, config.prompts)
        if not self.task.split['train']:
            raise ValueError(
                f'{self.task.name} has no training images; test a classifier of '
                f'another data set on it.'
            )
        self.title = f'{self.task.name}, {Path(config.model).stem}'
        self.class_names, self.prompts = self.task.class_names, self.task.prompts
        self.shots, self.preprocessing = tuple(config.shots), config.preprocessing
        self.has_val = bool(self.task.split['val'])
        for shots in self.shots:  # raises before the encoder is loaded
            sample_few_shot(self.task.split, shots, config.seeds[0])

    def prepare(self) -> None:
        """Loads the encoder.

        Raises:
            ValueError: If the device or a model is unknown.
            FileNotFoundError: If the weights are missing.
        """
        config = self.config
        self.encoder = OpenCLIPEncoder.shared(
            config.model,
            config.pretrained,
            amp=config.amp,
            device=config.device,
            download=config.download,
        )
        self.cache = FeatureCache(
            config.cache_dir,
            self.encoder,
            preprocessing=config.preprocessing,
            crop_scale=tuple(config.crop_scale),
            workers=config.workers,
            on_bad_image=config.on_bad_image,
            quiet=self.quiet,
        )
        self.made_by = self.encoder
        self.logit_scale = self.encoder.logit_scale
        self.text_features = self.cache.texts(self.class_names, self.prompts)
        self.fingerprint = {
            'pictures': _hash_split(self.task),
            'class names': _hash(self.class_names),
            'weights': self.encoder.digest(),
            'model': _hash({**self.encoder.identity(), 'weights': None}),
        }

    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        """Encodes all images of a run, those of all draws together.

        Args:
            draws: The draws of the run.
            plain: Whether :attr:`Drawn.plain` is needed.

        Raises:
            ValueError: If an image cannot be read, or none of a class, or a test
                image is also a training or validation image.
        """
        train, val = collect_draws(self.task.split, draws)
        views, test = self.config.views, self.task.split['test']
        parts = {'train': train, 'val': val, 'test': test}
        encode_parts(self.cache, parts, views, plain=plain and views > 0)
        refuse_copies(self.task, self.cache, {'train': train, 'val': val}, views)
        if self.config.on_bad_image == 'skip':
            for shots, seed in draws:  # raises before the fits
                self.draw(shots, seed, False)

    def draw(self, shots: int, seed: int, plain: bool) -> Drawn:
        """Returns the images of a draw."""
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
        """Returns the test images."""
        return self.cache.images(self.task.split['test'])

    def all_labelled(self) -> Features:
        """Returns the images of train, val and test together, with views."""
        items = [item for part in self.task.split.values() for item in part]
        return self.cache.images(items, self.config.views)


class FeatureSource:
    """Features of a file, see :class:`FeatureFile`.

    Draws of k shots are CoOp's, from the part ``train`` or else from that with most
    shots. Seed 1 takes the part ``train_k`` as it is, if the file has it. If no part
    has more than k shots, all seeds have the same training images.

    Its methods and attributes are those of :class:`ImageSource`.
    """

    encoder = None

    def __init__(self, config: FewShotConfig) -> None:
        self.config, self.notes = config, []
        self.file: FeatureFile = read_feature_file(config.features)
        self.class_names = self.file.class_names
        about = self.file.about
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
        self.shots = self._shots()
        if config.selection == 'cv' and self._pool() not in self.file.plain:
            views = len(self.file.train[self._pool()].features)
            which = 'only view' if views == 1 else f'first of {views} views'
            self.notes.append(
                f'Selection by `cv` validates on the {which} of the training images, '
                f'because the file has no features of them as test images are.'
            )

    def prepare(self) -> None:
        """Hashes the file."""
        self.text_features = self.file.text_features
        self.logit_scale = self.file.logit_scale
        content = Path(self.config.features).read_bytes()
        self.fingerprint = {
            'features': hashlib.sha256(content).hexdigest(),
            'class names': _hash(self.class_names),
        }

    def encode(self, draws: Sequence[Draw], plain: bool) -> None:
        """Checks that no test image is also a training or validation image.

        Raises:
            ValueError: If rows are equal.
        """
        parts = [*self.file.train.values()]
        parts += [] if self.file.val is None else [self.file.val]
        seen = {
            row.numpy().tobytes()
            for part in parts
            for row in part.features.flatten(0, 1)
        }
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
        """Returns the images of a draw."""
        pool_shots = self._pool()
        pool, val = self.file.train[pool_shots], self.file.val
        split = {'train': _rows(pool, self.class_names), 'val': []}
        if val is not None:
            split['val'] = _rows(val, self.class_names)
        drawn = {
            part: torch.tensor([int(item[0]) for item in items], dtype=torch.long)
            for part, items in sample_few_shot(split, shots, seed).items()
        }
        if seed == 1 and shots in self.file.train:
            train, kept = self.file.train[shots], self.file.plain.get(shots)
        else:
            train, kept = pool.take(drawn['train']), self.file.plain.get(pool_shots)
            kept = kept and kept.take(drawn['train'])
        return Drawn(
            train,
            kept if plain else None,
            None if val is None else _first_view(val.take(drawn['val'])),
            pool_shots != shots,
        )

    def test(self) -> Features:
        """Returns the test images."""
        return _first_view(self.file.test)

    def all_labelled(self) -> Features:
        """Returns the images of train, val and test together."""
        largest = self.file.train[self._pool()]
        parts = [part for part in (largest, self.file.val, self.file.test) if part]
        views = max(len(part.features) for part in parts)
        return Features(
            torch.cat(
                [
                    part.features[torch.arange(views) % len(part.features)]
                    for part in parts
                ],
                dim=1,
            ),
            torch.cat([part.labels for part in parts]),
        )

    def _pool(self) -> int | None:
        """Returns the part of the file that draws are made from."""
        if None in self.file.train:
            return None
        return max(k for k in self.file.train if k is not None)

    def _shots(self) -> tuple[int, ...]:
        """Returns the numbers of shots that are wanted and possible."""
        here = sorted(k for k in self.file.train if k is not None)
        wanted = self.config.shots or tuple(here) or (1, 2, 4, 8, 16)
        most = here[-1] if here else 0
        if None in self.file.train:
            counts = self.file.train[None].labels.bincount(
                minlength=len(self.class_names)
            )
            most = max(most, int(counts.min()))
        possible = tuple(k for k in wanted if k <= most)
        if len(possible) < len(wanted):
            left_out = [str(k) for k in wanted if k > most]
            message = (
                f'{self.config.features} has at most {most} training images of each '
                f'class, so there are no {", ".join(left_out)} shots.'
            )
            if not possible:
                raise ValueError(message)
            self.notes.append(
                f'{message} Only {", ".join(map(str, possible))} are run.'
            )
        return possible


def collect_draws(
    split: dict[str, list[Item]], draws: Sequence[Draw]
) -> tuple[list[Item], list[Item]]:
    """Returns the training and the validation images of all draws, each once."""
    parts = [sample_few_shot(split, shots, seed) for shots, seed in draws]
    return tuple(
        list(dict.fromkeys(item for part in parts for item in part[name]))
        for name in ('train', 'val')
    )


def encode_parts(
    cache: FeatureCache,
    parts: dict[str, list[Item]],
    views: int,
    share: tuple[int, int] = (0, 1),
    plain: bool = False,
) -> None:
    """Encodes training images with augmented views, and others as they are.

    ``plain`` also encodes the training images as they are.
    """
    for name, items in parts.items():
        if items:
            cache.encode(
                items, views if name == 'train' else 0, f'encoding {name}', share
            )
    if plain:
        cache.encode(parts['train'], 0, 'encoding train, plain', share)


def refuse_copies(
    task: FewShotTask, cache: FeatureCache, used: dict[str, list[Item]], views: int
) -> None:
    """Refuses test images that are also training or validation images.

    The published splits of the public data sets are used as they are, with a warning.

    Args:
        task: The data set.
        cache: The cache, which has the pixels of the encoded images.
        used: Its training and validation images that are used.
        views: Views of the training images.

    Raises:
        ValueError: If there are such images.
    """
    public = task.name in PUBLIC_DATASETS
    split = {**used, 'test': task.split['test']} if public else task.split
    pixels = cache.pixels(used['train'], views) | cache.pixels(task.split['test'])
    if used['val']:
        pixels |= cache.pixels(used['val'])
    if copies := find_copies(split, pixels):
        if not public:
            raise ValueError(describe_copies(copies))
        logger.warning(
            '%d test images of the published split of %s are also training or '
            'validation images; they are used as published.',
            *(len(copies), task.name),
        )


def _rows(part: Features, class_names: Sequence[str]) -> list[Item]:
    """Returns an item for each row, as :func:`sample_few_shot` takes it."""
    return [
        (str(row), label, class_names[label])
        for row, label in enumerate(part.labels.tolist())
    ]


def _first_view(part: Features) -> Features:
    return replace(part, features=part.features[:1])


def _hash_split(task: FewShotTask) -> str:
    """Hashes paths and labels, and the files of a user's own data set.

    A file is known by what the feature cache knows it by: path, size and modification
    time.
    """
    items = [[part, *item] for part, items in task.split.items() for item in items]
    if task.name not in PUBLIC_DATASETS:
        items += image_keys([item[1:] for item in items])
    return _hash(items)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


Source = ImageSource | FeatureSource
"""Where a run has its features from."""

"""Training data of a few-shot method, and the registries of methods and classifiers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.clip import OpenCLIPEncoder
from dsnet_mm.datasets.features import Features

TEXT_LENGTH = 10.0
"""Length of text features where it is not known, about that of OpenAI's CLIP."""

CROPS = (0.08, 1.0)
"""Least and most area of the random crops of CoOp."""


@dataclass(frozen=True)
class FewShotData:
    """Training data of a method.

    Attributes:
        train: Features of the training images, with augmented views.
        shots: Training images of each class.
        text_features: Text features of the classes (K, D), rows of unit norm. None
            becomes the :func:`prototypes` of ``train``, for encoders without text.
        logit_scale: Scale of the cosine similarities.
        class_names: Names by label.
        encoder: The encoder, for methods that learn the input of its text tower.
        seed: Seed of the initialisation, the order of images and their views.
        plain: Features of the training images, prepared as test images are, without
            augmentation. None if they are not needed.
        unlabelled: Features of the test images (N, D), for transductive methods.
        text_length: Mean length of the text features before they were normalised.
            TaskRes, ZS-LP and CLAP start from text features of this length.
        has_text: Whether ``text_features`` do not depend on ``train``.
    """

    train: Features
    shots: int
    text_features: Tensor | None
    logit_scale: float
    class_names: tuple[str, ...]
    encoder: OpenCLIPEncoder | None = None
    seed: int = 0
    plain: Features | None = None
    unlabelled: Tensor | None = None
    text_length: float = TEXT_LENGTH
    has_text: bool = True

    def __post_init__(self) -> None:
        if self.text_features is None:
            found = prototypes(self.train, len(self.class_names))
            object.__setattr__(self, 'text_features', found)
            object.__setattr__(self, 'has_text', False)

    def subset(self, index: Tensor, shots: int) -> 'FewShotData':
        """Returns the data with a part of the training images."""
        plain = None if self.plain is None else self.plain.take(index)
        text = self.text_features if self.has_text else None
        train = self.train.take(index)
        return replace(self, train=train, plain=plain, shots=shots, text_features=text)


CLASSIFIERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {}
"""Classes of classifiers by name, each with the tensors that its constructor takes."""

METHODS: dict[str, 'Method'] = {}
"""All methods by name."""


def register_classifier(*tensors: str) -> Callable[[type], type]:
    """Registers a class of classifiers, which can then be saved and loaded.

    A classifier takes image features (N, D) and returns logits (N, K). Its constructor
    takes the named tensors of its state dict, the first with D columns, and then the
    items of its attribute ``options`` as keyword arguments, if it has one.
    """

    def register(cls: type) -> type:
        CLASSIFIERS[cls.__name__] = cls, tensors
        return cls

    return register


def register_method(
    name: str, returns: type[nn.Module], title: str, **about: object
) -> Callable[[Callable], Callable]:
    """Registers a function as a method, by attributes of :class:`Method`."""

    def register(function: Callable) -> Callable:
        METHODS[name] = Method(title, function, returns, **about)
        return function

    return register


@dataclass(frozen=True)
class Method:
    """A few-shot method.

    Attributes:
        title: Name in tables.
        function: Function of :class:`FewShotData` and of all hyper-parameters as
            keyword arguments. It returns the classifier.
        returns: Class of that classifier, registered by :func:`register_classifier`.
        defaults: All hyper-parameters, with their values if nothing is selected.
        grid: Values to select from. Each combination is tried.
        after_fit: Those of ``grid`` that are attributes of a fitted classifier, so
            that nothing is fitted again for them.
        source: Where the defaults come from.
        needs_encoder: Whether ``function`` uses ``FewShotData.encoder``.
        transductive: Whether ``function`` uses ``FewShotData.unlabelled``. Such a
            classifier is fitted after the test split is opened, and its title says so.
        crop_scale: Least and most area of the random crops of its training images.

    Raises:
        ValueError: If the class of the classifier is not registered, or ``grid`` has
            what is not a hyper-parameter.
    """

    title: str
    function: Callable[..., nn.Module]
    returns: type[nn.Module]
    defaults: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    after_fit: tuple[str, ...] = ()
    source: str = ''
    needs_encoder: bool = False
    transductive: bool = False
    crop_scale: tuple[float, float] = CROPS

    def __post_init__(self) -> None:
        if self.returns.__name__ not in CLASSIFIERS:
            raise ValueError(
                f'{self.title} returns a {self.returns.__name__}, which cannot be '
                f'saved; decorate the class with register_classifier.'
            )
        self.check((*self.grid, *self.after_fit))

    def check(self, options: Sequence[str] | Mapping[str, object]) -> None:
        """Raises a ValueError for hyper-parameters that the method does not have."""
        if unknown := sorted(set(options) - set(self.defaults)):
            raise ValueError(
                f'{self.title} has no option {", ".join(map(repr, unknown))}; it has '
                f'{", ".join(sorted(self.defaults)) or "none"}.'
            )

    def fit(self, data: FewShotData, **options: object) -> nn.Module:
        """Fits a classifier. Hyper-parameters that are not given are the defaults.

        Raises:
            ValueError: If there is no such hyper-parameter, or a value is wrong.
        """
        self.check(options)
        return self.function(data, **{**self.defaults, **options})


def describe_crops(methods: Sequence[str]) -> str:
    """Says which random crops of the training images methods have."""
    titles: dict[tuple[float, float], list[str]] = {}
    for method in (METHODS[name] for name in methods if name != 'zero_shot'):
        titles.setdefault(method.crop_scale, []).append(method.title)
    return '; '.join(
        f'{a:g} to {b:g} for {", ".join(x)}' for (a, b), x in titles.items()
    )


def num_learnt(model: nn.Module) -> int:
    """Returns the number of parameters that a fit has learnt."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return getattr(model, 'num_learnt', count)


def mean_features(train: Features) -> Tensor:
    """Normalises features, averages them over views, and normalises again, (N, D)."""
    return F.normalize(F.normalize(train.features, dim=-1).mean(0), dim=-1)


def prototypes(train: Features, classes: int) -> Tensor:
    """Returns the normalised mean of the features of each class (K, D).

    Source: Snell et al., NeurIPS 2017 (arXiv:1703.05175), equation 1, on features of
    unit norm.
    """
    features = mean_features(train)
    total = features.new_zeros(classes, features.shape[1])
    return F.normalize(total.index_add(0, train.labels, features), dim=-1)

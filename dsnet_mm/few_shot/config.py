"""Options of a few-shot run."""

import math
from dataclasses import dataclass, field

from dsnet_mm.environment import existing_device

from .methods import METHODS
from .methods.clip_adapter import COPIES
from .selection import SELECTIONS


@dataclass(frozen=True)
class FewShotConfig:
    """Options of a run.

    A run needs either ``dataset`` and ``model``, or ``features``.

    Attributes:
        dataset: Name, folder or CSV file, see :func:`dsnet_mm.datasets.load_task`.
        model: Model of open_clip, see :class:`OpenCLIPEncoder`, or ``timm:NAME``, see
            :class:`TimmEncoder`.
        pretrained: Weights of the model.
        download: Whether weights that are not on this machine may be fetched.
        features: File of features, see :class:`FeatureFile`. The options of images
            and encoder then have no effect, and methods that need the encoder are left
            out.
        data_root: Folder of the public data sets.
        prompts: See :func:`dsnet_mm.clip.prompts.resolve_prompts`. None takes those of
            the data set.
        class_rows: For encoders without text. None takes prototypes of the training
            images as class matrix. A dict takes rows of the encoder's own classifier:
            for a class name a list of classes of ImageNet. Without an entry the class
            name is that of ImageNet; ``{}`` takes all names so.
        methods: Names of ``METHODS``. Zero-shot is always added, or prototypes if the
            class matrix is made of them.
        oracle: Methods that are also selected on the test split. They are labelled so.
        shots: Training images of each class, one or more values. None takes 1, 2, 4,
            8 and 16, or those that ``features`` has. Those that a class has too few
            images for are left out, with a note.
        seeds: Seeds of the draws, and of initialisation and order of the methods. Three
            or more give a confidence interval.
        selection: One of ``SELECTIONS``. None takes ``'val'``, or ``'fixed'`` if there
            are no validation images.
        base_to_new: Whether methods are fitted to the first half of the classes, and
            also tested on the others. Methods that learn class by class are left out.
        overrides: Hyper-parameters by method that are set instead of selected.
        preprocessing: One of ``PREPROCESSINGS``.
        views: Augmented views of a training image. 0 takes the image itself.
        crop_scale: Least and most area of the random crops of augmented views, for all
            methods. None takes those of each method, ``Method.crop_scale``.
        text_length: See :class:`FewShotData`. None takes what the encoder has or the
            file says, or else 10.
        amp: See :class:`OpenCLIPEncoder`.
        device: Device of the encoder. ``'auto'`` takes a GPU if there is one.
        on_bad_image: See :class:`FeatureCache`.
        cache_dir: Folder of the features.
        workers: Number of worker processes that load images.

    Raises:
        ValueError: If a value is wrong, unknown or missing, or the device does not
            exist.
    """

    dataset: str | None = None
    model: str | None = None
    pretrained: str | None = None
    download: bool = False
    features: str | None = None
    data_root: str = 'data'
    prompts: str | list[str] | None = None
    class_rows: dict[str, list[str]] | None = None
    methods: tuple[str, ...] = (
        *('linear_probe', 'linear_probe_zs', 'clap', 'lp++', 'gda'),
        *('tip_adapter', 'tip_adapter_f', 'task_res', 'clip_adapter'),
    )
    oracle: tuple[str, ...] = ()
    shots: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    selection: str | None = None
    base_to_new: bool = False
    overrides: dict[str, dict] = field(default_factory=dict)
    preprocessing: str = 'clip'
    views: int = 10
    crop_scale: tuple[float, float] | None = None
    text_length: float | None = None
    amp: str | None = None
    device: str = 'auto'
    on_bad_image: str = 'error'
    cache_dir: str = 'work_dirs/few_shot_features'
    workers: int = 0

    def __post_init__(self) -> None:
        if self.features is not None and self.dataset is not None:
            raise ValueError(
                'name either a dataset or a file of features, not both: the file has '
                'its own images.'
            )
        missing = [key for key in ('dataset', 'model') if getattr(self, key) is None]
        if self.features is None and missing:
            raise ValueError(
                f'name the {" and the ".join(missing)}, or a file of features.'
            )
        if self.features is None and self.shots is None:
            object.__setattr__(self, 'shots', (1, 2, 4, 8, 16))
        self._check_numbers()
        self._check_methods()
        if self.selection not in (None, *SELECTIONS):
            raise ValueError(
                f'selection must be one of {SELECTIONS}, got {self.selection!r}; to '
                f'select on the test split, name methods in oracle.'
            )
        object.__setattr__(self, 'device', existing_device(self.device))

    def _check_numbers(self) -> None:
        """Checks numbers and lists. A single value becomes a tuple of one."""
        for what, kind, called in (
            ('methods', str, 'names'),
            ('oracle', str, 'names'),
            ('shots', int, 'integers'),
            ('seeds', int, 'integers'),
        ):
            values = getattr(self, what)
            if values is None:
                continue
            values = [values] if isinstance(values, str | int) else values
            if not all(isinstance(value, kind) for value in values):
                raise ValueError(f'{what} must be {called}, got {values!r}.')
            object.__setattr__(self, what, tuple(dict.fromkeys(values)))
        if self.shots == () or not self.seeds:
            raise ValueError('shots and seeds must each have at least one value.')
        if self.shots is not None and min(self.shots) < 1:
            raise ValueError(f'shots must be at least 1, got {min(self.shots)}.')
        for what in ('views', 'workers'):
            value = getattr(self, what)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f'{what} must be an integer from 0 on, got {value!r}.')
        scale = self.crop_scale
        is_pair = isinstance(scale, list | tuple) and len(scale) == 2
        if scale is not None and (not is_pair or not 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(
                f'crop_scale must be the least and the most area of a crop, from 0 to '
                f'1, got {scale!r}.'
            )
        length = self.text_length
        is_number = isinstance(length, int | float) and 0 < length < math.inf
        if length is not None and not is_number:
            raise ValueError(f'text_length must be a number above 0, got {length!r}.')

    def _check_methods(self) -> None:
        """Checks the names of methods and their options."""
        found = self.overrides
        if not isinstance(found, dict) or not all(
            isinstance(options, dict) for options in found.values()
        ):
            raise ValueError(
                f'overrides must have a dict for each method, got {found}.'
            )
        for name in (*self.methods, *self.oracle, *found):
            if name in COPIES:
                raise ValueError(
                    f'{name} is now clip_adapter_released with the overrides '
                    f'{COPIES[name]}.'
                )
            if name not in METHODS:
                raise ValueError(
                    f'unknown method {name!r}; choose from {", ".join(METHODS)}.'
                )
        for name, options in found.items():
            if name in ('linear_probe_zs', 'clap') and 'length' in options:
                raise ValueError(
                    f'length of {name} is now the option text_length of the run.'
                )
            METHODS[name].check(options)
            for key, value in options.items():
                is_name = isinstance(METHODS[name].defaults[key], str)
                if isinstance(value, str) and not is_name:
                    raise ValueError(
                        f'{key} of {name} must be a number, got {value!r}.'
                    )

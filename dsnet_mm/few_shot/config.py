"""Options of a few-shot run."""

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
        model: Model of open_clip, see :class:`OpenCLIPEncoder`.
        pretrained: Weights of the model.
        download: Whether weights that are not on this machine may be fetched.
        features: File of features, see :class:`FeatureFile`. The options of images
            and encoder then have no effect, and methods that need the encoder are left
            out.
        data_root: Folder of the public data sets.
        prompts: See :func:`dsnet_mm.clip.prompts.resolve_prompts`. None takes those of
            the data set.
        methods: Names of ``METHODS``. Zero-shot is always added.
        oracle: Methods that are also selected on the test split. They are labelled so.
        shots: Training images of each class, one or more values. None takes 1, 2, 4,
            8 and 16, or those that ``features`` has.
        seeds: Seeds of the draws, and of initialisation and order of the methods. Three
            or more give a confidence interval.
        selection: One of ``SELECTIONS``. None takes ``'val'``, or ``'fixed'`` if there
            are no validation images.
        overrides: Hyper-parameters by method that are set instead of selected.
        preprocessing: One of ``PREPROCESSINGS``.
        views: Augmented views of a training image. 0 takes the image itself.
        crop_scale: See :class:`FeatureCache`.
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
    methods: tuple[str, ...] = (
        'linear_probe',
        'linear_probe_zs',
        'clap',
        'lp++',
        'gda',
        'tip_adapter',
        'tip_adapter_f',
        'task_res',
        'clip_adapter',
    )
    oracle: tuple[str, ...] = ()
    shots: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    selection: str | None = None
    overrides: dict[str, dict] = field(default_factory=dict)
    preprocessing: str = 'clip'
    views: int = 10
    crop_scale: tuple[float, float] = (0.08, 1.0)
    amp: str | None = None
    device: str = 'auto'
    on_bad_image: str = 'error'
    cache_dir: str = 'work_dirs/few_shot_features'
    workers: int = 0

    def __post_init__(self) -> None:
        if self.features is None:
            missing = [k for k in ('dataset', 'model') if getattr(self, k) is None]
            if missing:
                raise ValueError(
                    f'name the {" and the ".join(missing)}, or a file of features.'
                )
            if self.shots is None:
                object.__setattr__(self, 'shots', (1, 2, 4, 8, 16))
        elif self.dataset is not None:
            raise ValueError(
                'name either a dataset or a file of features, not both: the file has '
                'its own images.'
            )
        self._check_types()
        for name in (*self.methods, *self.oracle, *self.overrides):
            if name in COPIES:
                raise ValueError(
                    f'{name} is called clip_adapter_released now, with overrides='
                    f'{{"clip_adapter_released": {COPIES[name]}}}.'
                )
            if name not in METHODS:
                raise ValueError(
                    f'unknown method {name!r}; choose from {", ".join(METHODS)}.'
                )
        for name, options in self.overrides.items():
            METHODS[name].check(options)
            for key, value in options.items():
                default = METHODS[name].defaults[key]
                if isinstance(value, str) and not isinstance(default, str):
                    raise ValueError(f'{key} of {name} must be a number, got {value!r}.')
        if self.selection is not None and self.selection not in SELECTIONS:
            raise ValueError(
                f'selection must be one of {SELECTIONS}, got {self.selection!r}; to '
                f'select on the test split, name methods in oracle.'
            )
        object.__setattr__(self, 'device', existing_device(self.device))

    def _check_types(self) -> None:
        """Checks numbers and lists. A single value becomes a tuple of one."""
        for what, kind in (
            ('methods', str),
            ('oracle', str),
            ('shots', int),
            ('seeds', int),
        ):
            values = getattr(self, what)
            if values is None:
                continue
            values = [values] if isinstance(values, str | int) else values
            if not all(isinstance(value, kind) for value in values):
                raise ValueError(
                    f'{what} must be {"names" if kind is str else "integers"}, got '
                    f'{values!r}.'
                )
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
        if (
            not isinstance(scale, list | tuple)
            or len(scale) != 2
            or not (0 < scale[0] <= scale[1] <= 1)
        ):
            raise ValueError(
                f'crop_scale must be the least and the most area of a crop, from 0 to '
                f'1, got {scale!r}.'
            )
        if not isinstance(self.overrides, dict) or not all(
            isinstance(options, dict) for options in self.overrides.values()
        ):
            raise ValueError(
                f'overrides must have a dict for each method, got {self.overrides!r}.'
            )

"""Options of a few-shot run."""

from dataclasses import dataclass, field

from .methods import METHODS
from .selection import SELECTIONS


@dataclass(frozen=True)
class FewShotConfig:
    """Options of a run.

    Attributes:
        dataset: Name, folder or CSV file, see :func:`dsnet_mm.tasks.load_task`.
        model: Model of open_clip, see :class:`OpenCLIPEncoder`.
        pretrained: Weights of the model.
        data_root: Folder of the public data sets.
        prompts: See :func:`dsnet_mm.tasks.resolve_prompts`. None takes those of the
            data set.
        methods: Names of ``METHODS``. Zero-shot is always added.
        oracle: Methods that are also selected on the test split, labelled as such.
        shots: Training pictures of each class, one or more values.
        seeds: Seeds of the draws. Three or more give a confidence interval.
        selection: One of ``SELECTIONS``.
        overrides: Hyper-parameters by method that are set instead of selected.
        preprocessing: One of ``PREPROCESSINGS``.
        views: Augmented views of a training picture. 0 takes the picture itself.
        crop_scale: See :class:`FeatureCache`.
        amp: See :class:`OpenCLIPEncoder`.
        device: Device of the encoder.
        on_bad_image: See :class:`FeatureCache`.
        cache_dir: Folder of the features.
        workers: Number of worker processes that load pictures.

    Raises:
        ValueError: If a value is unknown.
    """

    dataset: str
    model: str
    pretrained: str | None
    data_root: str = 'data'
    prompts: str | list[str] | None = None
    methods: tuple[str, ...] = (
        'linear_probe',
        'tip_adapter',
        'tip_adapter_f',
        'task_res',
        'clip_adapter',
    )
    oracle: tuple[str, ...] = ()
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    selection: str = 'val'
    overrides: dict[str, dict] = field(default_factory=dict)
    preprocessing: str = 'clip'
    views: int = 10
    crop_scale: tuple[float, float] = (0.08, 1.0)
    amp: str | None = None
    device: str = 'cpu'
    on_bad_image: str = 'error'
    cache_dir: str = 'work_dirs/few_shot_features'
    workers: int = 0

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.oracle, *self.overrides):
            if name not in METHODS:
                raise ValueError(
                    f'there is no method {name!r}; there are {", ".join(METHODS)}.'
                )
        if self.selection not in SELECTIONS:
            raise ValueError(
                f'selection must be one of {SELECTIONS}, got {self.selection!r}; to '
                f'see what selecting on the test split gives, name methods in oracle.'
            )
        if not self.shots or not self.seeds:
            raise ValueError('shots and seeds must name at least one each.')

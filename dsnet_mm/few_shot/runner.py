"""Methods x shots x seeds on one data set, resumable, test split opened last."""

import json
import logging
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dsnet_mm import __version__
from dsnet_mm.datasets.few_shot import FewShotTask, load_task, sample_few_shot
from dsnet_mm.files import write_atomic
from dsnet_mm.models.backbones import OpenCLIPEncoder

from .classifiers import load_classifier, save_classifier
from .features import FeatureCache, Features
from .methods import METHODS, FewShotData, num_learnt
from .protocol import SELECTIONS, Score, evaluate, select

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShotConfig:
    """What a run does.

    Attributes:
        dataset: Name, folder or CSV file, see :func:`load_task`.
        model: Model of open_clip, see :class:`OpenCLIPEncoder`.
        pretrained: Its weights.
        data_root: Folder of the public data sets.
        prompts: See :func:`resolve_prompts`; None takes those of the data set.
        methods: Names of ``METHODS``. Zero-shot is always added.
        oracle: Methods that are also selected on the test split, labelled as such.
        shots: Shots to run.
        seeds: Seeds to run; three or more give a confidence interval.
        selection: One of ``SELECTIONS``.
        overrides: Hyper-parameters by method that are set, not searched.
        preprocessing: One of ``PREPROCESSINGS``.
        views: Augmented views of a training picture; 0 takes the picture itself.
        crop_scale: See :class:`FeatureCache`.
        amp: See :class:`OpenCLIPEncoder`.
        device: Device of the encoder.
        on_bad_image: See :class:`FeatureCache`.
        cache_dir: Folder of the features.
        workers: Processes that load pictures.

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


@dataclass(frozen=True)
class _Job:
    """One classifier to fit and test."""

    method: str
    shots: int
    seed: int
    oracle: bool = False

    @property
    def name(self) -> str:
        if self.method == 'zero_shot':
            return self.method
        kind = '_oracle' if self.oracle else ''
        return f'{self.method}{kind}_{self.shots}shot_seed{self.seed}'


def run(config: FewShotConfig, work_dir: str | Path, quiet: bool = False) -> list[dict]:
    """Fit and test all methods, and write a file for each.

    First everything is fitted and selected, without the test split; then the test
    split is opened, once, and everything is tested. ``run.log`` in ``work_dir`` has
    both in order. Called again with the same configuration it goes on where it was
    stopped.

    Args:
        config: What to do.
        work_dir: Folder of the results: ``run.json``, ``run.log``, ``runs/*.json``
            and ``classifiers/*.safetensors``.
        quiet: Whether to leave out the progress bar.

    Returns:
        The content of ``runs/*.json``.

    Raises:
        FileExistsError: If the folder holds another run, or something else.
        ValueError: If the data set has too few pictures, or a picture is unreadable.
        FileNotFoundError: If a file is missing.
    """
    work_dir = Path(work_dir)
    task = load_task(config.dataset, config.data_root, config.prompts)
    jobs = [_Job('zero_shot', 0, 0)] + [
        _Job(method, shots, seed, oracle)
        for shots in config.shots
        for seed in config.seeds
        for oracle, methods in ((False, config.methods), (True, config.oracle))
        for method in methods
        if method != 'zero_shot'
    ]
    if not task.split['train']:
        raise ValueError(
            f'{task.name} has no training pictures; test a classifier of another data '
            f'set on it.'
        )
    for shots in config.shots:
        sample_few_shot(task.split, shots, config.seeds[0])  # fails early
    _claim_folder(work_dir, config, task)
    encoder = OpenCLIPEncoder(config.model, config.pretrained, amp=config.amp)
    encoder.to(config.device)
    with _log_to(work_dir / 'run.log'), _progress(3 * len(jobs), quiet) as step:
        runner = _Runner(config, work_dir, task, encoder, step)
        for job in jobs:
            if not job.oracle:
                runner.fit(job)
        return runner.test(jobs)


class _Runner:
    def __init__(
        self,
        config: FewShotConfig,
        work_dir: Path,
        task: FewShotTask,
        encoder: OpenCLIPEncoder,
        step: Callable[[int, str], None],
    ) -> None:
        self.config, self.work_dir, self.task = config, work_dir, task
        self.encoder, self.step = encoder, step
        self.cache = FeatureCache(
            config.cache_dir,
            encoder,
            preprocessing=config.preprocessing,
            crop_scale=tuple(config.crop_scale),
            workers=config.workers,
            on_bad_image=config.on_bad_image,
        )
        self.text_features = self.cache.texts(task.class_names, task.prompts)
        self._draw: tuple[tuple[int, int], FewShotData, Features | None] | None = None

    def draw(self, job: _Job) -> tuple[FewShotData, Features | None]:
        """Training data and validation features of a job."""
        key = job.shots, job.seed
        if self._draw is None or self._draw[0] != key:
            if job.shots:
                items = sample_few_shot(self.task.split, *key)
                train = self.cache.images(items['train'], self.config.views)
                val = self.cache.images(items['val']) if items['val'] else None
            else:
                width = self.text_features.shape[1]
                train = Features(torch.empty(1, 0, width), torch.empty(0).long())
                val = None
            data = FewShotData(
                train,
                job.shots,
                self.text_features,
                self.encoder.logit_scale,
                self.task.class_names,
                self.encoder,
            )
            self._draw = key, data, val
        return self._draw[1:]

    def fit(self, job: _Job, test: Features | None = None) -> None:
        """Fit and select one classifier; ``test`` is for oracles only."""
        path = self.work_dir / 'runs' / f'{job.name}.json'
        if path.is_file():
            self.step(2, job.name)
            return
        self.step(0, job.name)
        data, val = self.draw(job)
        fit = select(
            METHODS[job.method],
            data,
            test if job.oracle else val,
            'oracle' if job.oracle else self.config.selection,
            self.config.overrides.get(job.method),
        )
        save_classifier(
            self.work_dir / 'classifiers' / f'{job.name}.safetensors',
            fit.classifier,
            self.encoder,
            self.task.class_names,
            self.config.preprocessing,
        )
        record = {
            'method': job.method,
            'shots': job.shots,
            'seed': job.seed,
            'selection': fit.selection,
            'options': fit.options,
            'val_accuracy': fit.val_accuracy,
            'tried': fit.tried,
            'fit_seconds': fit.fit_seconds,
            'select_seconds': fit.select_seconds,
            'parameters': num_learnt(fit.classifier),
            'test': None,
        }
        write_atomic(path, json.dumps(record, indent=2))
        logger.info(
            'fitted %s, selection %s, %d tried', job.name, fit.selection, fit.tried
        )
        self.step(2, job.name)

    def test(self, jobs: list[_Job]) -> list[dict]:
        """Open the test split and test all classifiers that are not tested yet."""
        paths = {job: self.work_dir / 'runs' / f'{job.name}.json' for job in jobs}
        done = [
            path.is_file() and _read(path)['test'] is not None
            for path in paths.values()
        ]
        if not all(done):
            items = self.task.split['test']
            logger.info(
                'test split opened: %d pictures; %d classifiers are fixed',
                len(items),
                sum(path.is_file() for path in paths.values()),
            )
            test = self.cache.images(items)
        records = []
        for (job, path), tested in zip(paths.items(), done, strict=True):
            if job.oracle and not tested:
                self.fit(job, test)
            record = _read(path)
            if not tested:
                classifier = load_classifier(
                    self.work_dir / 'classifiers' / f'{job.name}.safetensors',
                    self.encoder,
                ).classifier
                record['test'] = {
                    **asdict(evaluate(classifier, test)),
                    'pictures': len(test),
                }
                write_atomic(path, json.dumps(record, indent=2))
                logger.info('tested %s', job.name)
            records.append(record)
            self.step(3 if job.oracle and tested else 1, job.name)
        return records


def transfer(
    classifier_file: str | Path,
    dataset: str | Path,
    data_root: str | Path = 'data',
    cache_dir: str | Path = 'work_dirs/few_shot_features',
    encoder: OpenCLIPEncoder | None = None,
) -> Score:
    """Test a classifier on the test split of another data set.

    For ImageNet's shifted sets, say, or any data set whose classes are among those of
    the classifier: the others are left out.

    Args:
        classifier_file: File of ``save_classifier``.
        dataset: See :func:`load_task`.
        data_root: Folder of the public data sets.
        cache_dir: Folder of the features.
        encoder: See :func:`load_classifier`.

    Returns:
        The score.

    Raises:
        ValueError: If the classifier does not know a class.
        FileNotFoundError: If a file is missing.
    """
    deployed = load_classifier(classifier_file, encoder)
    task = load_task(dataset, data_root)
    unknown = sorted(set(task.class_names) - set(deployed.class_names))
    if unknown:
        raise ValueError(
            f'the classifier does not know {len(unknown)} of the classes of '
            f'{task.name}, such as {unknown[0]!r}.'
        )
    if task.class_names == deployed.class_names:
        columns = list(range(len(task.class_names)))
    else:
        columns = [deployed.class_names.index(name) for name in task.class_names]
    cache = FeatureCache(
        cache_dir, deployed.encoder, preprocessing=deployed.preprocessing
    )
    return evaluate(
        lambda f: deployed.classifier(f)[:, columns], cache.images(task.split['test'])
    )


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'))


def _claim_folder(work_dir: Path, config: FewShotConfig, task: FewShotTask) -> None:
    """Takes an empty folder, or one with the same run."""
    wanted = json.loads(json.dumps(asdict(config)))
    about = work_dir / 'run.json'
    if about.is_file():
        found = _read(about)['config']
        other = sorted(
            k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)
        )
        if other:
            raise FileExistsError(
                f'{work_dir} holds another run, with other {", ".join(other)}; choose '
                f'another folder.'
            )
        return
    if work_dir.exists() and any(work_dir.iterdir()):
        raise FileExistsError(
            f'{work_dir} is not empty and holds no few-shot run; choose another folder.'
        )
    description = {
        'config': wanted,
        'class_names': list(task.class_names),
        'prompts': list(task.prompts),
        'versions': {
            'dsnet_mm': __version__,
            'commit': _commit(),
            'torch': torch.__version__,
            'python': platform.python_version(),
        },
    }
    write_atomic(about, json.dumps(description, indent=2))


def _commit() -> str | None:
    """Commit of this source tree, None outside of one."""
    try:
        done = subprocess.run(
            ['git', 'rev-parse', 'HEAD'],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding='utf-8')
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    console = RichHandler(logging.WARNING, show_path=False)
    package = logging.getLogger('dsnet_mm.few_shot')
    level, package.propagate = package.level, False
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    package.addHandler(console)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.removeHandler(console)
        package.propagate = True
        package.setLevel(level)
        handler.close()


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int, str], None]]:
    with Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=quiet,
    ) as progress:
        bar = progress.add_task('reading', total=total)
        yield lambda steps, what: progress.update(bar, advance=steps, description=what)

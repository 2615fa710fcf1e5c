"""A run: methods x shots x seeds on one data set, test split opened last."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

from dsnet_mm.datasets import sample_few_shot
from dsnet_mm.datasets.features import FeatureCache, Features
from dsnet_mm.files import write_atomic
from dsnet_mm.models.backbones import OpenCLIPEncoder
from dsnet_mm.tasks import FewShotTask, load_task

from .config import FewShotConfig
from .deployment import load_classifier, save_classifier
from .evaluation import evaluate
from .methods import METHODS, FewShotData, num_learnt
from .selection import select
from .work_dir import claim_work_dir, read_json

logger = logging.getLogger(__name__)


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

    First all classifiers are selected and fitted, without the test split. Then the
    test split is opened, once, and all classifiers are tested. ``run.log`` in
    ``work_dir`` records the order. A stopped run is continued by a call with the same
    configuration.

    Args:
        config: Options of the run.
        work_dir: Folder of the results: ``run.json``, ``run.log``, ``runs/*.json``
            and ``classifiers/*.safetensors``.
        quiet: Whether to hide the progress bar.

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
    claim_work_dir(work_dir, config, task)
    encoder = OpenCLIPEncoder.shared(
        config.model, config.pretrained, amp=config.amp, device=config.device
    )
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
        """Return training data and validation features of a job."""
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
        """Select and fit one classifier. ``test`` is for oracles only."""
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
        """Open the test split and test the classifiers that are not tested yet."""
        paths = {job: self.work_dir / 'runs' / f'{job.name}.json' for job in jobs}
        done = [
            path.is_file() and read_json(path)['test'] is not None
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
            record = read_json(path)
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


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding='utf-8')
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    console = RichHandler(logging.WARNING, show_path=False)
    package = logging.getLogger('dsnet_mm')
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

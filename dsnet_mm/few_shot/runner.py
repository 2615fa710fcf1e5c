"""A run of all methods, shots and seeds on one data set."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.logging import RichHandler
from tqdm import tqdm

from dsnet_mm.datasets.features import Features
from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

from .choice import choose
from .config import FewShotConfig
from .deployment import read_classifier, save_classifier
from .evaluation import evaluate
from .methods import METHODS, FewShotData
from .methods.base import num_learnt
from .selection import Fit, select
from .sources import Drawn, FeatureSource, ImageSource, Source
from .work_dir import claim_work_dir, describe_software, read_json

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


def run(
    config: FewShotConfig,
    work_dir: str | Path,
    quiet: bool = False,
    final: bool = False,
) -> list[dict]:
    """Fits and tests all methods, and writes a file for each classifier.

    First all images are encoded. Then all classifiers are selected and fitted without
    the test split. Then the test split is opened once, and all classifiers are tested.
    ``run.log`` in ``work_dir`` records the order. A call with the same configuration
    continues an interrupted run. A call with other methods, shots or seeds adds them to
    the run.

    Args:
        config: Options of the run.
        work_dir: Folder of the results: ``run.json``, ``run.log``, ``runs/*.json``
            and ``classifiers/*.safetensors``.
        quiet: Whether to hide the progress bars.
        final: Whether to fit the chosen method (see :func:`.choice.choose`) to all
            images, those of the test split too, and write
            ``classifiers/final.safetensors``. No accuracy is known of that classifier.

    Returns:
        The content of ``runs/*.json``, zero-shot CLIP first.

    Raises:
        FileExistsError: If the folder contains a run with other options or data, or
            other files.
        ValueError: If the data set has too few images, an image is unreadable, or a
            test image is also a training or validation image.
        FileNotFoundError: If a file is missing.
    """
    work_dir = Path(work_dir)
    config, source = _resolve(config, quiet)
    source.prepare()
    config = claim_work_dir(work_dir, config, source)
    jobs = [_Job('zero_shot', 0, 0)] + [
        _Job(method, shots, seed, oracle)
        for shots in config.shots
        for seed in config.seeds
        for oracle, methods in ((False, config.methods), (True, config.oracle))
        for method in methods
        if method != 'zero_shot'
    ]
    draws = [(shots, seed) for shots in config.shots for seed in config.seeds]
    with _log_to(work_dir / 'run.log'):
        for note in source.notes:
            logger.warning(note)
        plain = config.selection == 'cv'
        source.encode(draws, plain)
        with progress_bar(len(jobs), 'fitting', 'classifiers', quiet) as bar:
            runner = _Runner(config, work_dir, source, bar)
            for job in jobs:
                if not job.oracle:
                    runner.fit(job)
            records = runner.test(jobs)
        if final:
            runner.fit_final(records)
    return records


def _resolve(config: FewShotConfig, quiet: bool) -> tuple[FewShotConfig, Source]:
    """Opens the data, and replaces options that depend on it."""
    if config.features is None:
        source: Source = ImageSource(config, quiet)
    else:
        source = FeatureSource(config)
    if config.selection is None:
        config = replace(config, selection='val' if source.has_val else 'fixed')
    elif config.selection == 'val' and not source.has_val:
        raise ValueError(
            f'{config.features or config.dataset} has no validation images; use '
            f'selection cv or fixed.'
        )
    left_out = [
        name
        for name in (*config.methods, *config.oracle)
        if METHODS[name].needs_encoder and config.features is not None
    ]
    if left_out:
        source.notes.append(
            f'Left out, because they need the encoder: {", ".join(left_out)}.'
        )
    return (
        replace(
            config,
            shots=source.shots,
            methods=tuple(m for m in config.methods if m not in left_out),
            oracle=tuple(m for m in config.oracle if m not in left_out),
        ),
        source,
    )


class _Runner:
    def __init__(
        self, config: FewShotConfig, work_dir: Path, source: Source, bar: tqdm
    ) -> None:
        self.config, self.work_dir, self.source = config, work_dir, source
        self.bar = bar
        self.made_with = describe_software()
        self._draw: tuple[tuple[int, int], Drawn] | None = None

    def drawn(self, shots: int, seed: int) -> Drawn:
        """Returns the images of a draw. The last one is kept."""
        if self._draw is None or self._draw[0] != (shots, seed):
            plain = self.config.selection == 'cv'
            self._draw = (shots, seed), self.source.draw(shots, seed, plain)
        return self._draw[1]

    def data(self, train: Features, shots: int, seed: int) -> FewShotData:
        return FewShotData(
            train,
            shots,
            self.source.text_features,
            self.source.logit_scale,
            self.source.class_names,
            self.source.encoder,
            seed=seed,
        )

    def fit(self, job: _Job, test: Features | None = None) -> None:
        """Selects and fits one classifier. Oracles are selected on ``test``."""
        path = self.work_dir / 'runs' / f'{job.name}.json'
        self.bar.set_postfix_str(job.name, refresh=False)
        if path.is_file():
            self.bar.update()
            return
        if job.shots:
            drawn = self.drawn(job.shots, job.seed)
            data = self.data(drawn.train, job.shots, job.seed)
            data = replace(data, plain=drawn.plain)
        else:
            width = self.source.text_features.shape[1]
            empty = Features(torch.empty(1, 0, width), torch.empty(0).long())
            drawn, data = Drawn(empty, None, None), self.data(empty, 0, 0)
        fit = select(
            METHODS[job.method],
            data,
            test if job.oracle else drawn.val,
            'oracle' if job.oracle else self.config.selection,
            self.config.overrides.get(job.method),
        )
        record = {
            'name': job.name,
            'method': job.method,
            'shots': job.shots,
            'seed': job.seed,
            'selection': 'oracle' if job.oracle else fit.selection,
            'options': fit.options,
            **self.validate(fit, None if job.oracle else drawn),
            'tried': fit.tried,
            'fit_seconds': fit.fit_seconds,
            'select_seconds': fit.select_seconds,
            'parameters': num_learnt(fit.classifier),
            'redrawn': drawn.redrawn,
            'made_with': self.made_with,
        }
        save_classifier(
            self.work_dir / 'classifiers' / f'{job.name}.safetensors',
            fit.classifier,
            self.source.made_by,
            self.source.class_names,
            self.source.preprocessing,
            record,
        )
        write_atomic(path, json.dumps({**record, 'test': None}, indent=2))
        logger.info(
            'fitted %s, selection %s, %d tried', job.name, fit.selection, fit.tried
        )
        self.bar.update()

    def validate(self, fit: Fit, drawn: Drawn | None) -> dict[str, float | None]:
        """Returns what :func:`choose` compares: nothing of oracles (None)."""
        found = dict.fromkeys(('val_accuracy', 'val_loss', 'val_zero_shot'))
        if drawn is None:
            return found
        accuracy, loss, val = fit.val_accuracy, fit.val_loss, drawn.val
        if self.config.selection == 'cv':
            # All folds together are the training images.
            val = drawn.train if drawn.plain is None else drawn.plain
        elif val is not None:
            score = evaluate(fit.classifier, val)
            accuracy, loss = score.accuracy, score.loss
        if accuracy is not None:
            zero_shot = METHODS['zero_shot'].fit(self.data(val, 0, 0))
            found = {
                'val_accuracy': accuracy,
                'val_loss': loss,
                'val_zero_shot': evaluate(zero_shot, val).accuracy,
            }
        return found

    def test(self, jobs: list[_Job]) -> list[dict]:
        """Opens the test split and tests the classifiers that are not tested yet."""
        paths = {job: self.work_dir / 'runs' / f'{job.name}.json' for job in jobs}
        done = [
            path.is_file() and read_json(path)['test'] is not None
            for path in paths.values()
        ]
        if not all(done):
            test = self.source.test()
            logger.info(
                'test split opened: %d images; %d classifiers are fixed',
                len(test),
                sum(path.is_file() for path in paths.values()),
            )
        records = []
        for (job, path), tested in zip(paths.items(), done, strict=True):
            if job.oracle:
                self.fit(job, None if tested else test)
            record = read_json(path)
            if not tested:
                classifier, _ = read_classifier(
                    self.work_dir / 'classifiers' / f'{job.name}.safetensors'
                )
                record['test'] = {
                    **asdict(evaluate(classifier, test)),
                    'pictures': len(test),
                }
                write_atomic(path, json.dumps(record, indent=2))
                logger.info('tested %s', job.name)
            records.append(record)
        return records

    def fit_final(self, records: list[dict]) -> None:
        """Fits the chosen method with its options to all images."""
        chosen = choose(records).record
        train = self.source.all_labelled()
        shots = max(1, len(train) // len(self.source.class_names))
        classifier = METHODS[chosen['method']].fit(
            self.data(train, shots, chosen['seed']), **chosen['options']
        )
        record = {
            **{key: chosen[key] for key in ('method', 'selection', 'options')},
            'name': 'final',
            'shots': shots,
            'seed': chosen['seed'],
            'pictures': len(train),
            'made_with': self.made_with,
        }
        save_classifier(
            self.work_dir / 'classifiers' / 'final.safetensors',
            classifier,
            self.source.made_by,
            self.source.class_names,
            self.source.preprocessing,
            record,
        )
        logger.info('fitted final, %s, to all %d images', chosen['name'], len(train))


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

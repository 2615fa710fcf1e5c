"""A run of all methods, shots and seeds on one data set."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.logging import RichHandler
from torch import nn

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
        The content of ``runs/*.json``, zero-shot CLIP first if there is text.

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
    draws = [(shots, seed) for shots in config.shots for seed in config.seeds]
    jobs = [_Job('zero_shot', 0, 0)] * (source.text_features is not None) + [
        _Job(method, *draw, oracle)
        for draw in draws
        for oracle, methods in ((False, config.methods), (True, config.oracle))
        for method in methods
        if method != 'zero_shot'
    ]
    with _log_to(work_dir / 'run.log'):
        for note in source.notes:
            logger.warning(note)
        source.encode(draws, plain=config.selection == 'cv')
        runner = _Runner(config, work_dir, source)
        with progress_bar(len(jobs), 'fitting', 'classifiers', quiet) as bar:
            for job in (job for job in jobs if not job.oracle):
                bar.set_postfix_str(job.name, refresh=False)
                runner.fit(job)
                bar.update()
            test = runner.open_test(jobs)
            records = []
            for job in jobs:
                records.append(runner.test(job, test))
                bar.update(job.oracle)
        if final:
            runner.fit_final(records)
    return records


def _resolve(config: FewShotConfig, quiet: bool) -> tuple[FewShotConfig, Source]:
    """Opens the data, and replaces options that depend on it."""
    source: Source = FeatureSource(config) if config.features else None
    source = source or ImageSource(config, quiet)
    if config.selection == 'val' and not source.has_val:
        raise ValueError(
            f'{config.features or config.dataset} has no validation images; use '
            f'selection cv or fixed.'
        )
    left_out = [
        name
        for name in (*config.methods, *config.oracle)
        if METHODS[name].needs_encoder and not source.has_text
    ]
    if left_out:
        source.notes.append(
            f'Left out, because they need the text tower of an encoder: '
            f'{", ".join(left_out)}.'
        )
    if not source.has_matrix:
        source.notes.append(
            'There is no text. The class matrix of the methods are the prototypes, '
            'which are the normalised mean features of the training images of a class.'
        )
        config = replace(config, methods=('prototypes', *config.methods))
    resolved = replace(
        config,
        selection=config.selection or ('val' if source.has_val else 'fixed'),
        shots=source.shots,
        methods=tuple(m for m in config.methods if m not in left_out),
        oracle=tuple(m for m in config.oracle if m not in left_out),
    )
    return resolved, source


class _Runner:
    """Fits and tests the classifiers of a run that are not there yet."""

    def __init__(self, config: FewShotConfig, work_dir: Path, source: Source) -> None:
        self.config, self.work_dir, self.source = config, work_dir, source
        self.made_with = describe_software()
        self._draw: tuple[tuple[int, int], Drawn] | None = None

    def files(self, name: str) -> tuple[Path, Path]:
        """Returns the record and the classifier of a job."""
        classifier = self.work_dir / 'classifiers' / f'{name}.safetensors'
        return self.work_dir / 'runs' / f'{name}.json', classifier

    def drawn(self, shots: int, seed: int) -> Drawn:
        """Returns the images of a draw. The last one is kept."""
        if shots == 0:
            width = self.source.text_features.shape[1]
            none = Features(torch.empty(1, 0, width), torch.empty(0).long())
            return Drawn(none, None, None)
        if self._draw is None or self._draw[0] != (shots, seed):
            plain = self.config.selection == 'cv'
            self._draw = (shots, seed), self.source.draw(shots, seed, plain)
        return self._draw[1]

    def data(self, drawn: Drawn, shots: int, seed: int) -> FewShotData:
        """Returns the training data of a method."""
        return FewShotData(
            drawn.train,
            shots,
            self.source.text_features,
            self.source.logit_scale,
            self.source.class_names,
            self.source.encoder,
            seed,
            drawn.plain,
        )

    def save(self, name: str, classifier: nn.Module, record: dict) -> None:
        """Writes a classifier."""
        source = self.source
        names, preprocessing = source.class_names, source.preprocessing
        file = self.files(name)[1]
        save_classifier(file, classifier, source.made_by, names, preprocessing, record)

    def fit(self, job: _Job, test: Features | None = None) -> None:
        """Selects and fits one classifier. Oracles are selected on ``test``."""
        path, _ = self.files(job.name)
        if path.is_file():
            return
        drawn = self.drawn(job.shots, job.seed)
        fit = select(
            METHODS[job.method],
            self.data(drawn, job.shots, job.seed),
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
        if job.method == 'zero_shot' and self.config.class_rows is not None:
            record['title'] = 'Own classifier'
        self.save(job.name, fit.classifier, record)
        write_atomic(path, json.dumps({**record, 'test': None}, indent=2))
        logger.info(
            'fitted %s, selection %s, %d tried', job.name, fit.selection, fit.tried
        )

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
        if accuracy is None:
            return found
        zero_accuracy = None
        if self.source.text_features is not None:
            zero_shot = METHODS['zero_shot'].fit(self.data(drawn, 0, 0))
            zero_accuracy = evaluate(zero_shot, val).accuracy
        return dict(zip(found, (accuracy, loss, zero_accuracy), strict=True))

    def open_test(self, jobs: list[_Job]) -> Features | None:
        """Returns the test images, or None if all classifiers are tested."""
        paths = [self.files(job.name)[0] for job in jobs]
        fitted = [path for path in paths if path.is_file()]
        if len(fitted) == len(jobs) and all(read_json(p)['test'] for p in fitted):
            return None
        test = self.source.test()
        logger.info(
            'test split opened: %d images; %d classifiers are fixed',
            *(len(test), len(fitted)),
        )
        return test

    def test(self, job: _Job, test: Features | None) -> dict:
        """Tests a classifier, if it is not tested yet. Returns its record."""
        if job.oracle:
            self.fit(job, test)
        path, classifier = self.files(job.name)
        record = read_json(path)
        if record['test'] is None:
            score = evaluate(read_classifier(classifier)[0], test)
            record['test'] = {**asdict(score), 'pictures': len(test)}
            write_atomic(path, json.dumps(record, indent=2))
            logger.info('tested %s', job.name)
        return record

    def fit_final(self, records: list[dict]) -> None:
        """Fits the chosen method with its options to all images."""
        chosen = choose(records).record
        train, seed = self.source.all_labelled(), chosen['seed']
        shots = max(1, len(train) // len(self.source.class_names))
        classifier = METHODS[chosen['method']].fit(
            self.data(Drawn(train, None, None), shots, seed), **chosen['options']
        )
        record = {
            **{key: chosen[key] for key in ('method', 'selection', 'options')},
            'name': 'final',
            'shots': shots,
            'seed': seed,
            'pictures': len(train),
            'made_with': self.made_with,
        }
        self.save('final', classifier, record)
        logger.info('fitted final, %s, to all %d images', chosen['name'], len(train))


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Logs the package to a file, and its warnings to the screen."""
    file = logging.FileHandler(path, encoding='utf-8')
    file.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    handlers = (file, RichHandler(logging.WARNING, show_path=False))
    package = logging.getLogger('dsnet_mm')
    level, package.propagate = package.level, False
    package.setLevel(logging.INFO)
    for handler in handlers:
        package.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            package.removeHandler(handler)
        package.propagate = True
        package.setLevel(level)
        file.close()

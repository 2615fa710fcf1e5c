"""A run of all methods, shots and seeds on one data set."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.logging import RichHandler
from torch import nn

from dsnet_mm.datasets.features import Features, balancing
from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

from .base_to_new import BaseClasses, transfers
from .calibration import Calibration, calibrate
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

    @property
    def sees_test(self) -> bool:
        """Whether the fit takes test images, with or without their labels."""
        return self.oracle or METHODS[self.method].transductive


def run(
    config: FewShotConfig,
    work_dir: str | Path,
    quiet: bool = False,
    final: bool = False,
) -> list[dict]:
    """Fits and tests all methods, and writes a file for each classifier.

    First all images are encoded. Then all classifiers are selected and fitted without
    the test split. Then the test split is opened, transductive methods are fitted to
    its features without labels, and all classifiers are tested.
    ``run.log`` in ``work_dir`` records the order. A call with the same configuration
    continues an interrupted run. A call with other methods, shots or seeds adds them to
    the run, and opens the test split again; the records count that.

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
        source.encode(draws, plain=config.selection != 'val')
        runner = Fitter(config, work_dir, source)
        with progress_bar(len(jobs), 'fitting', 'classifiers', quiet) as bar:
            for job in (job for job in jobs if not job.sees_test):
                bar.set_postfix_str(job.name, refresh=False)
                runner.fit(job)
                bar.update()
            test = runner.open_test(jobs)
            records = []
            for job in jobs:
                records.append(runner.test(job, test))
                bar.update(job.sees_test)
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
    names = dict.fromkeys((*config.methods, *config.oracle))
    left_out = set()
    if not source.has_text:
        unfit = [name for name in names if METHODS[name].needs_encoder]
        left_out |= _leave_out(source, unfit, 'need the text tower of an encoder')
    if not source.has_matrix:
        source.notes.append(
            'There is no text. The class matrix of the methods are the prototypes, '
            'which are the normalised mean features of the training images of a class.'
        )
        config = replace(config, methods=('prototypes', *config.methods))
    if config.base_to_new:
        source = BaseClasses(source)
        unfit = [name for name in names if not transfers(name)]
        left_out |= _leave_out(source, unfit, 'cannot classify new classes')
    resolved = replace(
        config,
        selection=config.selection or ('val' if source.has_val else 'fixed'),
        shots=source.shots,
        methods=tuple(m for m in config.methods if m not in left_out),
        oracle=tuple(m for m in config.oracle if m not in left_out),
    )
    return resolved, source


def _leave_out(source: Source, methods: list[str], why: str) -> set[str]:
    if methods:
        source.notes.append(f'Left out, because they {why}: {", ".join(methods)}.')
    return set(methods)


class Fitter:
    """Fits and tests the classifiers of a run that are not there yet."""

    def __init__(self, config: FewShotConfig, work_dir: Path, source: Source) -> None:
        self.config, self.work_dir, self.source = config, work_dir, source
        self.made_with = describe_software()
        log = work_dir / 'run.log'
        text = log.read_text(encoding='utf-8') if log.is_file() else ''
        self.openings = text.count('test split opened')
        self._draws: dict[tuple, Drawn] = {}

    def files(self, name: str) -> tuple[Path, Path]:
        """Returns the record and the classifier of a job."""
        classifier = self.work_dir / 'classifiers' / f'{name}.safetensors'
        return self.work_dir / 'runs' / f'{name}.json', classifier

    def drawn(self, shots: int, seed: int, crop_scale: tuple[float, float]) -> Drawn:
        """Returns the images of a draw. The last one is kept, with all its crops."""
        if shots == 0:
            width = self.source.text_features.shape[1]
            none = Features(torch.empty(1, 0, width), torch.empty(0).long())
            return Drawn(none, None, None)
        key = shots, seed, crop_scale
        if key not in self._draws:
            plain = self.config.selection != 'val'
            drawn = self.source.cropped(crop_scale).draw(shots, seed, plain)
            kept = {k: v for k, v in self._draws.items() if k[:2] == key[:2]}
            self._draws = {**kept, key: drawn}
        return self._draws[key]

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
            text_length=self.source.text_length,
        )

    def save(
        self, name: str, classifier: nn.Module, record: dict, calibration: Calibration
    ) -> None:
        """Writes a classifier."""
        source = self.source
        names, preprocessing = source.class_names, source.preprocessing
        file = self.files(name)[1]
        save_classifier(
            *(file, classifier, source.made_by, names, preprocessing, record),
            calibration,
        )

    def fit(self, job: _Job, test: Features | None = None) -> None:
        """Selects and fits one classifier.

        Oracles are selected on ``test``. Transductive methods see its features.
        """
        path, _ = self.files(job.name)
        if path.is_file():
            return
        method = METHODS[job.method]
        drawn = self.drawn(job.shots, job.seed, method.crop_scale)
        data = self.data(drawn, job.shots, job.seed)
        if method.transductive:
            data = replace(data, unlabelled=test.features[0])
        fit = select(
            method,
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
            'redrawn': drawn.overlap < 1,
            'overlap': drawn.overlap,
            'openings_before': self.openings,
            'transductive': method.transductive,
            'made_with': self.made_with,
        }
        if job.method == 'zero_shot' and self.config.class_rows is not None:
            record['title'] = 'Own classifier'
        fit_again = partial(method.fit, **fit.options)
        held_out = drawn.val
        if job.shots == 0:  # no image fits it, so the shots are held out
            draw = max(self.config.shots), self.config.seeds[0]
            other = self.drawn(*draw, method.crop_scale)
            held_out = other.val or other.plain or other.train
        calibration = calibrate(fit_again, data, held_out, fit.classifier)
        self.save(job.name, fit.classifier, record, calibration)
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
        self.openings += 1
        logger.info(
            'test split opened: %d images; %d classifiers are fixed',
            *(len(test), len(fitted)),
        )
        return test

    def test(self, job: _Job, test: Features | None) -> dict:
        """Tests a classifier, if it is not tested yet. Returns its record."""
        if job.sees_test:
            self.fit(job, test)
        path, classifier = self.files(job.name)
        record = read_json(path)
        if record['test'] is None:
            fitted, about = read_classifier(classifier)
            temperature = Calibration.read(about).temperature
            score = evaluate(lambda f: fitted(f) / temperature, test)
            record['test'] = {**asdict(score), 'pictures': len(test)}
            record['test']['opening'] = self.openings
            if self.config.base_to_new:
                record['new'] = self.source.test_new(fitted)
            write_atomic(path, json.dumps(record, indent=2))
            logger.info('tested %s', job.name)
        return record

    def fit_final(self, records: list[dict]) -> None:
        """Fits the chosen method with its options to all images."""
        chosen = choose(records).record
        count = self.fit_all(chosen, 'final')
        logger.info('fitted final, %s, to all %d images', chosen['name'], count)

    def fit_all(self, chosen: dict, name: str, test: bool = True) -> int:
        """Fits a method to all images, so that classes count equally.

        Args:
            chosen: Method, options, selection and seed.
            name: Name of the classifier.
            test: Whether test images are among them.

        Returns:
            Number of images.
        """
        method, seed = METHODS[chosen['method']], chosen['seed']
        train = self.source.cropped(method.crop_scale).all_labelled(test)
        plain = self.source.all_labelled(test, plain=True)

        def fit(part: FewShotData) -> nn.Module:
            balanced = part.subset(balancing(part.train.labels), part.shots)
            return method.fit(balanced, **chosen['options'])

        shots = max(1, len(train) // len(self.source.class_names))
        data = self.data(Drawn(train, plain, None), shots, seed)
        classifier = fit(data)
        # Folds are made before images are repeated, so no copy is in two of them.
        calibration = calibrate(fit, data, None, classifier)
        record = {
            **{key: chosen[key] for key in ('method', 'selection', 'options')},
            'name': name,
            'shots': shots,
            'seed': seed,
            'pictures': len(train),
            'made_with': self.made_with,
        }
        self.save(name, classifier, record, calibration)
        return len(train)


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

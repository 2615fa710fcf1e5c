"""Cases: a run is interrupted a few times, ends, and is compared."""

import json
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.files import write_atomic

from .interrupts import Failure, Interrupt, Usual, start
from .runs import TOLERANCE, TRAIN, Run, digests


@dataclass
class Soak:
    """What the lanes share.

    Attributes:
        root: Folder of everything.
        runs: The runs.
        seed: Seed of all random numbers.
        lanes: Number of processes that interrupt.
        end: Time after which no case begins, but for the first of each lane.
        events: Queue of what happened, for the parent.
        ready: Barrier after the uninterrupted runs.
    """

    root: Path
    runs: tuple[Run, ...]
    seed: int
    lanes: int
    end: float
    events: Any
    ready: Any

    def lane(self, lane: int) -> None:
        """Makes a part of the uninterrupted runs, then one case after another."""
        try:
            for run in self.runs[lane :: self.lanes]:
                with self.reporting(run, run.name):
                    self.make_reference(run)
            self.ready.wait()
            runs = [run for run in self.runs if self.reference_of(run).is_file()]
            for case in count(lane, self.lanes) if runs else ():
                run = runs[case % len(runs)]
                with self.reporting(run, f'case {case}'):
                    self.interrupt(run, case)
                if time.monotonic() > self.end:
                    break
        finally:
            self.events.put(None)

    @contextmanager
    def reporting(self, run: Run, what: str) -> Iterator[None]:
        """Reports what fails."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, Failure):
                error = traceback.format_exc()
            self.events.put(dict(run=run.name, failure=f'{what}: {error}'))

    def folder(self, run: Run, name: str) -> Path:
        """Makes the folder of a run."""
        folder = self.root / run.name.replace(', ', '_').replace(' ', '_') / name
        folder.mkdir(parents=True)
        (folder / 'config.py').write_text(run.config)
        return folder

    def reference_of(self, run: Run) -> Path:
        """Returns the file that describes the uninterrupted run."""
        return self.root / f'{run.name}.json'

    def make_reference(self, run: Run) -> None:
        """Runs without an interrupt, in a process of its own and in a fork."""
        found, data = [], self.root / 'data'
        for name in ('process', 'fork')[: 1 + run.forks]:
            folder = self.folder(run, name)
            outcome = start(
                run, folder, data, folder / 'start.txt', None, name == 'process'
            )
            if outcome.status:
                raise Failure(f'it ended with {outcome.status}, see {folder}/start.txt')
            found.append(digests(run.result(folder)))
        check_equal(found[0], found[-1])
        paths = [p for p in folder.rglob('*') if p.is_file() and p.suffix != '.txt']
        usual = Usual(
            outcome.seconds, outcome.writes, max(p.stat().st_size for p in paths)
        )
        facts = dict(digests=found[0], usual=usual, pieces=len(run.pieces(folder)))
        if not run.forks:
            facts['difference'] = self.compare_with_one(run, folder)
        write_atomic(self.reference_of(run), json.dumps(facts))
        self.events.put(dict(run=run.name, reference=facts))

    def compare_with_one(self, run: Run, folder: Path) -> float:
        """Returns the largest difference of weights to training in one process."""
        words = [*TRAIN, '--cfg-options', 'data_root={data}/scenes/cls']
        one = Run(run.name, tuple(words), run.result, run.pieces, 0, run.config)
        own = self.folder(run, 'one_process')
        outcome = start(one, own, self.root / 'data', own / 'start.txt', None, False)
        if outcome.status:
            raise Failure(f'it ended with {outcome.status}, see {own}/start.txt')
        worst = 0.0
        for path in sorted(own.glob('run/epoch_*.pth')):
            first, second = (
                read_checkpoint(str(p))['state_dict']
                for p in (path, folder / 'run' / path.name)
            )
            gaps = [(first[key] - second[key]).abs().max().item() for key in first]
            worst = max(worst, *gaps)
        if worst > TOLERANCE:
            raise Failure(f'weights of one and two processes differ by {worst:.1e}')
        return worst

    def interrupt(self, run: Run, case: int) -> None:
        """Interrupts a run a few times, lets it end, and compares its result.

        Raises:
            Failure: If a promise does not hold. The folder is kept then.
        """
        facts = json.loads(self.reference_of(run).read_text())
        usual, rng = Usual(*facts['usual']), np.random.default_rng([self.seed, case])
        folder, data = self.folder(run, str(case)), self.root / 'data'
        plan = [
            Interrupt.draw(rng, usual, run.forks) for _ in range(rng.integers(1, 6))
        ]
        begun, before = [], run.pieces(folder)
        try:
            for interrupt in [*plan, None]:
                log = folder / f'start_{len(begun)}.txt'
                begun.append(interrupt)
                outcome = start(run, folder, data, log, interrupt, not run.forks)
                after = run.pieces(folder)
                again = sum(after.get(piece) != before[piece] for piece in before)
                before = after
                event = dict(run=run.name, again=again, orphans=outcome.orphans)
                if interrupt and outcome.hit:
                    event['kind'] = interrupt.kind
                self.events.put(event)
                if outcome.status and not outcome.hit:
                    raise Failure(f'it ended with {outcome.status}')
                if again > run.again:
                    raise Failure(f'{again} pieces were done again')
            check_equal(facts['digests'], digests(run.result(folder)))
        except Failure as error:
            raise Failure(f'{error}; see {folder}; {begun}') from error
        shutil.rmtree(folder)
        self.events.put(dict(run=run.name, equal=True))


def check_equal(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raises Failure if two results differ."""
    keys = sorted(expected.keys() | found.keys())
    if wrong := [key for key in keys if expected.get(key) != found.get(key)]:
        raise Failure(f'{len(wrong)} parts of the result differ, such as {wrong[0]}')

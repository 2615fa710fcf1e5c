"""Interrupts trainings, few-shot runs, encodings and inference again and again.

Each run is killed (SIGKILL at a random time or within a write, SIGTERM) or gets a full
disk, and the same command goes on. Its result must equal that of an uninterrupted run
bit by bit, little work may be done twice, and no process may be left behind.

The uninterrupted runs are processes of their own. The interrupted ones are forks of
this process, which has imported the libraries: that saves most of each start.
"""

import os

os.environ['OMP_NUM_THREADS'] = (
    '1'  # sums depend on it, and threads do not survive fork
)

import argparse
import atexit
import hashlib
import importlib
import json
import resource
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.demo.tiny_clip import pretrain, scene_pairs
from dsnet_mm.environment import commit, machine
from dsnet_mm.files import check_new, write_atomic
from dsnet_mm.progress import progress_bar
from make_scenes import SceneSettings, make_scenes

REPO = Path(__file__).resolve().parents[1]
PAGE = 'docs/reliability.md'
MARKS = '<!-- soak: begin -->\n', '<!-- soak: end -->\n'
LIBRARIES = (
    *(f'mmdet.{part}' for part in ('models', 'datasets', 'evaluation', 'engine')),
    *(f'mmpretrain.{part}' for part in ('models', 'datasets', 'evaluation', 'engine')),
    *('mmdet.visualization', 'mmpretrain.visualization', 'mmpretrain.structures'),
    *('open_clip', 'matplotlib.pyplot', 'dsnet_mm.few_shot.cli'),
    *('dsnet_mm.inference.__main__', 'dsnet_mm.engine.launch', 'dsnet_mm.engine.fsdp'),
)

# ------------------------------------------------------------------------ the runs

TRAINING = """
train_dataloader = dict(batch_size=4)
default_hooks = dict(logger=dict(interval=1))
"""
CLASSIFIER = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
default_hooks.update(checkpoint=dict(interval=1))
"""
BY_ITERATION = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=64, val_interval=32)
train_dataloader.update(
    num_workers=2, sampler=dict(_delete_=True, type='InfiniteSampler', shuffle=True)
)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=64)]
default_hooks.update(
    checkpoint=dict(
        by_epoch=False, interval=8, filename_tmpl='iter_{{}}.pth', max_keep_ckpts=2
    )
)
log_processor = dict(by_epoch=False)
"""
DETECTOR = f"""
_base_ = __import__('dsnet_mm').find_config('mask_rcnn_dsnet_demo_scenes')
{TRAINING}
model = dict(backbone=dict(init_cfg=None))
train_dataloader.update(batch_size=2)
train_cfg = dict(max_iters=24, val_interval=12)
default_hooks.update(checkpoint=dict(interval=4))
"""
# One and two processes train the same weights without batch norm and random numbers.
PROCESSES = f"""
_base_ = __import__('dsnet_mm').find_config('dsnet-demo_scenes')
{TRAINING}
env_cfg = dict(dist_cfg=dict(backend='gloo'))
model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=4)))
train_dataloader.update(
    dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9)
)
default_hooks.update(checkpoint=dict(interval=1, filename_tmpl='epoch_{{}}.pth'))
"""
TOLERANCE = 1e-5
"""Largest difference of weights between one and two processes."""

Pieces = dict[Any, int]
"""What a run has done, with a number that changes when it is done again."""


@dataclass(frozen=True)
class Run:
    """A command that is interrupted and goes on.

    Attributes:
        name: Name in the table.
        words: The command, a tool and its arguments. ``{data}`` is the folder of data.
        result: Reads what has to be equal from the folder in which it ran.
        pieces: Reads what has been done.
        again: Pieces that one start may at most do again.
        config: Configuration, in ``config.py`` of that folder.
        forks: Whether it can be a fork. Otherwise it is a process of its own each time,
            and only killed at random times.
    """

    name: str
    words: tuple[str, ...]
    result: Callable[[Path], dict[str, Any]]
    pieces: Callable[[Path], Pieces]
    again: int
    config: str = ''
    forks: bool = True

    def command(self, data: Path) -> list[str]:
        """Returns the words with absolute paths."""
        words = [word.format(data=data) for word in self.words]
        return [
            str(REPO / w) if w.startswith(('tools/', 'weights/')) else w for w in words
        ]


def training(folder: Path, name: str) -> dict[str, Any]:
    """Reads weights, averages, optimizer and schedules of the last checkpoint."""
    checkpoint = read_checkpoint(str(folder / 'run' / name))
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    found = {part: checkpoint.get(part) for part in parts}
    return found | {key: checkpoint['meta'][key] for key in ('epoch', 'iter')}


def iterations(folder: Path) -> Pieces:
    """Counts how often each iteration of a training was done, from its logs."""
    found: Counter = Counter()
    for path in folder.glob('run/*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the kill cut the line
                entry = json.loads(line)
                if 'loss' in entry:
                    found[entry['step']] += 1
    return dict(found)


def few_shot(folder: Path) -> dict[str, Any]:
    """Reads the records and classifiers of a few-shot run, without their times."""
    found = {}
    for path in sorted(folder.glob('run/runs/*.json')):
        record = json.loads(path.read_text())
        found[path.stem] = {k: v for k, v in record.items() if 'seconds' not in k}
        classifier = folder / 'run' / 'classifiers' / f'{path.stem}.safetensors'
        found[f'{path.stem} weights'] = read_checkpoint(str(classifier))['state_dict']
    return found


def features(folder: Path) -> dict[str, Any]:
    """Reads a file of features."""
    return read_checkpoint(str(folder / 'features.safetensors'))


def predictions(folder: Path) -> dict[str, Any]:
    """Reads the predictions and the drawn images."""
    files = [*folder.glob('run/*.json'), *folder.glob('run/images/*')]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def files(pattern: str) -> Callable[[Path], Pieces]:
    """Returns a function that tells when files were written."""
    return lambda folder: {f: f.stat().st_mtime_ns for f in folder.glob(pattern)}


TRAIN = ('tools/train.py', 'config.py', '--work-dir=run', '--resume')
IMAGES = ('{data}/shots', '--model={data}/clip/demo_clip.json')
IMAGES += ('--pretrained={data}/clip/demo_clip.safetensors', '--cfg-options')
FEW_SHOT = ('--shots', '1', '4', '--seeds', '1', '2', '--methods')
FEW_SHOT += ('linear_probe', 'clap', 'tip_adapter_f', 'clip_adapter')
TWO = ('--cfg-options', 'data_root={data}/scenes/cls')
TWO += ('train_dataloader.batch_size=2',)
WEIGHTS = ('mask_rcnn_dsnet_nuclei', 'weights/mask_rcnn_dsnet_nuclei.safetensors')
RUNS = (
    Run(
        *('training', (*TRAIN, '--cfg-options', 'data_root={data}/scenes/cls')),
        *(partial(training, name='last.pth'), iterations, 8, CLASSIFIER),
    ),
    Run(
        'training, EMA, 2 workers',
        (*TRAIN, '--ema', '--cfg-options', 'data_root={data}/scenes/cls'),
        *(partial(training, name='iter_64.pth'), iterations, 8, BY_ITERATION),
    ),
    Run(
        'few-shot run',
        ('tools/few_shot.py', 'run', *IMAGES[:3], '--work-dir=run', *FEW_SHOT),
        *(few_shot, files('run/classifiers/*.safetensors'), 1),
    ),
    Run(
        'encoding',
        (
            'tools/few_shot.py',
            'encode',
            *IMAGES,
            'views=10',
            '--out=features.safetensors',
        ),
        *(features, files('work_dirs/few_shot_features/images_*/*.safetensors'), 0),
    ),
    Run(
        'inference',
        ('tools/infer.py', *WEIGHTS, '{data}/nuclei', '--out=run', '--resume'),
        *(predictions, files('run/images/*'), 1),
    ),
    Run(
        'training of a detector',
        (*TRAIN, '--cfg-options', 'data_root={data}/scenes'),
        *(partial(training, name='last.pth'), iterations, 4, DETECTOR),
    ),
    Run(
        'training, 2 processes',
        ('tools/dist_train.sh', 'config.py', '2', *TRAIN[2:], *TWO),
        *(partial(training, name='epoch_8.pth'), iterations, 8, PROCESSES, False),
    ),
)


def prepare(data: Path) -> None:
    """Writes the data of all runs: drawn scenes, a tiny CLIP, parts of a photograph."""
    small = dict(train=16, val=4, cls_train=8, cls_val=2, size=64)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        make_scenes(data / 'scenes', SceneSettings(**small))
        shots = SceneSettings(**(small | dict(train=1, val=1, cls_train=40)))
        make_scenes(data / 'shots_of_scenes', shots)
        (data / 'shots_of_scenes' / 'cls' / 'train').rename(data / 'shots')
        pretrain(data / 'clip', scene_pairs(8), 2)
    photograph = cv2.imread(str(REPO / 'docs' / 'images' / 'nuclei.jpg'))
    (data / 'nuclei').mkdir()
    for i in range(24):
        y, x = 32 * (i // 6), 32 * (i % 6)
        cv2.imwrite(str(data / 'nuclei' / f'{i:02d}.png'), photograph[y:, x:][:96, :96])


def digests(result: dict[str, Any]) -> dict[str, str]:
    """Returns a hash of each part of a result."""
    found = {}
    for name, value in result.items():
        sha = hashlib.sha256()
        _feed(sha, value)
        found[name] = sha.hexdigest()
    return found


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            sha.update(repr(key).encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(str(len(value)).encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, Tensor):
        sha.update(f'{value.dtype} {tuple(value.shape)}'.encode())
        sha.update(value.detach().contiguous().numpy().tobytes())
    else:
        sha.update(repr(value).encode())


# ---------------------------------------------------------------------- interrupting

KINDS = {'SIGKILL': 0.3, 'in a write': 0.35, 'SIGTERM': 0.2, 'full disk': 0.15}
"""Ways to interrupt, with their share. 'in a write' is SIGKILL too."""

PATIENCE = 180
"""Seconds after which a run that does not end counts as stuck."""

WORKERS = 15
"""Seconds within which workers must end after their parent."""


class Failure(Exception):
    """A promise that did not hold."""


class Usual(NamedTuple):
    """An uninterrupted fork: seconds, writes, and bytes of the largest file."""

    seconds: float
    writes: int
    largest: int


@dataclass(frozen=True)
class Interrupt:
    """When and how a run is interrupted.

    Attributes:
        kind: One of ``KINDS``.
        seconds: Seconds after the start, or after ``write``.
        write: Number of the write (a file opened for writing, or renamed) at which it
            happens; at 0 seconds just before it. None for a time.
        limit: Largest size of a file in bytes: what is left on the disk.
        victim: Number that chooses the process to kill, of those that torchrun started.
    """

    kind: str
    seconds: float = 0
    write: int | None = None
    limit: int | None = None
    victim: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, usual: Usual, forks: bool) -> 'Interrupt':
        """Draws one at random."""
        kinds = list(KINDS) if forks else ['SIGKILL', 'SIGTERM']
        share = np.array([KINDS[kind] for kind in kinds])
        kind = kinds[rng.choice(len(kinds), p=share / share.sum())]
        if kind == 'full disk':
            return cls(kind, limit=int(rng.integers(1, usual.largest)))
        if kind == 'in a write' and usual.writes:
            # A third of them just before the write.
            seconds = max(0, rng.uniform(-0.01, 0.02))
            return cls(kind, seconds, int(rng.integers(1, usual.writes + 1)))
        return cls(kind, rng.uniform(0, usual.seconds), victim=int(rng.integers(99)))


@dataclass
class Outcome:
    """How a start of a run ended.

    Attributes:
        status: Exit status, the negative number of a signal.
        hit: Whether the interrupt came before the end.
        seconds: Seconds it took.
        writes: Writes that it announced.
        orphans: Seconds that its last worker outlived it.
    """

    status: int = 0
    hit: bool = False
    seconds: float = 0
    writes: int = 0
    orphans: float = 0


def announce(
    link: socket.socket, folder: str, process: int, event: str, args: tuple
) -> None:
    """Tells the parent of a write before it, and waits for its answer.

    It is an audit hook of Python. Logs are left out.
    """
    if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = args[0]
    elif event == 'os.rename':
        path = args[1]
    else:
        return
    if isinstance(path, str) and os.getpid() == process:
        path = os.path.abspath(path)
        is_log = '/vis_data/' in path or path.endswith(('.log', '.py'))
        if path.startswith(folder) and not is_log:
            link.send(b'w')
            link.recv(1)


def fork(
    words: list[str], folder: Path, limit: int | None
) -> tuple[int, int, socket.socket]:
    """Starts a tool in a fork.

    Returns:
        The process, its output and the connection of :func:`announce`.
    """
    here, there = socket.socketpair()
    output, written = os.pipe()
    process = os.fork()
    if process:
        there.close()
        os.close(written)
        return process, output, here
    status = 1
    try:
        os.setsid()
        here.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(written, stream)
        sys.stdout, sys.stderr = (os.fdopen(i, 'w', 1, closefd=False) for i in (1, 2))
        os.chdir(folder)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.addaudithook(partial(announce, there, str(folder), os.getpid()))
        sys.argv = words
        runpy.run_path(words[0], run_name='__main__')
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def spawn(words: list[str], folder: Path) -> tuple[int, int, None]:
    """Starts a tool in a process of its own, with the same results as :func:`fork`."""
    output, written = os.pipe()
    binaries = str(Path(sys.executable).parent)
    done = subprocess.Popen(
        ['bash' if words[0].endswith('.sh') else sys.executable, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=written,
        stderr=written,
        start_new_session=True,
        env=os.environ
        | dict(
            PATH=f'{binaries}{os.pathsep}{os.environ["PATH"]}',
            PYTHONPATH=str(REPO),
        ),
    )
    os.close(written)
    done.returncode = 0  # watch() waits for it
    return done.pid, output, None


def start(
    run: Run,
    folder: Path,
    data: Path,
    log: Path,
    interrupt: Interrupt | None,
    own: bool,
) -> Outcome:
    """Starts a run, interrupts it, and waits for its end and that of its workers.

    Args:
        run: The run.
        folder: Its folder.
        data: The folder of data.
        log: File for what it prints.
        interrupt: The interrupt, or None.
        own: Whether it is a process of its own.

    Raises:
        Failure: If it does not end, or a worker does not.
    """
    words = run.command(data)
    limit = interrupt.limit if interrupt else None
    process, output, link = spawn(words, folder) if own else fork(words, folder, limit)
    try:
        with open(log, 'wb') as text:
            outcome = watch(process, output, link, text, interrupt, folder)
        end = time.monotonic()
        while left := processes_in(folder):
            outcome.orphans = time.monotonic() - end
            if outcome.orphans > WORKERS:
                raise Failure(f'{len(left)} processes outlived it by {WORKERS} s')
            time.sleep(0.05)
    finally:
        for left in processes_in(folder):
            kill(left, signal.SIGKILL)
        os.close(output)
        if link:
            link.close()
    return outcome


def watch(
    process: int,
    output: int,
    link: socket.socket | None,
    log: Any,
    interrupt: Interrupt | None,
    folder: Path,
) -> Outcome:
    """Reads the output of a process, interrupts it, and waits for its end."""
    begun, outcome = time.monotonic(), Outcome()
    due = PATIENCE + begun
    if interrupt and interrupt.limit is None and interrupt.write is None:
        due = begun + interrupt.seconds
    term = interrupt is not None and interrupt.kind == 'SIGTERM'
    end = os.pidfd_open(process)
    sources = [end, output, *([link] if link else [])]
    try:
        while True:
            wait = max(0, due - time.monotonic())
            ready = select.select(sources, [], [], wait)[0]
            if output in ready:
                log.write(os.read(output, 1 << 16))
            if end in ready:
                break
            if link in ready and link.recv(1):
                outcome.writes += 1
                if interrupt and outcome.writes == interrupt.write:
                    due = time.monotonic() + interrupt.seconds
                if due > time.monotonic():  # else it is killed just before the write
                    link.send(b'.')
            if time.monotonic() >= due:
                if time.monotonic() >= begun + PATIENCE:
                    raise Failure(f'it did not end within {PATIENCE} s')
                victim = process
                if link is None and not term:  # one of those that torchrun started
                    found = sorted(set(processes_in(folder)) - {process}) or [process]
                    victim = found[interrupt.victim % len(found)]
                kill(victim, signal.SIGTERM if term else signal.SIGKILL)
                outcome.hit, due = True, begun + PATIENCE
    finally:
        os.close(end)
    outcome.status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    outcome.seconds = time.monotonic() - begun
    os.set_blocking(output, False)
    with suppress(BlockingIOError):  # workers may still hold the other end
        while text := os.read(output, 1 << 16):
            log.write(text)
    if interrupt and interrupt.limit is not None:
        outcome.hit = outcome.status > 0
    return outcome


def processes_in(folder: Path) -> list[int]:
    """Returns the processes that run in a folder."""
    found = []
    for place in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):  # it has ended, or is not ours
            if os.readlink(place / 'cwd') == str(folder):
                found.append(int(place.name))
    return found


def kill(process: int, number: int) -> None:
    """Sends a signal to a process, which may have ended."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


# ----------------------------------------------------------------------------- cases


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


# --------------------------------------------------------------------------- figures


@dataclass
class Figures:
    """What was counted for one run."""

    kinds: Counter = field(default_factory=Counter)
    equal: int = 0
    again: int = 0
    orphans: float = 0
    reference: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, event: dict) -> None:
        """Counts an event of a lane."""
        if 'kind' in event:
            self.kinds[event['kind']] += 1
        self.equal += 'equal' in event
        self.again = max(self.again, event.get('again', 0))
        self.orphans = max(self.orphans, event.get('orphans', 0))
        self.reference = event.get('reference', self.reference)
        if 'failure' in event:
            self.failures.append(event['failure'])


HEAD = ('run', *KINDS, 'ends', 'equal', 'done again', 'workers')


def rows(runs: tuple[Run, ...], figures: dict[str, Figures]) -> list[list[str]]:
    """Returns the rows of the table, the sum last."""
    table, total = [], Counter()
    for run in runs:
        found = figures[run.name]
        ends = found.equal + len(found.failures)
        total.update(found.kinds)
        total.update(ends=ends, equal=found.equal)
        pieces = found.reference.get('pieces', 0)
        table.append(
            [
                run.name,
                *(str(found.kinds[kind]) for kind in KINDS),
                *(str(ends), str(found.equal)),
                f'{found.again} of {pieces}',
                f'{found.orphans:.1f} s',
            ]
        )
    numbers = [str(total[key]) for key in (*KINDS, 'ends', 'equal')]
    return [*table, ['all', *numbers, '', '']]


def as_markdown(about: dict, runs: tuple[Run, ...], figures: dict[str, Figures]) -> str:
    """Returns the table of the page."""
    lines = [HEAD, ['---'] * len(HEAD), *rows(runs, figures)]
    text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
    text += (
        f'\n{about["kills"]} interrupts in {about["minutes"]:.0f} minutes, '
        f'{about["failures"]} failures. `{about["command"]}` at commit '
        f'{about["commit"]}, {about["date"]}, {about["machine"]["processor"]}, '
        f'{about["lanes"]} processes.\n'
    )
    for run in runs:
        if 'difference' in figures[run.name].reference:
            gap = figures[run.name].reference['difference']
            text += (
                f'\nWeights of two processes differ from those of one by {gap:.1e} at '
                f'most after each epoch (limit {TOLERANCE:.0e}).\n'
            )
    return text


def write_page(page: Path, text: str) -> None:
    """Puts the table between the marks of a page."""
    begin, end = MARKS
    content = page.read_text()
    head, _, rest = content.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f'{page} has no lines {begin.strip()} and {end.strip()}')
    write_atomic(page, f'{head}{begin}{text}{end}{tail}')


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        0 if all promises held, else 1.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog='Runs: ' + '; '.join(run.name for run in RUNS),
    )
    parser.add_argument(
        '--minutes',
        type=float,
        default=25,
        help='no case begins after them, but for the first',
    )
    parser.add_argument('--only', nargs='+', metavar='RUN', help='runs, default: all')
    parser.add_argument(
        '--lanes', type=int, default=os.cpu_count(), help='runs at the same time'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the interrupts')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/soak'), help='folder, made anew'
    )
    parser.add_argument(
        '--page', action='store_true', help=f'write the table into {PAGE}'
    )
    args = parser.parse_args(argv)
    runs = tuple(run for run in RUNS if args.only is None or run.name in args.only)
    if not runs or (args.only and len(runs) < len(set(args.only))):
        parser.error(f'--only takes {", ".join(repr(run.name) for run in RUNS)}')
    root = args.out.resolve()
    try:
        check_new(root)
    except FileExistsError as error:
        parser.error(str(error))
    (root / 'data').mkdir(parents=True)
    begun, forks = time.monotonic(), get_context('fork')
    torch.set_num_threads(1)
    maker = forks.Process(target=prepare, args=(root / 'data',))
    maker.start()
    for name in LIBRARIES:
        importlib.import_module(name)
    maker.join()
    if maker.exitcode:
        return 1

    end = begun + 60 * args.minutes
    shared = forks.SimpleQueue(), forks.Barrier(args.lanes)
    soak = Soak(root, runs, args.seed, args.lanes, end, *shared)
    lanes = [forks.Process(target=soak.lane, args=(i,)) for i in range(args.lanes)]
    for lane in lanes:
        lane.start()
    figures = {run.name: Figures() for run in runs}
    open_lanes = args.lanes
    with progress_bar(round(60 * args.minutes), 'soak', 'seconds') as bar:
        while open_lanes:
            event = shared[0].get()
            if event is None:
                open_lanes -= 1
                continue
            figures[event['run']].add(event)
            if 'failure' in event:
                bar.write(f'{event["run"]}: {event["failure"]}')
            total = [f.kinds.total() for f in figures.values()]
            equal = [f.equal for f in figures.values()]
            bar.set_postfix_str(f'{sum(total)} interrupts, {sum(equal)} equal', False)
            bar.update(int(min(time.monotonic(), end) - begun) - bar.n)
    for lane in lanes:
        lane.join()
    return report(args, runs, figures, root, (time.monotonic() - begun) / 60)


def report(
    args: argparse.Namespace,
    runs: tuple[Run, ...],
    figures: dict[str, Figures],
    root: Path,
    minutes: float,
) -> int:
    """Prints the table and writes it. Returns 1 if a promise did not hold."""
    about = dict(
        command=shlex.join(['python', 'tools/soak.py', *sys.argv[1:]]),
        commit=commit(),
        date=time.strftime('%Y-%m-%d'),
        machine=machine(),
        lanes=args.lanes,
        seed=args.seed,
        minutes=minutes,
        kills=sum(f.kinds.total() for f in figures.values()),
        equal=sum(f.equal for f in figures.values()),
        failures=sum(len(f.failures) for f in figures.values()),
    )
    table = Table(*HEAD)
    for row in rows(runs, figures):
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 110)  # a file takes long lines too
    console.print(table)
    details = {name: vars(found) for name, found in figures.items()}
    write_atomic(root / 'soak.json', json.dumps(about | dict(runs=details), indent=2))
    if args.page:
        write_page(REPO / PAGE, as_markdown(about, runs, figures))
    print(f'{about["kills"]} interrupts, {about["equal"]} results equal, ', end='')
    print(f'{about["failures"]} failures; the figures are in {root / "soak.json"}')
    return int(about['failures'] > 0 or not about['equal'])


if __name__ == '__main__':
    sys.exit(main())

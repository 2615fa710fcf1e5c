"""Starts a run as a fork or a process, interrupts it, and waits for its end."""

import atexit
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .runs import REPO, Run

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

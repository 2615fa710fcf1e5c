"""Interrupts trainings, few-shot runs, encodings and inference again and again.

Each run is killed (SIGKILL at a random time or within a write, SIGTERM) or gets a full
disk, and the same command goes on. Its result must equal that of an uninterrupted run
bit by bit, little work may be done twice, and no process may be left behind.

The uninterrupted runs are processes of their own. The interrupted ones are forks of
this process, which has imported the libraries: that saves most of each start.
"""

import os

# Sums depend on it, and threads do not survive fork.
os.environ['OMP_NUM_THREADS'] = '1'

import argparse
import importlib
import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dsnet_mm.environment import commit, machine
from dsnet_mm.files import check_new, write_atomic
from dsnet_mm.progress import progress_bar
from soaking.cases import Soak
from soaking.interrupts import KINDS
from soaking.runs import REPO, RUNS, TOLERANCE, Run, prepare

PAGE = 'docs/reliability.md'
MARKS = '<!-- soak: begin -->\n', '<!-- soak: end -->\n'
LIBRARIES = (
    *(f'mmdet.{part}' for part in ('models', 'datasets', 'evaluation', 'engine')),
    *(f'mmpretrain.{part}' for part in ('models', 'datasets', 'evaluation', 'engine')),
    *('mmdet.visualization', 'mmpretrain.visualization', 'mmpretrain.structures'),
    *('open_clip', 'matplotlib.pyplot', 'dsnet_mm.few_shot.cli'),
    *('dsnet_mm.inference.__main__', 'dsnet_mm.engine.launch', 'dsnet_mm.engine.fsdp'),
)


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
        f'{about["lanes"]} runs at the same time.\n'
    )
    for run in runs:
        if 'difference' in figures[run.name].reference:
            gap = figures[run.name].reference['difference']
            text += (
                f'\nWeights of two processes differ from those of one by {gap:.1e} at '
                f'most after each epoch (limit {TOLERANCE:.0e}).\n'
            )
    return text


def around_table() -> tuple[str, str]:
    """Returns what is before and behind the table of the page.

    Raises:
        ValueError: If the page has no marks.
    """
    begin, end = MARKS
    head, _, rest = (REPO / PAGE).read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f'{PAGE} has no lines {begin.strip()} and {end.strip()}')
    return head + begin, end + tail


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
        if args.page:
            around_table()
    except (FileExistsError, ValueError) as error:
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
        before, behind = around_table()
        text = as_markdown(about, runs, figures)
        write_atomic(REPO / PAGE, f'{before}{text}{behind}')
    print(f'{about["kills"]} interrupts, {about["equal"]} results equal, ', end='')
    print(f'{about["failures"]} failures; the figures are in {root / "soak.json"}')
    return int(about['failures'] > 0 or not about['equal'])


if __name__ == '__main__':
    sys.exit(main())

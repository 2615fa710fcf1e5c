"""Run the rows of a measured table, and write the tables of the documentation.

python tools/reproduce.py nuclei                  # what is missing of a table
python tools/reproduce.py nuclei dsnet_dsfpn      # what is missing of a row
python tools/reproduce.py nuclei dsnet_dsfpn --seed 0 --check
python tools/reproduce.py all                     # what is missing of all tables
python tools/reproduce.py nuclei --time           # on an idle machine
python tools/reproduce.py --report                # tables and plots of pages, no run
python tools/reproduce.py scenes --report         # prints a table, no run

A run that is killed goes on where it was when the command is given again. Each finished
run is a file in results/. With --check a run that is recorded already is run again,
with as many threads, and fails if it differs by more than the tolerance of its table.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.environment import commit
from dsnet_mm.files import write_atomic
from evidence.runs import RESULTS, check_cost, runs_of
from evidence.tables import TABLES, is_sweep


def print_tables() -> None:
    """Prints the tables, their rows, and how many of the runs are recorded."""
    shown = Table('table', 'row', 'recorded runs')
    for name, table in TABLES.items():
        for row in table.rows:
            files = list((RESULTS / name).glob(f'{row.name}-seed*.json'))
            shown.add_row(name, row.name, f'{len(files)} of {row.seeds}')
    Console().print(shown)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'table', nargs='?', choices=[*TABLES, 'all'], help='default: list the tables'
    )
    parser.add_argument('rows', nargs='*', help='rows of the table (default: all)')
    parser.add_argument('--seed', type=int, action='append', help='only this seed')
    parser.add_argument(
        '--check', action='store_true', help='run again and compare with the record'
    )
    parser.add_argument(
        '--time', action='store_true', help='time the rows in turns and record that'
    )
    parser.add_argument(
        '--turns', type=int, default=10, help='turns of --time (default: 10)'
    )
    parser.add_argument(
        '--report', action='store_true', help='only write the pages, or print a table'
    )
    parser.add_argument('--data-root', help='folder of the data')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/evidence'),
        help='folder of checkpoints and logs (default: work_dirs/evidence)',
    )
    args = parser.parse_args(argv)
    with user_errors(parser):
        if args.report:
            report(args.table)
            return
        if not args.table:
            print_tables()
            return
        names = list(TABLES) if args.table == 'all' else [args.table]
        if args.data_root and args.table == 'all':
            raise ValueError('--data-root moves the data of one table; name the table')
        known = [row.name for name in names for row in TABLES[name].rows]
        if unknown := set(args.rows) - set(known):
            raise ValueError(
                f'{args.table} has no rows {sorted(unknown)}; it has {known}'
            )
        if args.time and args.rows:
            raise ValueError(
                f'--time times all rows of a table in turns; leave out {args.rows}'
            )
        for name in names:
            if TABLES[name].comparable and not is_sweep(name):
                check_cost(name)
        if args.time:
            from evidence.timing import time_rows

            for name in names:
                timing = time_rows(name, args.turns, args.data_root)
                path = RESULTS / name / 'timing.json'
                write_atomic(path, json.dumps(timing, indent=1) + '\n')
            report()
            return
    run_rows(parser, args, names)


def run_rows(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str]
) -> None:
    """Runs what is missing of tables, or again what is recorded.

    Args:
        parser: Reports errors of the user.
        args: The parsed arguments.
        names: Names of the tables.
    """
    folder = args.work_dir / f'check-{commit()}' if args.check else args.work_dir
    settings = (args.rows, args.seed, folder.resolve(), args.data_root)
    runs = [run for name in names for run in runs_of(name, *settings)]
    runs.sort(key=lambda run: run.seed)  # stable: the order of tables and rows stays
    missing = [run for run in runs if run.file.exists() == args.check]
    done = 'is not recorded' if args.check else 'is recorded already'
    for run in runs:
        if run not in missing:
            print(f'{run.table} {run.row.name}, seed {run.seed}, {done}.')
    failed = False
    for i, run in enumerate(missing, 1):
        print(
            f'Run {i} of {len(missing)}: {run.table} {run.row.name}, seed {run.seed}',
            flush=True,
        )
        with user_errors(parser):
            try:
                result = run.execute()
            except RuntimeError as error:
                sys.exit(f'reproduce: {error}')
        if args.check:
            from evidence.report import compare

            recorded = json.loads(run.file.read_text())
            try:
                print(compare(run.table, run.row, run.seed, result, recorded))
            except ValueError as error:
                print(error)
                failed = True
        else:
            run.record(result)
            report()
    if failed:
        sys.exit(1)


def report(table: str | None = None) -> None:
    """Writes the tables and plots of the documentation, or prints one table."""
    from evidence.report import read_results, section, write_pages

    if table in TABLES:
        print(section(table, read_results(table)))
    else:
        print('Written:', *write_pages())


if __name__ == '__main__':
    # As with Ctrl-C, the training stops with this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()

"""Times DS-Net-S* beside its peers: backbones, necks and Mask R-CNN.

    python tools/analysis_tools/benchmark.py --record    # all that docs/speed.md shows
    python tools/analysis_tools/benchmark.py --report    # only writes the page
    python tools/analysis_tools/benchmark.py --mode inference --size 224 800x1344
    python tools/analysis_tools/benchmark.py --network detector --dtype float32
    python tools/analysis_tools/benchmark.py --against ../old_checkout --turns 15

All rows of a table run in turns, so that a disturbance of the machine meets all of
them. The first turn is dropped. The table shows medians. "x ours" is the time of a row
over that of ours, the median over the turns.

Weights are random. A backbone returns the maps of four stages. A neck gets the maps of
DS-Net-S. A training step is forward, and backward of the mean of the outputs (of
detectors: of the losses), without an optimizer and dropout. In bfloat16 it runs under
autocast; inference has bfloat16 weights. For inference the batch norms of DS-Net and
ResNet-50 are folded. Peers with spatial convolutions run in the faster of two memory
formats. measure/detectors.py says how all detectors get the same work.

"Ours" has at most 128 global tokens (--max-global-tokens), "uncapped" has no maximum.
The backbones come from timm, FPN and the other detectors from mmdet.

Memory is the most that one call holds besides weights and input, measured in a process
of its own, after a first call. Gradients of the weights belong to it.

--record needs an idle machine for an hour. It writes results/speed.csv panel by
panel, so a run that was killed goes on when the command is given again at the same
commit. Then it writes the tables and the plot of docs/speed.md.

--against compares two commits. It times DS-Net of this checkout and of another one,
in alternating turns of two processes. Each turn gives a ratio of the two times; the
table shows their median. Check the other commit out into a folder of its own (git
worktree add ../old COMMIT) and compile its operators there (python setup.py build_ext
--inplace). One that has no max_global_tokens needs --max-global-tokens 0.
"""

import argparse
import re
import sys
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dsnet_mm.environment import commit, find_installed, machine
from dsnet_mm.version import __version__

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/

from measure import page
from measure.against import check_checkout, compare, table_of_comparison
from measure.calls import MAX_GLOBAL_TOKENS
from measure.memory import peak_in_child
from measure.rows import (
    DTYPES,
    KEYS,
    NAMES,
    TIMM,
    Panel,
    measure,
    prepare,
    table_of,
    timm,
)
from measure.turns import turns_in

SECONDS = 30.0
"""Least time of a panel of --record after its first calls."""


def parse_size(text: str) -> tuple[int, int]:
    """'224' or '800x1344' -> (H, W)."""
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 32:
        raise argparse.ArgumentTypeError(
            f'a size is one number or HEIGHTxWIDTH, of 32 pixels at least, got {text!r}'
        )
    return size


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    networks, modes, dtypes = list(NAMES), list(page.MODES), list(DTYPES)
    add('--record', action='store_true', help='measures all that docs/speed.md shows')
    add('--report', action='store_true', help='writes docs/speed.md from the record')
    add('--network', nargs='+', choices=networks, default=['backbone'])
    add('--mode', nargs='+', choices=modes, default=modes)
    sizes = [(224, 224), page.DETECTION]
    add('--size', nargs='+', type=parse_size, default=sizes, help='H or HxW')
    add('--dtype', nargs='+', choices=dtypes, default=dtypes)
    models = dict(choices=KEYS, metavar='MODEL', default=KEYS)
    add('--models', nargs='+', **models, help=f'of {", ".join(KEYS)}; default: all')
    add('--batch', type=int, help='default: 8, and 1 above 224x224')
    cap_help = f'of ours, 0 for no maximum; default: {MAX_GLOBAL_TOKENS}'
    add('--max-global-tokens', type=int, default=MAX_GLOBAL_TOKENS, help=cap_help)
    add('--threads', type=int, default=torch.get_num_threads())
    add('--device', choices=['cpu', 'cuda'], default='cpu')
    add('--turns', type=int, default=7, help='the first is dropped')
    add('--no-memory', action='store_true', help='does not measure memory')
    add('--against', type=Path, metavar='CHECKOUT', help='compares with this checkout')
    args = parser.parse_args(argv)
    least = dict(batch=1, threads=1, turns=2, max_global_tokens=0)
    for name, low in least.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            option = f'--{name.replace("_", "-")}'
            parser.error(f'{option} is {low} at least, got {getattr(args, name)}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device is cuda, but PyTorch finds no GPU.')
    if args.against:
        args.against = args.against.resolve()
        for name in ('models', 'network', 'record'):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f'--against times DS-Net alone; leave out --{name}.')
        if args.turns < 3:
            parser.error(f'--against takes 3 --turns at least, got {args.turns}.')
        try:
            check_checkout(args.against)
        except (FileNotFoundError, ValueError) as error:
            parser.error(f'--against: {error}')
    if 'detector' in args.network and (
        args.dtype != ['float32'] or args.batch not in (None, 1)
    ):
        parser.error('--network detector takes --dtype float32 and one image.')
    missing = [name for name in ('timm', 'mmdet') if not find_installed(name)]
    if missing and (args.record or args.network != ['backbone']):
        parser.error(f'{" and ".join(missing)} must be installed.')
    if args.record and commit().endswith('+'):
        parser.error('--record measures a commit, and there are changes; commit them.')
    if timm is None:
        args.models = [key for key in args.models if key not in TIMM]
        if not args.models:
            parser.error('All of --models come from timm: pip install timm.')
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 132)
    cuda = args.device == 'cuda'
    packages = {name: find_installed(name) for name in ('timm', 'mmdet')}
    facts = dict(
        threads=args.threads,
        machine=torch.cuda.get_device_name() if cuda else machine()['processor'],
        torch=torch.__version__,
        **{name: found and found.version for name, found in packages.items()},
        dsnet_mm=__version__,
        commit=commit(),
        date=date.today().isoformat(),
    )
    batch = {(224, 224): args.batch or 8}
    cap, device = args.max_global_tokens or None, args.device
    panels = [
        Panel(mode, size, dtype, batch.get(size, args.batch or 1), cap, device, network)
        for network in dict.fromkeys(args.network)
        for mode in dict.fromkeys(args.mode)
        for size in dict.fromkeys(args.size)
        for dtype in dict.fromkeys(args.dtype)
    ]
    if args.record:
        kept = [
            row
            for row in page.read_csv()
            if all(row.get(name) == str(facts[name]) for name in page.SAME)
        ]
        run(page.panels_of_page(), facts, console, kept)
    elif args.against:
        rows = compare(args.against, panels, args.turns, args.threads)
        count = sum(1 if panel.training else 2 for panel in panels)
        try:
            rows = list(track(rows, 'Comparing', count, console=console))
        except RuntimeError as error:
            sys.exit(f'benchmark: {error}')
        console.print(table_of_comparison(rows))
    elif not args.report:
        run(panels, facts, console, [], args)
    if args.record or args.report:
        for file in page.write_page():
            console.print(f'Written: {file}')
    else:
        console.print(', '.join(f'{key} {value}' for key, value in facts.items()))


def run(
    panels: list[Panel],
    facts: dict,
    console: Console,
    results: list[dict],
    args: argparse.Namespace | None = None,
) -> None:
    """Measures panels, and prints the table of each.

    Args:
        panels: The panels. Those that ``results`` has are left out.
        facts: What all rows share.
        console: Shows the tables.
        results: Rows that were measured before. New ones are added.
        args: The command line, or None for the record of the page, which is written
            after each panel.
    """
    if timm is None:
        console.print(
            'The peers are left out, since timm is missing: pip install timm.'
        )
    done = {page.panel_of(row) for row in results}
    bar = dict(console=console, transient=True)
    for panel in panels:
        common = panel._asdict() | dict(size='{}x{}'.format(*panel.size))
        if page.panel_of(common) in done:
            console.print(f'{panel.title}: is measured already.')
            continue
        keys = args.models if args else page.keys_of(panel)
        turns = range(args.turns) if args else turns_in(SECONDS)
        found = measure(panel, keys, track(turns, panel.title, **bar))
        memory = not args.no_memory if args else page.has_memory(panel)
        for result in found:
            if memory and result['error'] is None:
                row = (result['key'], result['layout'], panel)
                try:
                    result['peak_mib'] = peak_in_child(prepare, *row)
                except Exception as error:  # one that fails must not end the run
                    console.print(f'No memory of {result["model"]}: {error}')
            results.append(common | result | facts)
        console.print(table_of(found, panel))
        if args is None:
            page.write_csv(results)


if __name__ == '__main__':
    main()

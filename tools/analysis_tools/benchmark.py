"""Times DS-Net-S* beside a plain transcription of its public code and its peers.

    python tools/analysis_tools/benchmark.py --out work_dirs/benchmark
    python tools/analysis_tools/benchmark.py --mode inference --size 224 --profile
    python tools/analysis_tools/benchmark.py --against ../old_checkout --turns 15

All rows of a table run in turns, so that a disturbance of the machine meets all of
them. The first turn is dropped. The table shows medians.

Square images are classified: backbone, average pooling, a linear layer. For other
images only the backbone runs, and returns the maps of four stages. Weights are
random. A training step is forward, and backward of the mean of the outputs, without
an optimizer. In bfloat16 it runs under autocast; inference has bfloat16 weights. For
inference the batch norms of DS-Net and ResNet-50 are folded. Peers with spatial
convolutions are timed in both memory formats, and the faster one is shown.

- GFLOP: two for each multiply-add of convolutions, matrix products and attention. A
  training step counts three times its forward, because every product has two
  gradients. What is computed again to save memory is not counted.
- floor: the time of these operations at the rate of a large matrix product, which is
  timed in the same turns.
- memory: the most that one call holds besides weights and input, measured in a
  process of its own, after a first call. Gradients of the weights belong to it.

The peers come from timm (pip install timm). Without it they are left out.

--against compares two commits. It times DS-Net of this checkout and of another one,
in alternating turns of two processes. Each turn gives a ratio of the two times; the
table shows their median. Check the other commit out into a folder of its own (git
worktree add ../old COMMIT) and compile its operators there (python setup.py build_ext
--inplace).
"""

import argparse
import csv
import re
import sys
from datetime import date
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dsnet_mm.environment import machine
from dsnet_mm.files import write_atomic
from dsnet_mm.version import __version__

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/

from measure.against import check_checkout, compare, table_of_comparison
from measure.memory import peak_in_child
from measure.plot import draw
from measure.rows import (
    DTYPES,
    MODELS,
    Panel,
    Row,
    measure,
    prepare,
    rows_of,
    table_of,
    timm,
)


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
    add, modes, dtypes = parser.add_argument, ['inference', 'training'], list(DTYPES)
    add('--mode', nargs='+', choices=modes, default=modes)
    sizes = [(224, 224), (800, 1344)]
    add('--size', nargs='+', type=parse_size, default=sizes, help='H or HxW')
    add('--dtype', nargs='+', choices=dtypes, default=dtypes)
    models = dict(choices=MODELS, metavar='MODEL')
    add('--models', nargs='+', **models, help=f'of {", ".join(MODELS)}; default: all')
    add('--batch', type=int, help='default: 8, and 1 for sides that differ')
    add('--compile', action='store_true', help='adds rows with torch.compile')
    add('--threads', type=int, default=torch.get_num_threads())
    add('--device', choices=['cpu', 'cuda'], default='cpu')
    add('--turns', type=int, default=7, help='the first is dropped')
    drop_help = 'of DS-Net in training; default: that of the public code'
    add('--attn-drop-rate', type=float, default=0.1, help=drop_help)
    add('--profile', action='store_true', help='shows the operators of DS-Net')
    add('--no-memory', action='store_true', help='does not measure memory')
    add('--out', type=Path, help='folder for benchmark.csv and benchmark.png')
    add('--overwrite', action='store_true', help='replaces these')
    add('--against', type=Path, metavar='CHECKOUT', help='compares with this checkout')
    args = parser.parse_args(argv)
    for name, least in (('batch', 1), ('threads', 1), ('turns', 2)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f'--{name} is {least} at least, got {getattr(args, name)}.')
    if not 0 <= args.attn_drop_rate < 1:
        parser.error(f'--attn-drop-rate lies in [0, 1), got {args.attn_drop_rate}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device is cuda, but PyTorch finds no GPU.')
    if args.against:
        args.against = args.against.resolve()
        for name in ('models', 'compile', 'profile', 'out'):
            if getattr(args, name):
                parser.error(f'--against times DS-Net alone; leave out --{name}.')
        if args.turns < 3:
            parser.error(f'--against takes 3 --turns at least, got {args.turns}.')
        try:
            check_checkout(args.against)
        except (FileNotFoundError, ValueError) as error:
            parser.error(f'--against: {error}')
    args.models = args.models or list(MODELS)
    if timm is None:
        args.models = [key for key in args.models if MODELS[key][1] is None]
        if not args.models:
            parser.error('All of --models come from timm: pip install timm.')
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f'--out is a folder, but {args.out} is a file.')
    for name in ('benchmark.csv', 'benchmark.png'):
        if args.out and (args.out / name).exists() and not args.overwrite:
            parser.error(f'{args.out / name} exists; replace it by --overwrite.')
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    panels = [
        Panel(
            mode,
            size,
            dtype,
            args.batch or (8 if size[0] == size[1] else 1),
            args.attn_drop_rate if mode == 'training' else 0.0,
            args.device,
        )
        for mode in dict.fromkeys(args.mode)
        for size in dict.fromkeys(args.size)
        for dtype in dict.fromkeys(args.dtype)
    ]
    cuda = args.device == 'cuda'
    facts = dict(
        turns=args.turns,
        threads=args.threads,
        device=args.device,
        machine=torch.cuda.get_device_name() if cuda else machine()['processor'],
        torch=torch.__version__,
        timm=getattr(timm, '__version__', None),
        dsnet_mm=__version__,
        date=date.today().isoformat(),
    )
    console = Console(width=None if sys.stdout.isatty() else 132)
    if args.against:
        rows = compare(args.against, panels, args.turns, args.threads)
        count = sum(1 if panel.training else 2 for panel in panels)
        try:
            rows = list(track(rows, 'Comparing', count, console=console))
        except RuntimeError as error:
            sys.exit(f'benchmark: {error}')
        console.print(table_of_comparison(rows))
    else:
        run(args, panels, facts, console)
    console.print(', '.join(f'{key} {value}' for key, value in facts.items()))


def run(
    args: argparse.Namespace, panels: list[Panel], facts: dict, console: Console
) -> None:
    """Prints the table of each panel, and writes all rows if asked for."""
    if timm is None:
        console.print(
            'The peers are left out, since timm is missing: pip install timm.'
        )
    if 'deit_s' in args.models and not all(panel.classifies for panel in panels):
        console.print('DeiT-S has no pyramid: it is left out where sides differ.')
    bar = dict(console=console, transient=True)
    results: list[dict] = []
    for panel in panels:
        rows = rows_of(panel, args.models, args.compile)
        found = measure(panel, rows, track(range(args.turns), panel.title, **bar))
        for row, result in track(found.items(), f'{panel.title}: memory', **bar):
            if result['error'] is None and not args.no_memory:
                try:
                    result['peak_mib'] = peak_in_child(prepare, row, panel)
                except Exception as error:  # one that fails must not end the run
                    console.print(f'No memory of {row.name}: {error}')
            common = panel._asdict() | dict(size='{}x{}'.format(*panel.size))
            results.append(common | result | facts)
        console.print(table_of(list(found.values()), panel))
        if args.profile and 'ours' in args.models:
            console.print(f'Operators of {Row("ours").name}:')
            print(profile(panel))
        if args.out:
            text = StringIO(newline='')
            writer = csv.DictWriter(text, results[0])
            writer.writeheader()
            writer.writerows(results)
            write_atomic(args.out / 'benchmark.csv', text.getvalue())
    if args.out:
        draw(results, args.out / 'benchmark.png')
        console.print(f'Written: {args.out}')


def profile(panel: Panel) -> str:
    """Returns PyTorch's table of the operators of DS-Net, the slowest first."""
    call = prepare(Row('ours'), panel)
    call()
    with torch.profiler.profile() as profiler:
        call()
    used = f'self_{"device" if panel.device == "cuda" else "cpu"}_time_total'
    return profiler.key_averages().table(used, 20, max_name_column_width=40)


if __name__ == '__main__':
    main()

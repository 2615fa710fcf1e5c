"""Times the compiled co-attention against PyTorch's attention.

The shapes are those of DS-Net-S. SDPA means two calls of PyTorch's attention with
the copies they need. Both run in turns, so that a disturbance of the machine meets
both. The table shows medians, and the time of SDPA over that of the compiled op.

    python tools/analysis_tools/benchmark_ops.py --threads 2 --dtype bfloat16
    python tools/analysis_tools/benchmark_ops.py --device cuda --out ops_cuda.csv
"""

import argparse
import csv
import sys
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsnet_mm.files import write_atomic
from dsnet_mm.ops import native, sdpa_co_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/

from measure.turns import time_in_turns, turns_in

HEADS = (1, 2, 5, 8)
WIDTH = 32  # channels of a head
GLOBAL_FACTORS = (8, 4, 2, 2)
INPUTS = ((8, (224, 224)), (1, (800, 1344)))  # batch, image
FREED_BYTES = 31 * 2**20  # just below the upper limit of glibc's mmap threshold
DTYPES = dict(
    cpu=['float32', 'bfloat16'],
    cuda=['float32', 'float16', 'bfloat16'],
)
PATHS = dict(native=native.co_attention, sdpa=sdpa_co_attention)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', choices=list(DTYPES), default='cpu')
    parser.add_argument(
        '--dtype',
        nargs='+',
        choices=[*DTYPES['cuda'], 'float64'],
        help='(default: all of cuda, float32 and bfloat16 of cpu)',
    )
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument(
        '--seconds', type=float, default=2.0, help='spent on each line of the table'
    )
    parser.add_argument(
        '--layout',
        choices=['tokens', 'map'],
        default='tokens',
        help='memory format of the local projection: channels-last (tokens), or '
        'channels-first (map), which both have to copy',
    )
    parser.add_argument(
        '--out', type=Path, metavar='FILE.csv', help='write the table to this file too'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    args = parser.parse_args(argv)
    args.dtype = args.dtype or DTYPES[args.device]
    if args.out and args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} exists; replace it by --overwrite')
    why_not = native.why_not_cuda() if args.device == 'cuda' else native.WHY_NOT
    if why_not:
        parser.error(f'there is nothing to compare: {why_not}')
    return args


def stage_inputs(
    stage: int,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Returns the local and global projections of a stage, (N, L, 3C)."""
    height, width = (side // 2 ** (stage + 2) for side in size)
    factor = GLOBAL_FACTORS[stage]
    length, rest = height * width, (height // factor) * (width // factor)
    channels = 3 * HEADS[stage] * WIDTH
    options = dict(dtype=dtype, device=device)
    if layout == 'map':
        local = torch.randn(batch, channels, length, **options).transpose(1, 2)
    else:
        local = torch.randn(batch, length, channels, **options)
    global_ = torch.randn(batch, rest, channels, **options)
    return local.requires_grad_(), global_.requires_grad_()


def time_passes(inputs: tuple[Tensor, Tensor], heads: int, seconds: float) -> dict:
    """Returns the median seconds of forward and backward of each path."""
    grads = [torch.randn(*x.shape[:2], x.shape[2] // 3).to(x) for x in inputs]
    outs = {}

    def forward(name: str) -> None:
        outs[name] = PATHS[name](*inputs, heads)

    def backward(name: str) -> None:
        torch.autograd.grad(outs.pop(name), inputs, grads)

    # Freeing this block raises glibc's mmap threshold, as in a process that runs a
    # network. Otherwise the system clears new pages for every output.
    torch.empty(FREED_BYTES, dtype=torch.uint8).fill_(0)
    passes = [(name, call) for name in PATHS for call in (forward, backward)]
    calls = {(name, call): partial(call, name) for name, call in passes}
    times = time_in_turns(calls, turns_in(seconds), inputs[0].device.type)
    return {
        name: [median(times[name, call]) for call in (forward, backward)]
        for name in PATHS
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.device == 'cuda':
        machine = torch.cuda.get_device_name()
    else:
        machine = f'{args.threads} threads, {torch.backends.cpu.get_cpu_capability()}'
    table = Table(
        'dtype',
        'input',
        'stage',
        'tokens',
        *(f'{which} native, ms' for which in ('forward', 'backward')),
        *(f'{which} SDPA / native' for which in ('forward', 'backward')),
        'GFLOP/s',
        title=f'DS-Net-S, torch {torch.__version__}, {machine}, {args.layout}',
    )
    for dtype in args.dtype:
        for batch, size in INPUTS:
            for stage, heads in enumerate(HEADS):
                inputs = stage_inputs(
                    stage, batch, size, getattr(torch, dtype), args.device, args.layout
                )
                times = time_passes(inputs, heads, args.seconds)
                (forward, backward), sdpa = times['native'], times['sdpa']
                length, rest = (x.shape[1] for x in inputs)
                flops = 8 * batch * length * rest * heads * WIDTH
                table.add_row(
                    dtype,
                    f'{batch} x {size[0]} x {size[1]}',
                    str(stage + 1),
                    f'{length}, {rest}',
                    f'{forward * 1e3:.2f}',
                    f'{backward * 1e3:.2f}',
                    f'{sdpa[0] / forward:.2f}',
                    f'{sdpa[1] / backward:.2f}',
                    f'{flops * 3.5 / (forward + backward) / 1e9:.0f}',
                )
    Console(width=132).print(table)
    if args.out:
        text = StringIO(newline='')
        writer = csv.writer(text)
        writer.writerow([*(str(column.header) for column in table.columns), 'on'])
        cells = (column.cells for column in table.columns)
        writer.writerows([*row, table.title] for row in zip(*cells, strict=True))
        write_atomic(args.out, text.getvalue())


if __name__ == '__main__':
    main()

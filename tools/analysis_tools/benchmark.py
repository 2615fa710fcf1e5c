"""Times DS-Net-S* beside a plain transcription of its public code and its peers.

All rows of a table run in turn, so that whatever else the machine does meets all
of them; the first turn is dropped, and the table shows medians.

    python tools/analysis_tools/benchmark.py --out work_dirs/benchmark
    python tools/analysis_tools/benchmark.py --mode inference --size 224 --profile

Pictures with equal sides are classified: backbone, average pooling, a linear layer.
For others the backbones alone run, and return the maps of four stages. Weights are
random. A training step is forward and backward of the outputs' mean, without an
optimizer; in bfloat16 it runs under autocast, where inference has bfloat16 weights.
For inference the batch norms of DS-Net and ResNet-50 are folded. Peers with spatial
convolutions are timed contiguous and channels-last, and the better one is shown.

- GFLOP: two for each multiply-add of convolutions, matrix products and attention
  that the row needs; a training step counts three times its forward, every product
  having two gradients. What is computed again to save memory is not counted.
- floor: the time of these at the rate of a large matrix product, which is timed in
  the same turns. A row reaches floor / time of it.
- memory: the most that one call holds at a time besides weights and input, measured
  in a process of its own, after a first call. Gradients of the weights belong to it.

The peers come from timm (pip install timm); without it they are left out.
"""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from io import BytesIO, StringIO
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch._inductor.config
from mmcv.cnn import fuse_conv_bn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsnet_mm.cli.complexity import count_complexity
from dsnet_mm.files import write_atomic
from dsnet_mm.models import DSNet
from dsnet_mm.models.fuse import fuse_for_inference
from dsnet_mm.models.layers.reference import reference_net
from dsnet_mm.version import __version__

try:
    import timm
except ImportError:
    timm = None

# Label, name in timm, and ImageNet-1k top-1 at 224 of each model's own paper, but
# for ResNet-50 (weights IMAGENET1K_V1 of torchvision). DeiT-S is not distilled.
MODELS = {
    'ours': ('DS-Net-S*', None, 82.3),
    'plain': ('plain DS-Net-S*', None, 82.3),
    'resnet50': ('ResNet-50', 'resnet50', 76.1),
    'deit_s': ('DeiT-S', 'deit_small_patch16_224', 79.8),
    'swin_t': ('Swin-T', 'swin_tiny_patch4_window7_224', 81.3),
    'convnext_t': ('ConvNeXt-T', 'convnext_tiny', 82.1),
    'pvt_v2_b2': ('PVTv2-B2', 'pvt_v2_b2', 82.0),
    'twins_pcpvt_s': ('Twins-PCPVT-S', 'twins_pcpvt_small', 81.2),
}
SPATIAL = ('resnet50', 'convnext_t', 'pvt_v2_b2', 'twins_pcpvt_s')  # layout matters
COLUMNS = dict(  # of the table: head and format
    ms=('ms', '.1f'),
    pictures_per_s=('pictures/s', '.1f'),
    times_ours=('x ours', '.2f'),
    peak_mib=('memory, MiB', '.0f'),
    gflop=('GFLOP', '.1f'),
    floor_ms=('floor, ms', '.1f'),
    floor_fraction=('floor / time', '.0%'),
)
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
PRODUCT = (4096, 2048, 2048)  # rows, inner, columns


class Panel(NamedTuple):
    """What the rows of one table have in common."""

    mode: str
    size: tuple[int, int]
    dtype: str
    batch: int

    @property
    def training(self) -> bool:
        return self.mode == 'training'

    @property
    def classifies(self) -> bool:
        return self.size[0] == self.size[1]

    @property
    def title(self) -> str:
        height, width = self.size
        return f'{self.mode}, {self.batch} x {height}x{width}, {self.dtype}'

    @property
    def work(self) -> int:
        """Roughly proportional to the time of a call, for the progress bar."""
        return self.batch * self.size[0] * self.size[1] * (3 if self.training else 1)


class Row(NamedTuple):
    """A model in one form."""

    key: str
    fused: bool = True  # at inference
    compiled: bool = False
    layout: str = 'contiguous'

    @property
    def name(self) -> str:
        name = MODELS[self.key][0] + ('' if self.fused else ', not fused')
        return name + (', compiled' if self.compiled else '')


class DSNetS(nn.Module):
    """DS-Net-S*, as this package or as the public code computes it.

    Args:
        plain: Whether to run the plain transcription of the public code.
        classifies: Whether to return logits, otherwise the maps of all stages.
        attn_drop_rate: Dropout of the attention weights.
    """

    def __init__(self, plain: bool, classifies: bool, attn_drop_rate: float) -> None:
        super().__init__()
        self.plain = plain
        out_indices = (3,) if classifies else (0, 1, 2, 3)
        self.backbone = DSNet(
            'small', attn_drop_rate=attn_drop_rate, out_indices=out_indices
        )
        self.head = nn.Linear(512, 1000) if classifies else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = reference_net(self.backbone, x) if self.plain else self.backbone(x)
        return maps if self.head is None else self.head(maps[-1].mean((2, 3)))


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
    models = dict(choices=MODELS, default=list(MODELS), metavar='MODEL')
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
    # Name and layout of a row, in the child process that measures its memory.
    add('--peak-of', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (('batch', 1), ('threads', 1), ('turns', 2)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f'--{name} is {least} at least, got {getattr(args, name)}.')
    if not 0 <= args.attn_drop_rate < 1:
        parser.error(f'--attn-drop-rate lies in [0, 1), got {args.attn_drop_rate}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device is cuda, but PyTorch finds no GPU.')
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


def rows_of(args: argparse.Namespace, panel: Panel) -> list[Row]:
    rows = []
    for key in dict.fromkeys(args.models):
        if key == 'deit_s' and not panel.classifies:
            continue
        layouts = ['contiguous', 'channels_last'][: 2 if key in SPATIAL else 1]
        rows += [Row(key, layout=layout) for layout in layouts]
        if key == 'ours' and not panel.training:
            rows.append(Row(key, fused=False))
        if args.compile and key != 'plain':
            rows += [Row(key, compiled=True, layout=layout) for layout in layouts]
    return rows


def build(row: Row, panel: Panel, attn_drop_rate: float) -> nn.Module:
    """Builds a model, on the CPU and not compiled.

    Args:
        row: The model.
        panel: What it is to do.
        attn_drop_rate: Dropout of the attention weights, in DS-Net.

    Returns:
        The model, in the mode and of the dtype that it runs with.
    """
    torch.manual_seed(0)
    timm_name = MODELS[row.key][1]
    if timm_name is None:
        net = DSNetS(row.key == 'plain', panel.classifies, attn_drop_rate)
    else:
        options = dict(pretrained=False, drop_path_rate=0.0)
        if row.key in ('deit_s', 'swin_t'):
            options['img_size'] = panel.size
        if not panel.classifies:
            options['features_only'] = True
            if row.key == 'resnet50':  # whose stem is a stage to timm
                options['out_indices'] = (1, 2, 3, 4)
        net = timm.create_model(timm_name, **options)
    net.train(panel.training)
    if not panel.training and row.fused and row.key in ('ours', 'resnet50'):
        net = (fuse_for_inference if row.key == 'ours' else fuse_conv_bn)(net)
    return net.to(torch.float32 if panel.training else DTYPES[panel.dtype])


@cache
def multiply_adds(key: str, size: tuple[int, int]) -> int:
    """Counts those of a model's forward for one picture."""
    net = build(Row(key, fused=False), Panel('inference', size, 'float32', 1), 0.0)
    # Fake tensors have shapes and are not computed. In float64 our network does
    # without oneDNN's fused operators, which do not take them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        picture = torch.empty(1, 3, *size, dtype=torch.float64)
        return count_complexity(net.double(), picture).multiply_adds


def prepare(
    row: Row, panel: Panel, args: argparse.Namespace
) -> tuple[nn.Module, Callable[[], None]]:
    """Returns a model and what is timed of it."""
    net = build(row, panel, args.attn_drop_rate)
    channels_last = row.layout == 'channels_last'
    layout = torch.channels_last if channels_last else torch.preserve_format
    net.to(args.device, memory_format=layout)
    dtype = next(net.parameters()).dtype
    pictures = torch.randn(panel.batch, 3, *panel.size)
    pictures = pictures.to(args.device, dtype, memory_format=layout)
    if row.compiled:
        # Inductor then packs the weights, as ours are when they are fused.
        torch._inductor.config.freezing = not panel.training
        net = torch.compile(net, dynamic=False)

    @torch.inference_mode()
    def infer() -> None:
        net(pictures)

    def train() -> None:
        net.zero_grad(set_to_none=True)
        mixed = panel.dtype == 'bfloat16'
        with torch.autocast(args.device, torch.bfloat16, enabled=mixed):
            outs = net(pictures)
        outs = [outs] if isinstance(outs, Tensor) else outs
        sum(out.float().mean() for out in outs).backward()

    return net, train if panel.training else infer


def time_calls(
    calls: dict[Row | str, Callable[[], object]],
    args: argparse.Namespace,
    advance: Callable[[], None],
) -> tuple[dict[Row | str, float], dict[Row | str, str]]:
    """Times calls in turn.

    Args:
        calls: What to time.
        args: Number of turns, of which the first warms up, and device.
        advance: Is told of each call that is over.

    Returns:
        The median seconds of each call, and for those that fail the reason.
    """
    synchronize = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    times, errors = {row: [] for row in calls}, {}
    for _ in range(args.turns):
        for row, call in calls.items():
            if row not in errors:
                try:
                    synchronize()
                    start = time.perf_counter()
                    call()
                    synchronize()
                    times[row].append(time.perf_counter() - start)
                except Exception as error:  # one that fails must not end the run
                    errors[row] = one_line(error)
            advance()
    return {row: median(times[row][1:]) for row in calls if row not in errors}, errors


def one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:200]


def measure(
    panel: Panel, args: argparse.Namespace, advance: Callable[[], None]
) -> tuple[list[dict], Table | None]:
    """Returns the rows of a panel, without memory, and a profile if asked for."""
    torch.compiler.reset()
    calls, errors = {}, {}
    for row in rows_of(args, panel):
        try:
            _, calls[row] = prepare(row, panel, args)
        except Exception as error:  # a size that a peer does not take
            errors[row] = one_line(error)
    options = dict(dtype=DTYPES[panel.dtype], device=args.device)
    rows, inner, columns = PRODUCT
    a, b = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    c = torch.empty(rows, columns, **options)
    calls['product'] = lambda: torch.mm(a, b, out=c)
    seconds, failed = time_calls(calls, args, advance)
    errors |= failed
    peak = 2 * rows * inner * columns / seconds['product']

    best: dict[str, Row] = {}
    for row in sorted(rows_of(args, panel), key=lambda row: seconds.get(row, 1e9)):
        best.setdefault(row.name, row)
    ours = seconds.get(Row('ours'))
    results = []
    for name in dict.fromkeys(row.name for row in rows_of(args, panel)):
        row = best[name]
        result = dict(model=name, **dict.fromkeys(COLUMNS), layout=row.layout)
        result |= dict(error=errors.get(row), top1=MODELS[row.key][2])
        if row in seconds:
            flop = 2 * panel.batch * multiply_adds(row.key, panel.size)
            flop *= 3 if panel.training else 1
            result |= dict(
                ms=seconds[row] * 1e3,
                pictures_per_s=panel.batch / seconds[row],
                times_ours=seconds[row] / ours if ours else None,
                gflop=flop / 1e9,
                floor_ms=flop / peak * 1e3,
                floor_fraction=flop / peak / seconds[row],
            )
        results.append(result | dict(peak_gflops=peak / 1e9))
    return results, profile(calls[Row('ours')], args) if args.profile and ours else None


def profile(call: Callable[[], object], args: argparse.Namespace) -> Table:
    """Returns the operators of a call that take more than 1 % of its time."""
    field = f'self_{"device" if args.device == "cuda" else "cpu"}_time_total'
    with torch.profiler.profile() as profiler:
        call()
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    table = Table('operator', 'calls', 'ms', 'share', title='Operators of DS-Net-S*')
    for event in events:
        used = getattr(event, field)
        if used > 0.01 * total:
            cells = str(event.count), f'{used / 1e3:.2f}', f'{used / total:.1%}'
            table.add_row(event.key[:60], *cells)
    return table


def peak_here(panel: Panel, args: argparse.Namespace) -> float:
    """Returns the MiB that a call of the row ``args.peak_of`` holds at most."""
    (row,) = (r for r in rows_of(args, panel) if [r.name, r.layout] == args.peak_of)
    net, call = prepare(row, panel, args)
    call()  # leaves what stays: kernels, threads, compiled code
    net.zero_grad(set_to_none=True)
    if args.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def mib(field: str) -> float:
        status = Path('/proc/self/status').read_text()
        return int(re.search(rf'{field}:\s+(\d+)', status)[1]) / 1024

    # Not ru_maxrss: it cannot start anew, and on Linux it begins with what the
    # process that started this one held.
    Path('/proc/self/clear_refs').write_text('5')
    before = mib('VmRSS')
    call()
    return mib('VmHWM') - before


def peak_in_child(result: dict, panel: Panel, args: argparse.Namespace) -> float:
    """Runs :func:`peak_here` in a process of its own.

    Raises:
        RuntimeError: If it fails.
    """
    options = {
        '--peak-of': [result['model'], result['layout']],
        '--mode': [panel.mode],
        '--size': ['{}x{}'.format(*panel.size)],
        '--dtype': [panel.dtype],
        '--batch': [panel.batch],
        '--models': args.models,
        '--threads': [args.threads],
        '--device': [args.device],
        '--attn-drop-rate': [args.attn_drop_rate],
    }
    command = [sys.executable, __file__, *['--compile'] * args.compile]
    for flag, values in options.items():
        command += [flag, *map(str, values)]
    # Freed tensors go back to the system at once, so that every one is seen.
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    if child.returncode:
        status = f'the process ended with status {child.returncode}'
        raise RuntimeError((child.stderr.splitlines() or [status])[-1])
    return float(child.stdout.splitlines()[-1])


def table_of(results: list[dict], panel: Panel) -> Table:
    product = f'a matrix product reaches {results[0]["peak_gflops"]:.0f} GFLOP/s'
    table = Table('model', title=f'{panel.title}; {product}')
    for head, _ in COLUMNS.values():
        table.add_column(head, justify='right')
    table.add_column('layout, or why not')
    for result in results:
        cells = [
            '-' if result[field] is None else format(result[field], spec)
            for field, (_, spec) in COLUMNS.items()
        ]
        table.add_row(result['model'], *cells, result['error'] or result['layout'])
    return table


def draw(results: list[dict], path: Path) -> None:
    """Plots accuracy against time of the classifiers, an axis for each dtype."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels: dict[str, list[dict]] = {}
    for row in results:
        height, width = row['size'].split('x')
        shown = row['ms'] is not None and 'not fused' not in row['model']
        if shown and row['mode'] == 'inference' and height == width:
            title = f'inference, {row["batch"]} x {row["size"]}, {row["dtype"]}'
            panels.setdefault(title, []).append(row)
    if not panels:
        return
    figsize = max(6.5 * len(panels), 8), 5.2
    figure, axes = plt.subplots(
        1, len(panels), figsize=figsize, squeeze=False, layout='constrained'
    )
    machine = '{machine}, {device}, {threads} threads, torch {torch}'.format(
        **results[0]
    )
    sources = 'accuracies of the papers at 224 (ResNet-50: torchvision, v1 recipe)'
    figure.suptitle(f'{machine}\n{sources}', fontsize=9)
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        ax.set(xscale='log', xlabel='ms a batch', ylabel='ImageNet-1k top-1, %')
        ax.set_title(title, fontsize=10)
        for row in rows:
            face = 'white' if 'compiled' in row['model'] else color_of(row)
            point = row['ms'], row['top1']
            ax.scatter(*point, 36, face, edgecolors=color_of(row), zorder=3)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(0.1)
        ax.grid(alpha=0.3)
    figure.draw_without_rendering()  # lays the axes out
    for ax, rows in zip(axes[0], panels.values(), strict=True):
        name_points(ax, rows)
    picture = BytesIO()
    figure.savefig(picture, dpi=150)
    write_atomic(path, picture.getvalue())
    plt.close(figure)


def color_of(row: dict) -> str:
    return 'tab:red' if 'DS-Net' in row['model'] else 'tab:blue'


def name_points(ax, rows: list[dict]) -> None:
    """Writes the models' names where they cover neither points nor each other."""
    from matplotlib.transforms import Affine2D, Bbox

    to_points = ax.figure.dpi_scale_trans.inverted() + Affine2D().scale(72)
    frame = ax.get_window_extent().transformed(to_points)
    to_points = ax.transData + to_points
    xys = to_points.transform([(row['ms'], row['top1']) for row in rows])
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in xys]
    for row, (x, y) in zip(rows, xys, strict=True):
        width = 5 * len(row['model'])  # enough for letters of 8 points
        for step in range(60):  # to the right and to the left, farther and farther
            dx = (9 if step % 4 < 2 else -9 - width) + step // 15
            dy = 6 * (step // 4) * (1 if step % 2 else -1)
            box = Bbox.from_bounds(x + dx, y + dy - 6, width, 12)
            inside = all(frame.contains(*corner) for corner in box.get_points())
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        ax.annotate(
            row['model'],
            (row['ms'], row['top1']),
            (dx, dy),
            textcoords='offset points',
            va='center',
            color=color_of(row),
            fontsize=8,
            arrowprops=dict(arrowstyle='-', lw=0.4, relpos=(float(dx < 0), 0.5)),
        )


def machine_name(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    match = cpuinfo.exists() and re.search(r'model name\s*: (.*)', cpuinfo.read_text())
    return match[1] if match else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    panels = [
        Panel(mode, size, dtype, args.batch or (8 if size[0] == size[1] else 1))
        for mode in dict.fromkeys(args.mode)
        for size in dict.fromkeys(args.size)
        for dtype in dict.fromkeys(args.dtype)
    ]
    if args.peak_of:
        print(peak_here(panels[0], args))
        return
    console = Console(width=None if sys.stdout.isatty() else 132)
    if timm is None:
        console.print(
            'The peers are left out, since timm is missing: pip install timm.'
        )
    if 'deit_s' in args.models and not all(panel.classifies for panel in panels):
        console.print('DeiT-S has no pyramid: it is left out where sides differ.')
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    facts = dict(
        turns=args.turns,
        threads=args.threads,
        device=args.device,
        machine=machine_name(args.device),
        torch=torch.__version__,
        timm=getattr(timm, '__version__', None),
        dsnet_mm=__version__,
        date=date.today().isoformat(),
    )
    results: list[dict] = []
    columns = (TextColumn('{task.description}'), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        calls = [args.turns * (len(rows_of(args, panel)) + 1) for panel in panels]
        works = [panel.work * n for panel, n in zip(panels, calls, strict=True)]
        task = progress.add_task('', total=sum(works))
        for i, panel in enumerate(panels):
            progress.update(task, description=panel.title)
            rows, operators = measure(
                panel, args, partial(progress.advance, task, panel.work)
            )
            progress.update(task, completed=sum(works[: i + 1]))
            common = panel._asdict() | dict(size='{}x{}'.format(*panel.size))
            common['attn_drop_rate'] = args.attn_drop_rate if panel.training else 0.0
            for row in rows:
                if row['error'] is None and not args.no_memory:
                    text = f'{panel.title}: memory of {row["model"]}'
                    progress.update(task, description=text)
                    try:
                        row['peak_mib'] = peak_in_child(row, panel, args)
                    except RuntimeError as error:
                        console.print(f'No memory of {row["model"]}: {error}')
                results.append(common | row | facts)
            console.print(table_of(rows, panel))
            if operators:
                console.print(operators)
            if args.out:
                text = StringIO(newline='')
                writer = csv.DictWriter(text, results[0])
                writer.writeheader()
                writer.writerows(results)
                write_atomic(args.out / 'benchmark.csv', text.getvalue())
    console.print(', '.join(f'{key} {value}' for key, value in facts.items()))
    if args.out:
        draw(results, args.out / 'benchmark.png')
        console.print(f'Written: {args.out}')


if __name__ == '__main__':
    main()

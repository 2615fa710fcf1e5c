"""The rows of a table: DS-Net, DS-FPN and Mask R-CNN with them, and their peers."""

from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

import torch
from mmcv.cnn import fuse_conv_bn
from rich.table import Table
from torch import Tensor, nn

from dsnet_mm.models import DSFPN, DSNet, fuse_for_inference
from dsnet_mm.models.reference import reference_net

from .calls import build_ds_net, make_call
from .turns import time_call, time_in_turns

try:
    import timm
except ImportError:
    timm = None

CHANNELS = (64, 128, 320, 512)  # of the maps of DS-Net-S
NAMES = {
    'backbone': {
        'ours': 'DS-Net-S*',
        'uncapped': 'DS-Net-S*, uncapped',
        'plain': 'plain DS-Net-S*, uncapped',
        'swin_t': 'Swin-T',
        'resnet50': 'ResNet-50',
        'convnext_t': 'ConvNeXt-T',
        'pvt_v2_b2': 'PVTv2-B2',
    },
    'neck': {'ours': 'DS-FPN', 'uncapped': 'DS-FPN, uncapped', 'fpn': 'FPN'},
    'detector': {
        'ours': 'DS-Net-S*, DS-FPN',
        'uncapped': 'DS-Net-S*, DS-FPN, uncapped',
        'swin_t': 'Swin-T, FPN',
        'resnet50': 'ResNet-50, FPN',
    },
}
KEYS = list(dict.fromkeys(key for names in NAMES.values() for key in names))
TIMM = dict(
    resnet50='resnet50',
    swin_t='swin_tiny_patch4_window7_224',
    convnext_t='convnext_tiny',
    pvt_v2_b2='pvt_v2_b2',
)
# In each panel the faster memory format of these is timed.
SPATIAL = ('resnet50', 'convnext_t', 'pvt_v2_b2', 'fpn')
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
PARTS = ('backbone', 'neck', 'rpn', 'roi')
COLUMNS = dict(  # header and format of each measured field
    ms=('ms', '.1f'),
    us_per_pixel=('us a pixel', '.3f'),
    times_ours=('x ours', '.2f'),
    peak_mib=('memory, MiB', '.0f'),
    **{f'{part}_ms': (f'{part}, ms', '.1f') for part in PARTS},
)


class Panel(NamedTuple):
    """What the rows of one table have in common."""

    mode: str
    size: tuple[int, int]
    dtype: str
    batch: int
    cap: int | None = None  # max_global_tokens of ours
    device: str = 'cpu'
    network: str = 'backbone'

    @property
    def training(self) -> bool:
        return self.mode == 'training'

    @property
    def title(self) -> str:
        height, width = self.size
        return (
            f'{self.network}, {self.mode}, {self.batch} x {height}x{width}, '
            f'{self.dtype}'
        )


class Row(NamedTuple):
    """A network, in a memory format."""

    key: str
    layout: str = 'contiguous'


class PlainDSNet(DSNet):
    """DS-Net as its public code computes it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return reference_net(self, x)


class Neck(nn.Module):
    """A neck whose maps are channels-first: RoIAlign of MMCV ignores strides."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [out.contiguous() for out in self.neck(maps)]


def build(key: str, panel: Panel) -> nn.Module:
    """Builds a backbone or a neck in its mode and dtype, on the CPU."""
    torch.manual_seed(0)
    cap = panel.cap if key == 'ours' else None
    if key == 'fpn':
        from mmdet.models.necks import FPN

        net = Neck(FPN(list(CHANNELS), 256, 5))
    elif panel.network == 'neck':
        net = Neck(DSFPN(CHANNELS, 256, 5, max_global_tokens=cap))
    elif key in TIMM:
        options = dict(img_size=panel.size) if key == 'swin_t' else {}
        if key == 'resnet50':  # whose stem is a stage to timm
            options['out_indices'] = (1, 2, 3, 4)
        options |= dict(features_only=True, drop_path_rate=0.0)
        net = timm.create_model(TIMM[key], **options)
    else:
        net = build_ds_net(cap, PlainDSNet if key == 'plain' else DSNet)
    net.train(panel.training)
    if not panel.training and key in ('ours', 'uncapped', 'resnet50'):
        net = (fuse_conv_bn if key == 'resnet50' else fuse_for_inference)(net)
    return net.to(torch.float32 if panel.training else DTYPES[panel.dtype])


def parts_of(row: Row, panel: Panel) -> dict[str, Callable[[], None]]:
    """Returns the calls that are timed: one, or those of the parts of a detector."""
    if panel.network == 'detector':
        from .detectors import make_parts

        return make_parts(row.key, panel)
    net = build(row.key, panel)
    dtype = next(net.parameters()).dtype
    channels_last = row.layout == 'channels_last'
    layout = torch.channels_last if channels_last else torch.preserve_format
    net.to(panel.device, memory_format=layout)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(panel.device, dtype, memory_format=layout)

    height, width = panel.size
    if panel.network == 'backbone':
        inputs = random(panel.batch, 3, height, width)
    else:
        if row.key != 'fpn':  # the format in which DS-Net returns its maps
            layout = torch.channels_last
        inputs = [
            random(panel.batch, channels, height // s, width // s)
            for channels, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
        ]
        inputs = [x.requires_grad_(panel.training) for x in inputs]
    return {'': make_call(net, inputs, panel.training, panel.dtype == 'bfloat16')}


def prepare(row: Row, panel: Panel) -> Callable[[], None]:
    """Returns the call of a row, of all its parts."""
    parts = parts_of(row, panel).values()

    def call() -> None:
        for part in parts:
            part()

    return call


def choose_format(row: Row, panel: Panel) -> tuple[Row, dict[str, Callable]]:
    """Returns a row in its faster memory format, and its calls, which have run."""
    formats = ['contiguous', 'channels_last']
    two = row.key in SPATIAL and panel.network != 'detector'
    found = []
    for layout in formats[: 1 + two]:
        candidate = row._replace(layout=layout)
        parts = parts_of(candidate, panel)
        for part in parts.values():
            part()
        seconds = time_call(parts[''], panel.device) if two else 0.0
        found.append((seconds, candidate, parts))
    return min(found, key=lambda item: item[0])[1:]


def measure(panel: Panel, keys: Iterable[str], turns: Iterable) -> dict[Row, dict]:
    """Times the rows of a table in turns.

    Args:
        panel: The table.
        keys: Its rows. Those that its network does not have are left out.
        turns: One item for each turn. The first turn is dropped.

    Returns:
        The result of each row in its faster memory format, without its memory.
    """
    calls, errors, chosen = {}, {}, []
    for key in NAMES[panel.network]:
        if key not in keys:
            continue
        row = Row(key)
        try:
            row, parts = choose_format(row, panel)
        except Exception as error:  # a size that a peer does not take, or no memory
            text = f'{type(error).__name__}: {" ".join(str(error).split())}'
            errors[row] = text[:200]
        else:
            calls |= {(row, part): call for part, call in parts.items()}
        chosen.append(row)
    times: dict[Row, dict[str, list[float]]] = {}
    for (row, part), seconds in time_in_turns(calls, turns, panel.device).items():
        times.setdefault(row, {})[part] = seconds
    # Of each row the seconds of a turn, which are those of all its parts.
    seconds = {row: add(parts.values()) for row, parts in times.items()}
    ours = seconds.get(Row('ours'))
    results = {}
    for row in chosen:
        results[row] = result = dict(
            model=NAMES[panel.network][row.key],
            **dict.fromkeys(COLUMNS),
            layout=row.layout,
            error=errors.get(row),
            turns=len(seconds.get(row, [])),
        )
        if row in seconds:
            result['ms'] = 1e3 * median(seconds[row])
            pixels = panel.batch * panel.size[0] * panel.size[1]
            result['us_per_pixel'] = 1e3 * result['ms'] / pixels
            if ours:
                ratios = [a / b for a, b in zip(seconds[row], ours, strict=True)]
                result['times_ours'] = median(ratios)
            for part in PARTS if panel.network == 'detector' else ():
                both = [s for name, s in times[row].items() if name.startswith(part)]
                result[f'{part}_ms'] = 1e3 * median(add(both))
    return results


def add(times: Iterable[list[float]]) -> list[float]:
    """Returns the sum of times in each turn."""
    return [sum(turn) for turn in zip(*times, strict=True)]


def table_of(results: list[dict], panel: Panel) -> Table:
    """Returns the table of a panel's results for the terminal."""
    table = Table('model', title=panel.title)
    shown = [key for key in COLUMNS if any(row[key] is not None for row in results)]
    for key in shown:
        table.add_column(COLUMNS[key][0], justify='right')
    table.add_column('memory format, or error')
    for row in results:
        cells = [
            '-' if row[key] is None else format(row[key], COLUMNS[key][1])
            for key in shown
        ]
        table.add_row(row['model'], *cells, row['error'] or row['layout'])
    return table

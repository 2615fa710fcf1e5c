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

CHANNELS = {4: 64, 8: 128, 16: 320, 32: 512}  # of DS-Net-S, by stride
NAMES = {
    'backbone': {
        'ours': 'DS-Net-S*',
        'uncapped': 'uncapped',
        'plain': 'plain',
        'swin_t': 'Swin-T',
        'resnet50': 'ResNet-50',
        'convnext_t': 'ConvNeXt-T',
        'pvt_v2_b2': 'PVTv2-B2',
    },
    'neck': {'ours': 'DS-FPN', 'uncapped': 'uncapped', 'fpn': 'FPN'},
    'detector': {
        'ours': 'DS-Net-S*, DS-FPN',
        'uncapped': 'uncapped',
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

    def formats(self, key: str) -> list[str]:
        """Returns the memory formats of which the faster one of a row is timed."""
        if self.network == 'neck' and key != 'fpn':  # as its blocks take them
            return ['channels_last']
        both = self.network != 'detector' and key in SPATIAL
        return ['preserve_format', 'channels_last'][: 1 + both]

    @property
    def title(self) -> str:
        size = '{} x {}x{}'.format(self.batch, *self.size)
        return f'{self.network}, {self.mode}, {size}, {self.dtype}'


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

        net = Neck(FPN([*CHANNELS.values()], 256, 5))
    elif panel.network == 'neck':
        net = Neck(DSFPN([*CHANNELS.values()], 256, 5, max_global_tokens=cap))
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


def parts_of(key: str, layout: str, panel: Panel) -> dict[str, Callable[[], None]]:
    """Returns the calls that are timed: one, or those of the parts of a detector.

    Args:
        key: Key of ``NAMES``.
        layout: Memory format of weights and input.
        panel: The table.
    """
    if panel.network == 'detector':
        from .detectors import make_parts

        return make_parts(key, panel)
    net, memory = build(key, panel), dict(memory_format=getattr(torch, layout))
    net.to(panel.device, **memory)
    options = dict(dtype=next(net.parameters()).dtype, device=panel.device)
    height, width = panel.size
    if panel.network == 'backbone':
        inputs = torch.randn(panel.batch, 3, height, width, **options).to(**memory)
    else:
        shapes = [(c, height // s, width // s) for s, c in CHANNELS.items()]
        inputs = [torch.randn(panel.batch, *shape, **options) for shape in shapes]
        inputs = [x.to(**memory).requires_grad_(panel.training) for x in inputs]
    return {'': make_call(net, inputs, panel.training, panel.dtype == 'bfloat16')}


def prepare(key: str, layout: str, panel: Panel) -> Callable[[], None]:
    """Returns the call of all parts of a row; arguments as :func:`parts_of`."""
    parts = parts_of(key, layout, panel).values()

    def call() -> None:
        for part in parts:
            part()

    return call


def measure(panel: Panel, keys: Iterable[str], turns: Iterable) -> list[dict]:
    """Times the rows of a table in turns.

    Args:
        panel: The table.
        keys: Its rows. Those that its network does not have are left out.
        turns: One item for each turn. The first turn is dropped.

    Returns:
        The result of each row in its faster memory format, without its memory.
    """
    calls, results = {}, []
    for key in (key for key in NAMES[panel.network] if key in keys):
        result = dict(key=key, model=NAMES[panel.network][key])
        result |= dict.fromkeys((*COLUMNS, 'layout', 'turns', 'error'))
        results.append(result)
        found = []
        try:
            for layout in panel.formats(key):
                found.append((layout, parts_of(key, layout, panel)))
                for part in found[-1][1].values():
                    part()
        except Exception as error:  # a size that a peer does not take, or no memory
            text = f'{type(error).__name__}: {" ".join(str(error).split())}'
            result['error'] = text[:200]
            continue
        if len(found) > 1:
            found.sort(key=lambda item: time_call(item[1][''], panel.device))
        result['layout'], parts = found[0]
        calls |= {(key, part): call for part, call in parts.items()}
    times: dict[str, dict[str, list[float]]] = {}
    for (key, part), seconds in time_in_turns(calls, turns, panel.device).items():
        times.setdefault(key, {})[part] = seconds
    # The seconds of a row in a turn are those of all its parts.
    totals = {key: add(parts.values()) for key, parts in times.items()}
    for result in results:
        if seconds := totals.get(result['key']):
            ms = 1e3 * median(seconds)
            pixels = panel.batch * panel.size[0] * panel.size[1]
            result |= dict(ms=ms, us_per_pixel=1e3 * ms / pixels, turns=len(seconds))
            if ours := totals.get('ours'):
                ratios = [a / b for a, b in zip(seconds, ours, strict=True)]
                result['times_ours'] = median(ratios)
            for part in PARTS if panel.network == 'detector' else ():
                found = times[result['key']].items()
                found = [times for name, times in found if name.startswith(part)]
                result[f'{part}_ms'] = 1e3 * median(add(found))
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
        cells = ['-' if row[k] is None else f'{row[k]:{COLUMNS[k][1]}}' for k in shown]
        table.add_row(row['model'], *cells, row['error'] or row['layout'])
    return table

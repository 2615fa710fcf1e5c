"""The rows of a table: DS-Net in its forms, and its peers from timm."""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from statistics import median
from typing import NamedTuple

import torch
import torch._inductor.config
from mmcv.cnn import fuse_conv_bn
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsnet_mm.models import DSNet, fuse_for_inference
from dsnet_mm.models.reference import reference_net
from dsnet_mm.ops import use_path

from .calls import build_ds_net, make_call
from .complexity import count_complexity
from .turns import time_in_turns

try:
    import timm
except ImportError:
    timm = None

# Label, name in timm, and ImageNet-1k top-1 at 224 from each model's own paper. That
# of ResNet-50 is from torchvision (weights IMAGENET1K_V1). DeiT-S is not distilled.
MODELS = {
    'ours': ('DS-Net-S*', None, 82.3),
    'sdpa': ('DS-Net-S*, PyTorch operators', None, 82.3),  # DSNET_MM_OPS=sdpa
    'plain': ('plain DS-Net-S*', None, 82.3),
    'resnet50': ('ResNet-50', 'resnet50', 76.1),
    'deit_s': ('DeiT-S', 'deit_small_patch16_224', 79.8),
    'swin_t': ('Swin-T', 'swin_tiny_patch4_window7_224', 81.3),
    'convnext_t': ('ConvNeXt-T', 'convnext_tiny', 82.1),
    'pvt_v2_b2': ('PVTv2-B2', 'pvt_v2_b2', 82.0),
    'twins_pcpvt_s': ('Twins-PCPVT-S', 'twins_pcpvt_small', 81.2),
}
# Timed in both memory formats.
SPATIAL = ('resnet50', 'convnext_t', 'pvt_v2_b2', 'twins_pcpvt_s')
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
# Rows, inner size and columns of the matrix product whose rate gives the floor.
PRODUCT = (4096, 2048, 2048)
COLUMNS = dict(  # header and format of each measured field
    ms=('ms', '.1f'),
    images_per_s=('images/s', '.1f'),
    times_ours=('x ours', '.2f'),
    peak_mib=('memory, MiB', '.0f'),
    gflop=('GFLOP', '.1f'),
    floor_ms=('floor, ms', '.1f'),
    floor_fraction=('floor / time', '.0%'),
)


class Panel(NamedTuple):
    """What the rows of one table have in common."""

    mode: str
    size: tuple[int, int]
    dtype: str
    batch: int
    attn_drop_rate: float = 0.0
    device: str = 'cpu'

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


class PlainDSNet(DSNet):
    """DS-Net as its public code computes it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return reference_net(self, x)


def rows_of(panel: Panel, models: Iterable[str], compiled: bool = False) -> list[Row]:
    """Returns the rows of a table, a row for each memory format.

    Args:
        panel: The table. DeiT-S has no pyramid, so it is left out where sides differ.
        models: Keys of ``MODELS``.
        compiled: Whether to add rows with ``torch.compile``.
    """
    rows = []
    for key in dict.fromkeys(models):
        if key == 'deit_s' and not panel.classifies:
            continue
        layouts = ['contiguous', 'channels_last'][: 2 if key in SPATIAL else 1]
        rows += [Row(key, layout=layout) for layout in layouts]
        if key == 'ours' and not panel.training:
            rows.append(Row(key, fused=False))
        if compiled and key not in ('plain', 'sdpa'):
            rows += [Row(key, compiled=True, layout=layout) for layout in layouts]
    return rows


def build(row: Row, panel: Panel) -> nn.Module:
    """Builds the model of a row in its mode and dtype, on the CPU and not compiled."""
    torch.manual_seed(0)
    timm_name = MODELS[row.key][1]
    if timm_name is None:
        backbone_class = PlainDSNet if row.key == 'plain' else DSNet
        net = build_ds_net(panel.classifies, panel.attn_drop_rate, backbone_class)
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
    if not panel.training and row.fused and row.key in ('ours', 'sdpa', 'resnet50'):
        net = (fuse_conv_bn if row.key == 'resnet50' else fuse_for_inference)(net)
    return net.to(torch.float32 if panel.training else DTYPES[panel.dtype])


def prepare(row: Row, panel: Panel) -> Callable[[], None]:
    """Returns the call of a row that is timed."""
    net = build(row, panel)
    channels_last = row.layout == 'channels_last'
    layout = torch.channels_last if channels_last else torch.preserve_format
    net.to(panel.device, memory_format=layout)
    images = torch.randn(panel.batch, 3, *panel.size)
    dtype = next(net.parameters()).dtype
    images = images.to(panel.device, dtype, memory_format=layout)
    if row.compiled:
        # Inductor then packs the weights, as fuse_for_inference does.
        torch._inductor.config.freezing = not panel.training
        net = torch.compile(net, dynamic=False)
    call = make_call(net, images, panel.training, panel.dtype == 'bfloat16')
    return use_path('sdpa')(call) if row.key == 'sdpa' else call


@cache
def multiply_adds(key: str, size: tuple[int, int]) -> int:
    """Counts the multiply-adds of a model's forward for one image."""
    net = build(Row(key, fused=False), Panel('inference', size, 'float32', 1))
    # Fake tensors have shapes and are not computed. In float64 DS-Net does not call
    # the fused operators of oneDNN, which do not take them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, *size, dtype=torch.float64)
        return count_complexity(net.double(), image).multiply_adds


def measure(panel: Panel, rows: list[Row], turns: Iterable) -> dict[Row, dict]:
    """Times the rows of a table in turns.

    Args:
        panel: The table.
        rows: Its rows.
        turns: One item for each turn. The first turn is dropped.

    Returns:
        The result of each row, without its memory. Of the two memory formats of a model
        there is only the faster one.
    """
    torch.compiler.reset()
    calls, errors = {}, {}
    for row in rows:
        try:
            call = prepare(row, panel)
            call()
        except Exception as error:  # a size that a peer does not take, or no memory
            text = f'{type(error).__name__}: {" ".join(str(error).split())}'
            errors[row] = text[:200]
        else:
            calls[row] = call
    height, inner, width = PRODUCT
    options = dict(dtype=DTYPES[panel.dtype], device=panel.device)
    a, b = torch.randn(height, inner, **options), torch.randn(inner, width, **options)
    calls['product'] = partial(
        torch.mm, a, b, out=torch.empty(height, width, **options)
    )
    times = time_in_turns(calls, turns, panel.device)
    seconds = {row: median(measured) for row, measured in times.items()}
    rate = 2 * height * inner * width / seconds['product']

    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: seconds.get(row, math.inf)):
        best.setdefault(row.name, row)
    results = {}
    for name in dict.fromkeys(row.name for row in rows):
        row = best[name]
        results[row] = result = dict(
            model=name,
            **dict.fromkeys(COLUMNS),
            layout=row.layout,
            error=errors.get(row),
            top1=MODELS[row.key][2],
            peak_gflops=rate / 1e9,
        )
        if row in seconds:
            flop = 2 * panel.batch * multiply_adds(row.key, panel.size)
            flop *= 3 if panel.training else 1
            ours = seconds.get(Row('ours'))
            result |= dict(
                ms=seconds[row] * 1e3,
                images_per_s=panel.batch / seconds[row],
                times_ours=seconds[row] / ours if ours else None,
                gflop=flop / 1e9,
                floor_ms=flop / rate * 1e3,
                floor_fraction=flop / rate / seconds[row],
            )
    return results


def table_of(results: list[dict], panel: Panel) -> Table:
    """Returns the table of a panel's results for the terminal."""
    product = f'a matrix product reaches {results[0]["peak_gflops"]:.0f} GFLOP/s'
    table = Table('model', title=f'{panel.title}; {product}')
    for header, _ in COLUMNS.values():
        table.add_column(header, justify='right')
    table.add_column('memory format, or error')
    for result in results:
        cells = [
            '-' if result[field] is None else format(result[field], spec)
            for field, (_, spec) in COLUMNS.items()
        ]
        table.add_row(result['model'], *cells, result['error'] or result['layout'])
    return table

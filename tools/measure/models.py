"""The rows of a table: DS-Net in its forms, and its peers from timm."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch._inductor.config
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsnet_mm.models import DSNet, fuse_for_inference
from dsnet_mm.models.reference import reference_net

from .calls import build_ds_net, make_call
from .complexity import count_complexity

try:
    import timm
except ImportError:
    timm = None

# Label, name in timm, and ImageNet-1k top-1 at 224 from each model's own paper. That
# of ResNet-50 is from torchvision (weights IMAGENET1K_V1). DeiT-S is not distilled.
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
# Timed in both memory formats.
SPATIAL = ('resnet50', 'convnext_t', 'pvt_v2_b2', 'twins_pcpvt_s')
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)


class Settings(NamedTuple):
    """What all tables of a run have in common.

    Attributes:
        models: Keys of ``MODELS``.
        compiled: Whether to add rows with ``torch.compile``.
        device: ``'cpu'`` or ``'cuda'``.
        threads: Number of threads.
        turns: Number of turns. The first is dropped.
        attn_drop_rate: Dropout of DS-Net's attention weights in training.
    """

    models: tuple[str, ...]
    compiled: bool
    device: str
    threads: int
    turns: int
    attn_drop_rate: float


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


class PlainDSNet(DSNet):
    """DS-Net as its public code computes it."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return reference_net(self, x)


def rows_of(panel: Panel, settings: Settings) -> list[Row]:
    """Returns the rows of a table, a row for each memory format."""
    rows = []
    for key in dict.fromkeys(settings.models):
        if key == 'deit_s' and not panel.classifies:
            continue
        layouts = ['contiguous', 'channels_last'][: 2 if key in SPATIAL else 1]
        rows += [Row(key, layout=layout) for layout in layouts]
        if key == 'ours' and not panel.training:
            rows.append(Row(key, fused=False))
        if settings.compiled and key != 'plain':
            rows += [Row(key, compiled=True, layout=layout) for layout in layouts]
    return rows


def build(row: Row, panel: Panel, attn_drop_rate: float) -> nn.Module:
    """Builds the model of a row, on the CPU and not compiled.

    Args:
        row: The model.
        panel: Mode, size and dtype.
        attn_drop_rate: Dropout of DS-Net's attention weights.

    Returns:
        The model in the mode and the dtype in which it runs.
    """
    torch.manual_seed(0)
    timm_name = MODELS[row.key][1]
    if timm_name is None:
        backbone_class = PlainDSNet if row.key == 'plain' else DSNet
        net = build_ds_net(
            panel.classifies, attn_drop_rate, backbone_class=backbone_class
        )
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


def prepare(
    row: Row, panel: Panel, settings: Settings
) -> tuple[nn.Module, Callable[[], None]]:
    """Returns the model of a row and the call that is timed."""
    net = build(row, panel, settings.attn_drop_rate)
    channels_last = row.layout == 'channels_last'
    layout = torch.channels_last if channels_last else torch.preserve_format
    net.to(settings.device, memory_format=layout)
    dtype = torch.float32 if panel.training else DTYPES[panel.dtype]
    images = torch.randn(panel.batch, 3, *panel.size)
    images = images.to(settings.device, dtype, memory_format=layout)
    if row.compiled:
        # Inductor then packs the weights, as fuse_for_inference does.
        torch._inductor.config.freezing = not panel.training
        net = torch.compile(net, dynamic=False)
    autocast = panel.dtype == 'bfloat16'
    return net, make_call(net, images, panel.training, autocast)


@cache
def multiply_adds(key: str, size: tuple[int, int]) -> int:
    """Counts the multiply-adds of a model's forward for one image."""
    net = build(Row(key, fused=False), Panel('inference', size, 'float32', 1), 0.0)
    # Fake tensors have shapes and are not computed. In float64 DS-Net does not call
    # the fused operators of oneDNN, which do not take them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, *size, dtype=torch.float64)
        return count_complexity(net.double(), image).multiply_adds

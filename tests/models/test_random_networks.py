"""Backbones and necks of random sizes: shapes, the reference, the fused form."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.models import DSFPN, DSBlock, DSNet, fuse_for_inference
from dsnet_mm.models.layers import PatchEmbed
from dsnet_mm.models.layers.ds_block import global_size
from dsnet_mm.models.reference import reference_block, reference_net
from tests.conftest import error, trained

pytest.importorskip('hypothesis')
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    derandomize=True, deadline=None, max_examples=30, phases=[Phase.generate]
)
# Share of the global stream, and directions of ISA that go with it.
STREAMS = [
    *[(0.5, isa) for isa in (True, False, 'global_to_local', 'local_to_global')],
    *[(alpha, False) for alpha in (0.0, 0.25, 1.0)],
]
NORMS = [dict(type='BN'), dict(type='GN', num_groups=1)]
sides = st.integers(1, 70)
heads = st.integers(1, 3)
caps = st.none() | st.integers(1, 30)
# Channels of a head are a half of it. Multiples of 64 are packed by the fused form.
units = st.sampled_from([4, 8, 12, 64])


@st.composite
def backbones(draw: st.DrawFn) -> tuple[DSNet, Tensor]:
    """A network with statistics like those of a trained one, and images."""
    torch.manual_seed(0)
    num_heads = [draw(heads) for _ in range(4)]
    alpha, isa = draw(st.sampled_from(STREAMS))
    arch = dict(
        embed_dims=[draw(units) * n for n in num_heads],
        depths=[draw(st.integers(1, 2)) for _ in range(4)],
        num_heads=num_heads,
    )
    net = DSNet(
        arch,
        draw(st.integers(1, 4)),
        alpha=alpha,
        isa=isa,
        intra_scale=draw(st.sampled_from(['both', 'local', 'global'])),
        global_factors=[draw(st.integers(1, 8)) for _ in range(4)],
        max_global_tokens=draw(caps),
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 4.0])),
        out_indices=draw(st.sets(st.integers(0, 3), min_size=1).map(sorted)),
        output_norm=draw(st.booleans()),
        norm_cfg=draw(st.sampled_from(NORMS)),
    )
    channels = net.patch_embeds[0].projection.in_channels
    size = (draw(st.integers(1, 2)), channels, draw(sides), draw(sides))
    return trained(net).double().eval(), torch.randn(size, dtype=torch.float64)


@st.composite
def necks(draw: st.DrawFn) -> tuple[DSFPN, list[Tensor]]:
    """A neck, and the maps of a backbone: each has half the size of the one before."""
    torch.manual_seed(0)
    num_heads, levels = draw(heads), draw(st.integers(1, 4))
    alpha, isa = draw(st.sampled_from(STREAMS))
    channels = [draw(units) * num_heads for _ in range(levels)]
    start = draw(st.integers(0, levels - 1))
    neck = DSFPN(
        channels,
        draw(units) * num_heads,
        num_outs=levels - start + draw(st.integers(0, 2)),
        start_level=start,
        add_extra_convs=draw(
            st.sampled_from([False, 'on_input', 'on_lateral', 'on_output'])
        ),
        relu_before_extra_convs=draw(st.booleans()),
        norm_cfg=draw(st.sampled_from([None, *NORMS])),
        project_first=draw(st.booleans()),
        num_plain_levels=draw(st.integers(0, levels)),
        smooth=draw(st.booleans()),
        num_heads=num_heads,
        alpha=alpha,
        isa=isa,
        max_global_tokens=draw(caps),
    )
    neck.init_weights()
    height, width = draw(sides), draw(sides)
    maps = [
        torch.randn(
            *(2, c, math.ceil(height / 2**i), math.ceil(width / 2**i)),
            dtype=torch.float64,
        )
        for i, c in enumerate(channels)
    ]
    return trained(neck).double().eval(), maps


def reference_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Computes a layer of a neck by the reference."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            x = reference_layer(part, x)
        return x
    if isinstance(layer, DSBlock):
        return reference_block(layer, x)
    if isinstance(layer, PatchEmbed):
        return layer.projection(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
    return layer(x)


def reference_neck(neck: DSFPN, maps: list[Tensor]) -> list[Tensor]:
    """Transcribes Fig. 3 of the paper."""
    sums: list[Tensor] = []
    for level, lateral in reversed(
        list(zip(neck.levels, neck.lateral_convs, strict=True))
    ):
        x = reference_layer(lateral, maps[level])
        if sums:
            x = x + F.interpolate(sums[0], x.shape[2:])
        sums.insert(0, x)
    outs = [conv(x) for conv, x in zip(neck.fpn_convs, sums, strict=True)]
    last = dict(on_input=maps[-1], on_lateral=sums[-1], on_output=outs[-1])
    x = last.get(neck.add_extra_convs, outs[-1])
    for i in range(neck.num_outs - len(outs)):
        if not neck.add_extra_convs:
            x = x[:, :, ::2, ::2]
        else:
            x = x.relu() if i and neck.relu_before_extra_convs else x
            x = reference_layer(neck.extra_convs[i], x)
        outs.append(x)
    return outs


def check(model: nn.Module, x: Tensor | list[Tensor], expected: list[Tensor]) -> None:
    """Compares a network and its fused form, in both precisions."""
    has_blocks = any(isinstance(module, DSBlock) for module in model.modules())
    fused = fuse_for_inference(deepcopy(model)) if has_blocks else model
    assert error(model(x), expected) < 1e-12
    assert error(fused(x), expected) < 1e-12
    single = [m.float() for m in x] if isinstance(x, list) else x.float()
    assert error(fused.float()(single), expected) < 1e-4


@settings(SETTINGS, max_examples=1000)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 16), caps)
def test_number_of_global_tokens(
    height: int, width: int, factor: int, cap: int
) -> None:
    rows, cols = global_size((height, width), factor, cap)
    grid = max(height // factor, 1), max(width // factor, 1)
    if cap is None or grid[0] * grid[1] <= cap:
        assert (rows, cols) == grid
    else:
        assert 1 <= rows <= grid[0] and 1 <= cols <= grid[1]
        # No smaller than one row and one column less than the cap allows.
        assert rows * cols <= cap < (rows + 1) * (cols + 1)


@SETTINGS
@given(backbones())
@torch.no_grad()
def test_backbones(case: tuple[DSNet, Tensor]) -> None:
    net, x = case
    expected = reference_net(net, x)
    for i, out in zip(net.out_indices, expected, strict=True):
        size = (math.ceil(side / 2 ** (i + 2)) for side in x.shape[2:])
        assert out.shape == (len(x), net.embed_dims[i], *size)
    check(net, x, expected)


@SETTINGS
@given(necks())
@torch.no_grad()
def test_necks(case: tuple[DSFPN, list[Tensor]]) -> None:
    neck, maps = case
    expected = reference_neck(neck, maps)
    assert len(expected) == neck.num_outs
    height, width = maps[neck.levels[0]].shape[2:]
    for i, out in enumerate(expected):
        sizes = math.ceil(height / 2**i), math.ceil(width / 2**i)
        assert out.shape[2:] == sizes
    check(neck, maps, expected)

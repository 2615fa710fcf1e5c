from itertools import pairwise

import pytest
import torch

from dsnet_mm.models import DSFPN, DSBlock
from dsnet_mm.models.layers import PatchEmbed

CHANNELS = [16, 32, 48, 64]


def maps(height=64, width=96, batch=2):
    return [
        torch.randn(batch, c, -(-height // s), -(-width // s))
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


def kinds(module):
    return [type(m) for m in module.modules() if isinstance(m, (DSBlock, PatchEmbed))]


def test_modules_and_shapes_of_figure_3():
    """With the levels of RetinaNet: DS-Blocks on C2 to C4, and F5 from C4."""
    neck = DSFPN(CHANNELS, 32, num_outs=4, start_level=1)
    assert [kinds(lateral) for lateral in neck.lateral_convs] == [[DSBlock]] * 3
    assert [kinds(extra) for extra in neck.extra_convs] == [[PatchEmbed, DSBlock]]
    assert neck.extra_convs[0][0].projection.in_channels == CHANNELS[-1]
    outs = neck(maps())
    assert [tuple(o.shape) for o in outs] == [
        (2, 32, 8, 12),
        (2, 32, 4, 6),
        (2, 32, 2, 3),
        (2, 32, 1, 2),
    ]


def test_no_ds_block_at_stride_4_with_the_levels_of_mask_rcnn():
    neck = DSFPN(CHANNELS, 32, num_outs=5)
    assert [kinds(lateral) for lateral in neck.lateral_convs] == [[]] + [[DSBlock]] * 3
    # All global streams have the size of the coarsest level.
    factors = [b.global_factor for b in neck.modules() if isinstance(b, DSBlock)]
    assert factors == [4, 2, 1, 1]


def test_neck_without_ds_blocks_equals_the_fpn_of_mmdet():
    mmdet_necks = pytest.importorskip('mmdet.models.necks')
    torch.manual_seed(0)
    fpn = mmdet_necks.FPN(CHANNELS, 32, num_outs=5).eval()
    neck = DSFPN(
        CHANNELS, 32, num_outs=5, num_plain_levels=4, add_extra_convs=False
    ).eval()
    ours = [
        p for layer in (neck.lateral_convs, neck.fpn_convs) for p in layer.parameters()
    ]
    for mine, theirs in zip(ours, fpn.parameters(), strict=True):
        mine.data.copy_(theirs)
    inputs = maps(70, 90)
    for mine, theirs in zip(neck(inputs), fpn(inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    'options',
    [
        dict(project_first=False),
        dict(isa=False),
        dict(isa=False, alpha=0.25),
        dict(smooth=False),
        dict(num_plain_levels=0),
        dict(add_extra_convs='on_lateral'),
        dict(add_extra_convs='on_output', relu_before_extra_convs=True, num_outs=6),
        dict(add_extra_convs=False),
        dict(norm_cfg=dict(type='GN', num_groups=4), no_norm_on_lateral=True),
        dict(global_factors=(4, 4, 2, 1)),
        dict(start_level=1, end_level=2, num_outs=3),
    ],
    ids=str,
)
def test_every_parameter_has_a_gradient(options):
    torch.manual_seed(0)
    neck = DSFPN(**(dict(in_channels=CHANNELS, out_channels=32, num_outs=5) | options))
    neck.init_weights()
    outs = neck(maps(75, 333))
    assert len(outs) == neck.num_outs
    for finer, coarser in pairwise(outs):
        assert coarser.shape[2] == -(-finer.shape[2] // 2)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    silent = [
        name
        for name, param in neck.named_parameters()
        if param.grad is None or not param.grad.abs().sum() > 0
    ]
    assert not [name for name in silent if not name.endswith('bias')]


@pytest.mark.parametrize(
    ('options', 'facts'),
    [
        (dict(start_level=4), 'start_level=4.*4 levels'),
        (dict(end_level=0, start_level=1), 'end_level=0'),
        (dict(num_outs=3), 'num_outs=3.*4 levels'),
        (dict(add_extra_convs='on_top'), "add_extra_convs .*'on_top'"),
        (dict(global_factors=(2, 1)), 'global_factors.*4'),
        (dict(num_heads=5), 'num_heads=5'),
    ],
    ids=str,
)
def test_bad_arguments(options, facts):
    with pytest.raises(ValueError, match=facts):
        DSFPN(**(dict(in_channels=CHANNELS, out_channels=32, num_outs=5) | options))


@pytest.mark.parametrize('change', ['channels', 'number', 'order'])
def test_maps_of_another_backbone(change):
    neck = DSFPN(in_channels=CHANNELS, out_channels=32, num_outs=5)
    if change == 'channels':
        inputs = [x.repeat(1, 2, 1, 1) for x in maps(32, 64)]
    elif change == 'number':
        inputs = maps(32, 64)[1:]
    else:  # as Swin of timm
        inputs = [x.permute(0, 2, 3, 1) for x in maps(32, 64)]
    with pytest.raises(ValueError) as error:
        neck(inputs)
    for fact in (CHANNELS, [tuple(x.shape) for x in inputs]):
        assert str(list(fact)) in str(error.value)

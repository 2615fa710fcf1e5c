"""The modules of DS-Net against their plain transcription."""

import operator
from copy import deepcopy

import pytest
import torch

from dsnet_mm.models import DSBlock, DSNet, InterScaleAlignment, fuse_for_inference
from dsnet_mm.models.reference import reference_net
from dsnet_mm.ops import feed_forward, resize

from .conftest import TINY, VARIANTS, WIDE, build, error, pictures

SMALL = dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
GN = dict(norm_cfg=dict(type='GN', num_groups=4))


# ------------------------------------------------------------------- equations


def test_compiles_to_one_graph() -> None:
    """In evaluation; test_export.py compiles training steps."""
    torch._dynamo.reset()
    net = build({}, SMALL).float().eval()
    # Everything but inductor, whose first kernel takes minutes to compile.
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    x = pictures(64, 64).float()
    with torch.no_grad():
        assert error(compiled(x), net(x)) < 1e-5


@pytest.mark.parametrize('fused', [False, True], ids=['as built', 'fused'])
def test_exports_to_operators_of_pytorch(fused: bool) -> None:
    net = build({}, SMALL).float().eval()
    if fused:
        fuse_for_inference(net)
    x = pictures(64, 64).float()
    program = torch.export.export(net, (x,))
    for node in program.graph.nodes:
        if node.op == 'call_function' and node.target is not operator.getitem:
            assert node.target.namespace == 'aten', node
    with torch.no_grad():
        assert error(program.module()(x), net(x)) < 1e-5


@pytest.mark.parametrize('grad', [False, True], ids=['no grad', 'grad'])
def test_autocast(grad: bool) -> None:
    net = build({}).eval()
    x = pictures()
    with torch.no_grad():
        exact = net(x)
    net.float()
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        measured, plain = net(x.float()), reference_net(net, x.float())
        # A map in float32, as other backbones give it, is projected in bfloat16.
        local = torch.randn(1, 16, 5, 5)
        assert net.stages[0][0].proj_in(local).dtype == torch.bfloat16
    assert {out.dtype for out in measured} == {torch.bfloat16}
    assert [out.dtype for out in plain] == [out.dtype for out in measured]
    for m, p, e in zip(measured, plain, exact, strict=True):
        assert (m - e).abs().max() <= 2 * (p - e).abs().max()


def test_shapes_are_told_without_computing() -> None:
    net = DSNet(TINY, out_indices=(0, 3)).to('meta')
    first, last = net(torch.empty(1, 3, 64, 96, device='meta'))
    assert first.shape == (1, 16, 16, 24) and last.shape == (1, 64, 2, 3)


def test_block_takes_float32_maps_under_autocast() -> None:
    torch.manual_seed(0)
    block = DSBlock(16, num_heads=2).eval()
    x = torch.randn(2, 16, 9, 11)
    with torch.no_grad():
        exact = block(x)
        with torch.autocast('cpu', torch.bfloat16):
            measured = block(x)
    assert measured.dtype == torch.float32  # the residual stream's
    assert (measured - exact).abs().max() < 0.03 * exact.abs().max()

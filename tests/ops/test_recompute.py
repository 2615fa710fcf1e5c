"""Norms whose outputs the backward computes again."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from dsnet_mm.models import DSNet
from dsnet_mm.models.layers import DSBlock
from dsnet_mm.ops import recomputed

NORMS = (nn.BatchNorm2d(8), nn.GroupNorm(2, 8))


def results(norm: nn.Module, keep: bool = False, spoil: bool = True) -> list[Tensor]:
    """Output and gradients of a norm and a convolution, and the norm's buffers.

    The normalised map is set to zero before the backward if ``spoil``.
    """
    torch.manual_seed(0)
    norm, conv = deepcopy(norm), nn.Conv2d(8, 4, 1)
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with recomputed(norm, x, keep) as y:
        out = conv(y)
    if spoil:
        y.data.zero_()  # not detected by autograd
    out.cos().sum().backward()
    grads = [p.grad for p in (x, *norm.parameters(), *conv.parameters())]
    return [out, *grads, *norm.buffers()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize('norm', NORMS, ids=lambda norm: type(norm).__name__)
def test_the_backward_does_not_read_the_output(norm: nn.Module) -> None:
    expected = results(norm, keep=True, spoil=False)
    assert equal(results(norm), expected)
    assert not equal(results(norm, keep=True), expected)


def test_the_output_is_kept_where_it_cannot_be_computed_again() -> None:
    hooked = deepcopy(NORMS[0])
    hooked.register_forward_hook(lambda norm, inputs, out: 2 * out)
    for norm in (deepcopy(NORMS[0]).eval(), nn.InstanceNorm2d(8), hooked):
        expected = results(norm, keep=True, spoil=False)
        assert equal(results(norm, spoil=False), expected)
        assert not equal(results(norm), expected)


@pytest.mark.parametrize('bfloat16', [False, True])
def test_a_block_has_the_same_gradients(bfloat16: bool) -> None:
    def gradients(keep_norms: bool) -> list[Tensor]:
        torch.manual_seed(0)
        block = DSBlock(64, 1, keep_norms=keep_norms)
        x = torch.randn(2, 64, 6, 7, requires_grad=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            out = block(x)
        out.float().cos().sum().backward()
        return [out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]

    assert equal(gradients(False), gradients(True))


def test_norms_are_kept_under_gradient_checkpointing() -> None:
    for with_cp in (False, True):
        net = DSNet('tiny', with_cp=with_cp)
        assert all(block.keep_norms == with_cp for s in net.stages for block in s)

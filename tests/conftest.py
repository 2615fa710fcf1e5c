"""What several test files share."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor, nn

from dsnet_mm.models import DSNet
from dsnet_mm.ops import native
from dsnet_mm.ops.packing import PACKED_DTYPES

REPO = Path(__file__).resolve().parents[1]

needs_native = pytest.mark.skipif(
    native.WHY_NOT is not None, reason=f'no compiled ops: {native.WHY_NOT}'
)
needs_packing = pytest.mark.skipif(
    torch.float32 not in PACKED_DTYPES, reason='no compiled projections'
)


@pytest.fixture(params=[1, 2, 3], ids='{} threads'.format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with 1, 2 and 3 threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def error(measured: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest error of any tensor, relative to its largest value.

    Or to 1: smaller ones are often sums that cancel, as the gradients of biases
    in front of norms, and have the rounding of their parts.
    """
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1)).item()
        for m, e in zip(measured, expected, strict=True)
    )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a Python of its own, in the repository."""
    return subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, 'PYTHONPATH': str(REPO), **environment},
    )


# ------------------------------------------------------------------- attention

# N, L, G, heads, width of a head: one token, fewer tokens than a vector has
# lanes, more than a panel (64) and a block (72) and multiples of nothing, all
# heads and widths at their extremes, chunks of either stream in backward.
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 7, 5, 3, 8),
    (2, 64, 72, 1, 16),
    (1, 150, 67, 2, 24),
    (1, 49, 196, 5, 32),
    (1, 1100, 40, 1, 40),
    (1, 30, 1300, 2, 64),
    (1, 33, 65, 16, 128),
]
# Not one token with dropout, whose gradients are differences of equal numbers.
SHAPES_AND_DROPOUT = [
    *((shape, 0.0) for shape in SHAPES),
    *((shape, 0.3) for shape in SHAPES[1:]),
]
VIEWS = {
    'channels-first': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'part of the tokens': lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    'every other row': lambda x: torch.stack([x, x], 2)[:, :, 0],
    'expanded': lambda x: x[:1].expand(2, -1, -1),
}
# Relative to the largest value; the backward sums up to 1300 of them.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def streams(n, length, rest, heads, width, dtype=torch.float64, grad=True):
    torch.manual_seed(length * rest)
    local = torch.randn(n, length, 3 * heads * width, dtype=dtype)
    global_ = torch.randn(n, rest, 3 * heads * width, dtype=dtype)
    return local.requires_grad_(grad), global_.requires_grad_(grad)


def seed(number=-(3**39)):
    return torch.tensor([number])


def native_op(local, global_, heads, dropout_p=0.0, at=None):
    """The op itself, with a seed of our own."""
    at = seed() if at is None else at
    return torch.ops.dsnet_mm.co_attention(local, global_, at, heads, dropout_p)[:2]


def outputs_and_gradients(path, local, global_, *args):
    """What ``path`` returns, and the gradients of a weighted sum of it."""
    inputs = [
        None if x is None else x.detach().requires_grad_() for x in (local, global_)
    ]
    outs = path(*inputs, *args)
    weights = [torch.cos(torch.arange(o.numel()).view(o.shape) / 3) for o in outs]
    grads = torch.autograd.grad(
        outs,
        [x for x in inputs if x is not None],
        [w.to(o) for w, o in zip(weights, outs, strict=True)],
    )
    return *outs, *grads


def worst(measured, expected):
    """Largest error of any tensor, relative to its largest value."""
    return max(
        ((m.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item()
        if e.abs().max() > 1e-12
        else (m.double() - e).abs().max().item()
        for m, e in zip(measured, expected, strict=True)
    )


# ------------------------------------------------------------------- networks

TINY = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))
VARIANTS = [
    dict(),
    dict(isa=False),
    dict(isa='global_to_local'),
    dict(isa='local_to_global'),
    dict(intra_scale='local'),
    dict(intra_scale='global'),
    dict(isa=False, alpha=0.0),
    dict(isa=False, alpha=0.25),
    dict(isa=False, alpha=1.0),
    dict(num_heads=4),
    dict(global_factors=(8, 4, 2, 1)),
]
# With numbers of channels that can be packed.
WIDE = dict(embed_dims=(64, 128, 192, 256), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4))


def trained(model: nn.Module) -> nn.Module:
    """Gives norms the statistics and weights that training could end with."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3)
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight)  # negative ones among them
            nn.init.normal_(module.bias)
            module.weight.data[::4] = 1e-9
    return model


def build(options: dict, arch: dict = TINY) -> DSNet:
    torch.manual_seed(0)
    net = DSNet(**(dict(arch=arch, out_indices=(0, 1, 2, 3)) | options))
    return trained(net).double()


def pictures(height: int = 72, width: int = 104) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, height, width, dtype=torch.float64)

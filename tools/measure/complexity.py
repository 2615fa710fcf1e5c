"""Parameters and operations of a network, counted while it runs."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsnet_mm.ops.paths import use_path  # also registers the formula of attention

aten = torch.ops.aten

# PyTorch's own namespaces. Their operators without a formula count as zero.
FREE = ('aten', 'prim', 'prims')

# Operations per output element. Batch norm is left out: it folds into the
# convolution beside it. LayerNorm counts 5, as in fvcore and MMEngine.
ELEMENTWISE = {
    aten.gelu: 1,
    aten.relu: 1,
    aten.silu: 1,
    aten.upsample_bilinear2d: 1,
    aten.upsample_nearest2d: 1,
    aten.native_layer_norm: 5,
}


class Complexity(NamedTuple):
    """What a network holds and what one forward pass does.

    Attributes:
        params: Number of parameters.
        multiply_adds: Multiply-adds of convolutions, matrix products and
            attention; the "FLOPs" of the papers.
        elementwise: Operations of biases, activations, resizing (one per
            element) and LayerNorm (five).
        uncounted: Names of the operators outside ATen that ran and have no
            formula.
    """

    params: int
    multiply_adds: int
    elementwise: int
    uncounted: tuple[str, ...]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.elementwise = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = func._overloadpacket
        first = out[0] if isinstance(out, tuple) else out
        if op in flop_registry:
            self.multiply_adds += flop_registry[op](*args, **kwargs, out_val=out) // 2
            has_bias = op is aten.addmm or (
                op is aten.convolution and args[2] is not None
            )
            self.elementwise += first.numel() * has_bias
        elif op in ELEMENTWISE:
            self.elementwise += ELEMENTWISE[op] * first.numel()
        elif func.namespace not in FREE:
            self.uncounted.add(func.name())
        return out


def count_complexity(model: nn.Module, *inputs: Any) -> Complexity:
    """Runs a model once, in evaluation mode, and counts what it does.

    The operators of this package run as operators of PyTorch meanwhile, so that
    biases and activations inside of them are seen. Give another operator its formula
    by ``torch.utils.flop_counter.register_flop_formula``.

    Args:
        model: The network; its mode is restored afterwards.
        *inputs: Arguments of its ``forward``.

    Returns:
        The counts of this one call.
    """
    training = model.training
    model.eval()
    try:
        with use_path('sdpa'), torch.no_grad(), _Counter() as counter:
            model(*inputs)
    finally:
        model.train(training)
    return Complexity(
        sum(param.numel() for param in model.parameters()),
        counter.multiply_adds,
        counter.elementwise,
        tuple(sorted(counter.uncounted)),
    )

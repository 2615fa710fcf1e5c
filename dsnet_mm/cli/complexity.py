"""Parameters and operations of a network, counted while it runs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

# PyTorch has formulas for all its attention kernels but this one.
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu

# What models/layers/pointwise.py calls. A name, as builds of PyTorch without oneDNN
# have no such operators.
ONEDNN_POINTWISE = 'mkldnn::_convolution_pointwise'

# Of dsnet_mm.ops; they only count where they have been compiled.
RESIZE_ADD = 'dsnet_mm::resize_add_'
DEPTHWISE = 'dsnet_mm::depthwise_conv'
LINEAR = ('dsnet_mm::linear', 'dsnet_mm::linear_')
FFN = ('dsnet_mm::ffn', 'dsnet_mm::ffn_')
MERGE = 'dsnet_mm::merge_'

# Whose other operators count nothing.
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
        elif func.name().startswith(ONEDNN_POINTWISE):
            # Of 1x1 convolutions: x, W, bias, four of geometry and the epilogue,
            # behind what is added if there is something.
            x, _, bias, *rest = args[func._overloadname == 'binary' :]
            self.multiply_adds += out.numel() * x.shape[1]
            self.elementwise += out.numel() * (bias is not None)
            self.elementwise += out.numel() * ('gelu' in rest)
        elif func.name() in LINEAR:
            x, w, bias = args[-3:]
            y = args[0] if out is None else out
            self.multiply_adds += _pixels(x) * w.numel()
            self.elementwise += y.numel() * (bias is not None)
        elif func.name() in FFN:
            x, w1, b1, w2, _ = args[-5:]
            y = args[0] if out is None else out
            self.multiply_adds += _pixels(x) * (w1.numel() + w2.numel())
            self.elementwise += 2 * _pixels(x) * b1.numel() + y.numel()  # GELU, biases
        elif func.name() == MERGE:
            x, f_l, _, w, *_, w_out, w1, b1, w2, _ = args
            weights = [w_out, w1, w2] if w is None else [w, w_out, w1, w2]
            self.multiply_adds += _pixels(x) * sum(map(Tensor.numel, weights))
            self.elementwise += 2 * _pixels(x) * b1.numel() + x.numel()  # as above
            self.elementwise += f_l.numel() * (w is not None)
        elif func.name() == DEPTHWISE:
            self.multiply_adds += 9 * out.numel()
            self.elementwise += out.numel()
        elif func.name() == RESIZE_ADD:
            self.elementwise += args[0].numel()
        elif op is CPU_ATTENTION:
            q, k, v = (x.shape for x in args[:3])
            self.multiply_adds += sdpa_flop_count(q, k, v) // 2
        elif op in ELEMENTWISE:
            self.elementwise += ELEMENTWISE[op] * first.numel()
        elif func.namespace not in FREE:
            self.uncounted.add(func.name())
        return out


def count_complexity(model: nn.Module, *inputs: Any) -> Complexity:
    """Runs a model once, in evaluation mode, and counts what it does.

    Operators that are registered with PyTorch are seen, compiled ones
    included; give a new one its formula by
    ``torch.utils.flop_counter.register_flop_formula``.

    Args:
        model: The network; its mode is restored afterwards.
        *inputs: Arguments of its ``forward``.

    Returns:
        The counts of this one call.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), _Counter() as counter:
        model(*inputs)
    model.train(training)
    return Complexity(
        sum(param.numel() for param in model.parameters()),
        counter.multiply_adds,
        counter.elementwise,
        tuple(sorted(counter.uncounted)),
    )


def _pixels(x: Tensor) -> int:
    """Returns the number of pixels of a map (N, C, H, W), or of tokens (..., C)."""
    return x.numel() // x.shape[1 if x.dim() == 4 else -1]

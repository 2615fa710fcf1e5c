"""Fake kernels and FLOP formulas of the compiled operators.

A fake kernel returns outputs of the right shape without computing them, for
``torch.compile``. A FLOP formula returns twice the number of multiply-adds, for
``torch.utils.flop_counter``.
"""

import torch
from torch import Tensor
from torch.library import register_fake
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from . import native

# ------------------------------------------------------------------ fake kernels


def _attention_outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The output of one stream, and the log-sum-exp of its scores."""
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    n, length, channels = qkv.shape
    out = qkv.new_empty(n, length, channels // 3)
    return out, qkv.new_empty(n, num_heads, length, dtype=dtype)


def _co_attention(local_qkv, global_qkv, seed, num_heads, dropout_p):
    h_l, lse_l = _attention_outputs(local_qkv, num_heads)
    h_g, lse_g = _attention_outputs(global_qkv, num_heads)
    return h_l, h_g, lse_l, lse_g


def _co_attention_backward(grad_local, grad_global, local_qkv, global_qkv, *args):
    return local_qkv.new_empty(local_qkv.shape), global_qkv.new_empty(global_qkv.shape)


def _self_attention(qkv, seed, num_heads, dropout_p):
    return _attention_outputs(qkv, num_heads)


def _self_attention_backward(grad, qkv, *args):
    return qkv.new_empty(qkv.shape)


def _linear(x, w, b):
    """The output of a weight, for a map (N, C, H, W) or tokens (..., C)."""
    shape, is_map = list(x.shape), x.dim() == 4
    outputs = 32 if w.dtype == torch.float32 else 16
    shape[1 if is_map else -1] = w.shape[0] * outputs
    layout = torch.channels_last if is_map else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _ffn_backward(grad: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
    return torch.empty_like(x), *grads


FAKE_KERNELS = {
    'co_attention': _co_attention,
    'co_attention_backward': _co_attention_backward,
    'self_attention': _self_attention,
    'self_attention_backward': _self_attention_backward,
    'residual_conv': lambda x, *args: torch.empty_like(x),
    'ffn': lambda x, w1, b1, w2, b2: _linear(x, w2, b2),
    'ffn_backward': _ffn_backward,
    'linear': _linear,
    'linear_': lambda *args: None,
    'merge_': lambda *args: None,
    'resize_add_': lambda *args: None,
}

# ----------------------------------------------------------------- FLOP formulas


def _numel(shape: torch.Size) -> int:
    return torch.Size(shape).numel()


def _pixels(shape: torch.Size) -> int:
    """Number of pixels of a map (N, C, H, W), or of tokens (..., C)."""
    axis = 1 if len(shape) == 4 else len(shape) - 1
    return _numel([*shape[:axis], *shape[axis + 1 :]])


def _co_attention_flops(local_qkv, global_qkv, *args, **kwargs) -> int:
    """Two directions of two products each."""
    n, length, channels = local_qkv
    return 8 * n * length * global_qkv[1] * (channels // 3)


def _co_attention_backward_flops(grad_local, grad_global, *qkv_etc, **kwargs) -> int:
    """Five products for the forward's two."""
    return _co_attention_flops(*qkv_etc) * 5 // 2


def _self_attention_flops(qkv, *args, **kwargs) -> int:
    return _co_attention_flops(qkv, qkv) // 2


def _self_attention_backward_flops(grad, qkv, *args, **kwargs) -> int:
    return _self_attention_flops(qkv) * 5 // 2


def _projection_flops(x, *weights) -> int:
    return 2 * _pixels(x) * sum(map(_numel, weights))


def _ffn_backward_flops(grad, x, w1, b1, w2, **kwargs) -> int:
    """Four products for the forward's two, and W1 x again."""
    return 2 * _projection_flops(x, w1, w2) + _projection_flops(x, w1)


def _merge_flops(x, f_l, h_l, w, b, w_out, w1, b1, w2, b2, **kwargs) -> int:
    return _projection_flops(x, *([w] if w else []), w_out, w1, w2)


FLOP_FORMULAS = {
    'co_attention': _co_attention_flops,
    'co_attention_backward': _co_attention_backward_flops,
    'self_attention': _self_attention_flops,
    'self_attention_backward': _self_attention_backward_flops,
    'residual_conv': lambda x, *args, **kwargs: 2 * 9 * _numel(x),
    'ffn': lambda x, w1, b1, w2, b2, **kwargs: _projection_flops(x, w1, w2),
    'ffn_backward': _ffn_backward_flops,
    'linear': lambda x, w, b, **kwargs: _projection_flops(x, w),
    'linear_': lambda out, x, w, b, **kwargs: _projection_flops(x, w),
    'merge_': _merge_flops,
    'resize_add_': lambda *args, **kwargs: 0,
}

# PyTorch has formulas for its attention kernels, but not for that of the CPU.
_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_attention_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)
if _cpu_attention not in flop_registry:

    @register_flop_formula(_cpu_attention)
    def _cpu_attention_flops(q, k, v, *args, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    @register_flop_formula(_cpu_attention_backward)
    def _cpu_attention_backward_flops(grad, q, k, v, *args, **kwargs) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)


if native.WHY_NOT is None:
    for _name, _kernel in FAKE_KERNELS.items():
        register_fake(f'dsnet_mm::{_name}', _kernel)
    for _name, _formula in FLOP_FORMULAS.items():
        register_flop_formula(getattr(torch.ops.dsnet_mm, _name))(_formula)

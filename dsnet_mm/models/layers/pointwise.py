"""Projections of pixels: 1x1 convolutions, and the feed-forward network.

Maps are channels-last, so that a 1x1 convolution is one matrix product of the
pixels in memory. On the CPU, large hidden layers cost more in memory traffic
than in arithmetic; what is here keeps them in the cache.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, '_linear_pointwise'
)
_DTYPES = [torch.float32]
if _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # AVX-512, say
    _DTYPES.append(torch.bfloat16)


def to_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C): what a channels-last map has in memory."""
    return x.permute(0, 2, 3, 1)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """1x1 convolution, plus a map.

    Args:
        x: Map of shape (N, C_in, H, W).
        weight: Weight of shape (C_out, C_in, 1, 1) or (C_out, C_in).
        bias: Bias of shape (C_out,), or None.
        add: Map of shape (N, C_out, H, W) added to the result, or None.

    Returns:
        Map of shape (N, C_out, H, W), channels-last like ``x``.
    """
    autocast = torch.is_autocast_enabled('cpu')
    if autocast or torch.is_grad_enabled() or not _runs_on_onednn(x, weight):
        x = F.conv2d(x, weight.flatten(1)[..., None, None], bias)
        return x if add is None else x + add
    add = None if add is None else to_pixels(add)
    return _linear(to_pixels(x), weight, bias, add=add).permute(0, 3, 1, 2)


class FFN(nn.Sequential):
    """Feed-forward network: two 1x1 convolutions with an activation between.

    On the CPU it goes over the pixels in chunks, and the backward computes the
    hidden layer again, so that it is never in memory as a whole. It is then
    faster although it multiplies more.

    Args:
        channels: Width of input and output.
        hidden_channels: Width between.
        act_cfg: Activation. Chunks are for the exact GELU only.
    """

    def __init__(self, channels: int, hidden_channels: int, act_cfg: dict) -> None:
        layers = OrderedDict(
            fc1=nn.Conv2d(channels, hidden_channels, 1),
            act=build_activation_layer(act_cfg),
            fc2=nn.Conv2d(hidden_channels, channels, 1),
        )
        super().__init__(layers)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), plus a map of this shape if one is given."""
        fc1, fc2 = self.fc1, self.fc2
        tensors = [x, fc1.weight, fc1.bias, fc2.weight, fc2.bias]
        if x.is_cpu and torch.is_autocast_enabled('cpu'):
            dtype = torch.get_autocast_dtype('cpu')
            tensors = [tensor.to(dtype) for tensor in tensors]
        exact_gelu = isinstance(self.act, nn.GELU) and self.act.approximate == 'none'
        if not exact_gelu or not _runs_on_onednn(*tensors[:2]):
            x = super().forward(x)
            return x if add is None else x + add
        if add is not None and add.dtype != tensors[0].dtype:  # by autocast
            return self.forward(x) + add
        size = x.shape[-2:]
        tensors[0] = to_pixels(tensors[0]).flatten(0, 2)
        if add is not None:
            add = to_pixels(add).flatten(0, 2)
        grad = torch.is_grad_enabled()
        out = (_ChunkedFFN.apply if grad else _ChunkedFFN.compute)(*tensors, add)
        return out.unflatten(0, (-1, *size)).permute(0, 3, 1, 2)


class _ChunkedFFN(torch.autograd.Function):
    """fc2(GELU(fc1(x))) + add of pixels (P, C), a chunk at a time."""

    CHUNK_BYTES = 4 * 2**20  # of the hidden layer; the fastest of 1 to 16 MiB

    @staticmethod
    def count(x, b1):
        return max(-(-x.shape[0] * b1.nbytes // _ChunkedFFN.CHUNK_BYTES), 1)

    @staticmethod
    def compute(x, w1, b1, w2, b2, add):
        count = _ChunkedFFN.count(x, b1)
        if count == 1:
            return _linear(_linear(x, w1, b1, gelu=True), w2, b2, add)
        w1, w2 = w1.flatten(1), w2.flatten(1)
        out = torch.empty_like(x)
        rows = [y.chunk(count) for y in (x, out, add) if y is not None]
        for x_rows, out_rows, *add_rows in zip(*rows, strict=True):
            hidden = _linear(x_rows, w1, b1, gelu=True)
            out_rows.copy_(_linear(hidden, w2, b2, *add_rows))
        return out

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, add):
        ctx.save_for_backward(x, w1, b1, w2)
        ctx.added = add is not None
        return _ChunkedFFN.compute(x, w1, b1, w2, b2, add)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w1, b1, w2 = ctx.saved_tensors
        weight1, weight2 = w1.flatten(1), w2.flatten(1)
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        sums = None
        count = _ChunkedFFN.count(x, b1)
        rows = (y.chunk(count) for y in (x, grad, grad_x))
        for x_rows, grad_rows, grad_x_rows in zip(*rows, strict=True):
            hidden = _linear(x_rows, w1, b1)
            grad_w2 = grad_rows.t() @ F.gelu(hidden)
            grad_hidden = torch.ops.aten.gelu_backward(grad_rows @ weight2, hidden)
            torch.mm(grad_hidden, weight1, out=grad_x_rows)
            parts = (grad_hidden.t() @ x_rows, grad_hidden.sum(0), grad_w2)
            # In float32: sums over chunks lose the digits of lower precisions.
            parts = [part.float() for part in parts]
            if sums is None:
                sums = parts
            else:
                for total, part in zip(sums, parts, strict=True):
                    total += part
        grad_w1, grad_b1, grad_w2 = (
            total.view(y.shape).to(y.dtype)
            for total, y in zip(sums, (w1, b1, w2), strict=True)
        )
        grad_add = grad if ctx.added else None
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), grad_add


def _runs_on_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own oneDNN kernels with fused epilogues take these.

    In graphs that PyTorch compiles it fuses them itself.
    """
    return (
        _HAS_ONEDNN
        and x.device.type == 'cpu'
        and x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """x W^T + bias, (..., C_in) -> (..., C_out), then a GELU or an addition."""
    linear = torch.ops.mkldnn._linear_pointwise
    # oneDNN takes strided operands too, a hundred times slower.
    x, weight = x.contiguous(), weight.flatten(1).contiguous()
    if add is not None:
        return linear.binary(x, add.contiguous(), weight, bias, 'add')
    return linear(
        x, weight, bias, *(('gelu', [], 'none') if gelu else ('none', [], ''))
    )

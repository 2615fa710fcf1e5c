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

from dsnet_mm.ops import ffn_backward, ffn_hidden, runs_tiled, tiled_ffn, to_tiles

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ('_convolution_pointwise', '_convolution_pointwise_')
)
_DTYPES = [torch.float32]
if _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # AVX-512, say
    _DTYPES.append(torch.bfloat16)
_GEOMETRY = ((0, 0), (1, 1), (1, 1), 1)  # padding, stride, dilation, groups

Part = tuple[int, int]  # channels from the first number to before the second


def to_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C): what a channels-last map has in memory."""
    return x.permute(0, 2, 3, 1)


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C): a view of a channels-last map."""
    return to_pixels(x).flatten(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H * W, C) -> (N, C, H, W) with ``size = (H, W)``, a channels-last view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """1x1 convolution, which can also be computed in parts.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def part(
        self, outputs: Part | None = None, inputs: Part | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the weight, (C_out, C_in), and the bias of a part.

        Of parts of the inputs the one with the last channel brings the bias.
        """
        weight, bias = self.weight.flatten(1), self.bias
        if outputs:
            weight, bias = weight[slice(*outputs)], bias[slice(*outputs)]
        if inputs:
            last = inputs[1] == weight.shape[1]
            weight, bias = weight[:, slice(*inputs)], bias if last else None
        return weight, bias

    def forward(
        self,
        x: Tensor,
        add: Tensor | None = None,
        outputs: Part | None = None,
        inputs: Part | None = None,
    ) -> Tensor:
        """Projects a map.

        Args:
            x: Map of shape (N, C_in, H, W), with the channels of ``inputs``.
            add: Map of shape (N, C_out, H, W) added to the result, which may take
                its memory where no gradients are computed.
            outputs: Channels to compute; by default all.
            inputs: Channels that ``x`` has; by default all.

        Returns:
            Map of shape (N, C_out, H, W), channels-last like ``x``.
        """
        weight, bias = self.part(outputs, inputs)
        weight = weight[..., None, None]
        if _may_fuse(x, weight):
            return _product(x, weight, bias, add)
        out = F.conv2d(x, weight, bias)
        return out if add is None else out + add


class TokenLinear(nn.Linear):
    """Linear layer of tokens."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Projects tokens.

        Args:
            x: Tokens of shape (N, L, C_in).
            add: Tokens of shape (N, L, C_out) added to the result, which may take
                their memory where no gradients are computed.

        Returns:
            Tokens of shape (N, L, C_out).
        """
        if _may_fuse(x, self.weight):
            size = (x.shape[1], 1)
            x = to_map(x, size)
            add = None if add is None else to_map(add, size)
            return to_tokens(_product(x, self.weight[..., None, None], self.bias, add))
        out = F.linear(x, self.weight, self.bias)
        return out if add is None else out + add


class FFN(nn.Sequential):
    """Feed-forward network: two 1x1 convolutions with an activation between.

    On the CPU it goes over the pixels in parts, and the backward computes the
    hidden layer again, so that it is never in memory as a whole. It is then
    faster although it multiplies more. Only where maps are small and wide, the
    hidden layer is kept for the backward, if that is one operator.

    Args:
        channels: Width of input and output.
        hidden_channels: Width between.
        act_cfg: Activation. All this is for the exact GELU only.
    """

    def __init__(self, channels: int, hidden_channels: int, act_cfg: dict) -> None:
        layers = OrderedDict(
            fc1=Pointwise(channels, hidden_channels),
            act=build_activation_layer(act_cfg),
            fc2=Pointwise(hidden_channels, channels),
        )
        super().__init__(layers)

    @property
    def has_exact_gelu(self) -> bool:
        """Whether the activation is the GELU of the error function."""
        return isinstance(self.act, nn.GELU) and self.act.approximate == 'none'

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Computes fc2(act(fc1(x))).

        Args:
            x: Map of shape (N, C, H, W).
            add: Map of the same shape added to the result, which may take its memory
                where no gradients are computed.

        Returns:
            Map of shape (N, C, H, W).
        """
        fc1, fc2 = self.fc1, self.fc2
        tensors = [x, fc1.weight, fc1.bias, fc2.weight, fc2.bias]
        autocast = x.is_cpu and torch.is_autocast_enabled('cpu')
        if autocast:
            dtype = torch.get_autocast_dtype('cpu')
            tensors = [tensor.to(dtype) for tensor in tensors]
        if not self.has_exact_gelu or not _runs_on_onednn(*tensors[:2]):
            x = super().forward(x)
            return x if add is None else x + add
        if add is not None and add.dtype != tensors[0].dtype:  # by autocast
            return self.forward(x) + add
        pixels, w1, b1, w2, b2 = tensors
        pixels = _flat(pixels)
        add = None if add is None else _flat(add)
        if torch.is_grad_enabled():
            out = _ChunkedFFN.apply(pixels, w1, b1, w2, b2, add)
        else:
            out = _ChunkedFFN.compute(pixels, w1, b1, w2, b2, add)
        return to_pixels(out).view(to_pixels(x).shape).permute(0, 3, 1, 2)


class _ChunkedFFN(torch.autograd.Function):
    """fc2(GELU(fc1(x))) + add of maps (1, C, P, 1), a chunk of pixels at a time.

    The compiled operators do it where they can, those of PyTorch otherwise.
    """

    CHUNK_BYTES = 4 * 2**20  # of the hidden layer; the fastest of 1 to 16 MiB
    # With so many channels it takes longer to compute the hidden layer than to read it.
    KEPT_WIDTH = 256

    @staticmethod
    def chunks(b1, *maps):
        count = -(-maps[0].shape[2] * b1.nbytes // _ChunkedFFN.CHUNK_BYTES)
        return zip(*(x.chunk(max(count, 1), 2) for x in maps), strict=True)

    @staticmethod
    def compute(x, w1, b1, w2, b2, add):
        if runs_tiled(x) and _fits_tiles(w1):
            return tiled_ffn(x, _tiles(w1), b1, _tiles(w2), b2, add)
        # In the memory of ``add``, which may also be that of x: a chunk has been
        # read when it is written.
        out = torch.zeros_like(x) if add is None else add
        for x_part, out_part in _ChunkedFFN.chunks(b1, x, out):
            hidden = _product(x_part, w1, b1, gelu=True)
            _product(hidden, w2, b2, out_part)
            del hidden  # the next chunk's takes its place, in the cache
        return out

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, add):
        ctx.added = add is not None
        ctx.tiled = x.dtype == torch.float32 and runs_tiled(x) and _fits_tiles(w1)
        if (
            ctx.tiled
            and x.shape[1] >= _ChunkedFFN.KEPT_WIDTH
            and any(ctx.needs_input_grad)
        ):
            out, hidden = ffn_hidden(x, _tiles(w1), b1, _tiles(w2), b2)
            ctx.save_for_backward(x, w1, b1, w2, hidden)
            return out if add is None else out + add
        ctx.save_for_backward(x, w1, b1, w2)
        add = None if add is None else add.clone()
        return _ChunkedFFN.compute(x, w1, b1, w2, b2, add)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w1, b1, w2, *hidden = ctx.saved_tensors
        weight1, weight2 = w1.flatten(1), w2.flatten(1)
        grad = _flat(grad)
        grad_b2 = _rows(grad).sum(0)
        grad_add = grad if ctx.added else None
        if ctx.tiled:
            grad_x, grad_w1, grad_b1, grad_w2 = ffn_backward(
                _rows(grad), _rows(x), weight1, b1, weight2, *map(_rows, hidden)
            )
            grad_x = grad_x.t()[None, :, :, None]
            grad_w1, grad_w2 = grad_w1[..., None, None], grad_w2[..., None, None]
            return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_add
        grad_x = torch.empty_like(x)
        sums = None
        for parts in _ChunkedFFN.chunks(b1, x, grad, grad_x):
            hidden = _rows(_product(parts[0], w1, b1))
            x_rows, grad_rows, grad_x_rows = map(_rows, parts)
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
        return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_add


def _fits_tiles(weight: Tensor) -> bool:
    """Whether a weight (C_out, C_in, ...) has widths that the tiles can have."""
    return not any(width % 32 for width in weight.shape[:2])


def _tiles(weight: Tensor) -> Tensor:
    return to_tiles(weight.flatten(1))


def _is_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether no gradients are computed, and nothing is cast."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled('cpu')
        and x.dtype == weight.dtype
    )


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


def _may_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether a product and an addition behind it may be one operator."""
    return _is_inference(x, weight) and _runs_on_onednn(x, weight)


def _flat(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (1, C, N * H * W, 1), a view of a channels-last map."""
    pixels = to_pixels(x).reshape(1, -1, 1, x.shape[1])
    return pixels.contiguous().permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(1, C, P, 1) -> (P, C)."""
    return x[0, :, :, 0].t()


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """1x1 convolution, then a GELU, or an addition in the memory of ``add``."""
    x = x.contiguous(memory_format=torch.channels_last)
    if add is None:
        epilogue = ('gelu', [], 'none') if gelu else ('none', [], '')
        convolution = torch.ops.mkldnn._convolution_pointwise
        return convolution(x, weight, bias, *_GEOMETRY, *epilogue)
    add = add.contiguous(memory_format=torch.channels_last)
    convolution_ = torch.ops.mkldnn._convolution_pointwise_.binary
    epilogue = ('add', 1.0, None, [], None)
    return convolution_(add, x, weight, bias, *_GEOMETRY, *epilogue)

"""A projection whose weight is in the order of the compiled operators."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dsnet_mm.ops import can_pack, pack, unpack


class PackedProjection(nn.Module):
    """1x1 convolution of a map, or linear layer of tokens, for inference.

    The weight is stored once. Where the compiled operators take its type and widths, it
    is in the order in which they read it (:func:`dsnet_mm.ops.pack`); the buffer is
    ``packed``. It is packed again when its type or device changes. State dicts have it
    as ``weight``, in the shape that it was given in, so they do not depend on the
    machine.

    Args:
        weight: Weight of shape (C_out, C_in, 1, 1) or (C_out, C_in).
        bias: Bias of shape (C_out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.register_buffer('packed', _pack(weight.flatten(1)))
        self.register_buffer('bias', bias)

    @property
    def weight(self) -> Tensor:
        """The weight in the shape that it was given in, a copy if it is packed."""
        return _unpack(self.packed).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H, W), or (N, L, C_in) -> (N, L, C_out)."""
        project = F.linear if len(self.shape) == 2 else F.conv2d
        return project(x, self.weight, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> 'PackedProjection':
        old = self.packed
        super()._apply(fn, recurse)
        if (old.dtype, old.device) != (self.packed.dtype, self.packed.device):
            self.packed = _pack(fn(_unpack(old)))
        return self

    def _save_to_state_dict(
        self, destination: dict, prefix: str, keep_vars: bool
    ) -> None:
        destination[f'{prefix}weight'] = self.weight
        destination[f'{prefix}bias'] = self.bias

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        self.packed, self._buffers['weight'] = None, self.weight
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight = self._buffers.pop('weight')
        self.packed = _pack(weight.flatten(1))


def _pack(weight: Tensor) -> Tensor:
    return pack(weight) if can_pack(weight) else weight


def _unpack(packed: Tensor) -> Tensor:
    return packed if packed.dim() == 2 else unpack(packed)

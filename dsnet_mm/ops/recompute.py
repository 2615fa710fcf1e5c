"""Normalised maps that the backward computes again, instead of keeping them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def recomputed(norm: nn.Module, x: Tensor, keep: bool = False) -> Iterator[Tensor]:
    """Gives ``norm(x)``, which operators in the context do not keep for the backward.

    A norm keeps its input. The backward computes the output from it once more, bit for
    bit. These are batch norms in training mode and group norms, without hooks. The
    outputs of others are kept, and all under ``torch.compile``, which chooses itself.

    Args:
        norm: Norm of maps.
        x: Map of shape (N, C, H, W). It must not be written to afterwards.
        keep: Whether the output is kept.

    Yields:
        The normalised map, of the same shape.
    """
    y, again = norm(x), _without_effects(norm)
    if keep or again is None or y.dtype != x.dtype or not y.requires_grad:
        yield y
        return
    x, storage = x.detach(), y.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Tensor | tuple:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return again(x).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield y


def _without_effects(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns what computes a norm's output once more, or None if nothing does."""
    if (
        type(norm) not in (nn.BatchNorm2d, nn.GroupNorm)
        or norm._forward_hooks
        or norm._forward_pre_hooks
        or torch.compiler.is_compiling()
    ):
        return None
    # Those of now: torch.func.functional_call gives others until its end.
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if isinstance(norm, nn.GroupNorm):
        return lambda x: F.group_norm(x, norm.num_groups, weight, bias, eps)
    if not norm.training:  # its running statistics may change until the backward
        return None
    # Without them: they were updated already.
    return lambda x: F.batch_norm(x, None, None, weight, bias, True, eps=eps)

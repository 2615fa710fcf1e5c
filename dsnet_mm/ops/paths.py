"""Which of the implementations runs."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native

PATHS = ('reference', 'sdpa', 'native')
# torch 2.6 cannot tell; there compiled graphs go the way of exported ones.
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)
_BUILD = 'DSNET_MM_WITH_OPS=1 pip install --no-build-isolation -e .'


class _Thread(threading.local):
    path: str | None = None


_thread = _Thread()


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Forces a path in this thread, as ``DSNET_MM_OPS`` does in the whole process.

    A graph that is compiled or exported keeps the path of its compilation.

    Args:
        path: One of ``PATHS``.

    Raises:
        ValueError: If it is no path, or one that is not there.
    """
    before, _thread.path = _thread.path, path
    try:
        select_path('cpu')
        yield
    finally:
        _thread.path = before


def select_path(device: str) -> tuple[str, str]:
    """Tells which path :func:`co_attention` takes, and why.

    Args:
        device: Type of the device, ``'cpu'`` or ``'cuda'``.

    Returns:
        One of ``PATHS`` and the reason.

    Raises:
        ValueError: If :func:`use_path` or the environment variable ``DSNET_MM_OPS``
            asks for what is no path, or for one that is not there.
    """
    by, forced = 'use_path', _thread.path
    if forced is None:
        by, forced = 'DSNET_MM_OPS', os.environ.get('DSNET_MM_OPS') or None
    if forced is not None and forced not in PATHS:
        raise ValueError(f'{by} is one of {", ".join(PATHS)}, got {forced!r}.')
    if forced == 'native' and native.WHY_NOT:
        raise ValueError(
            f'{by}=native, but the compiled op is not there '
            f'({native.WHY_NOT}); build it: {_BUILD}'
        )
    if forced is not None:
        return forced, f'{by}={forced}'
    # MMEngine's complexity analysis traces a model. It has formulas for products of
    # matrices, and none for PyTorch's attention.
    if torch.jit.is_tracing():
        return 'reference', 'traced programs hold plain products of matrices'
    if native.WHY_NOT:
        return 'sdpa', f'the compiled op is not there: {native.WHY_NOT}'
    # The CUDA kernels have not been timed on a GPU. They do without tensor
    # cores, which SDPA uses, so it is taken there.
    if device != 'cpu':
        return 'sdpa', f'the compiled op is chosen on the CPU only, not on {device}'
    # Exported programs run where this package is not.
    if is_exporting():
        return 'sdpa', 'exported programs hold PyTorch operators only'
    return 'native', 'compiled'

"""The memory of a call, measured in a process of its own."""

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

STATUS = Path('/proc/self/status')


def peak_in_child(make_call: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Returns the most MiB that a call holds besides what stays between calls.

    The call runs twice in a new process, and its second run is measured. The process
    has as many threads as this one.

    Args:
        make_call: Makes the call. It is a function of a module.
        *args: Its arguments.

    Raises:
        RuntimeError: If the process is killed, such as for its memory.
    """
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak, torch.get_num_threads(), make_call, *args).result()


def _peak(threads: int, make_call: Callable, *args: Any) -> float:
    torch.set_num_threads(threads)
    # Freed tensors go back to the system at once, so that each new one is counted:
    # glibc's M_MMAP_THRESHOLD.
    ctypes.CDLL(None).mallopt(-3, 65536)
    call = make_call(*args)
    call()  # allocates what stays: kernels, threads, compiled code
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Not ru_maxrss: it cannot be reset, and it starts at the parent's size.
    Path('/proc/self/clear_refs').write_text('5')
    before = _mib('VmRSS')
    call()
    return _mib('VmHWM') - before


def _mib(field: str) -> float:
    return int(re.search(rf'{field}:\s+(\d+)', STATUS.read_text())[1]) / 1024

"""No operator reads beyond the end of a tensor: behind each input lies a guard page."""

import ctypes
import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsnet_mm.ops import pack
from dsnet_mm.ops.packing import PACKED_DTYPES
from tests.conftest import needs_native, run_python

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS_LAST = torch.channels_last
pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != 'linux', reason='guard pages by mprotect'),
]


def guard(x: Tensor) -> Tensor:
    """Copies a tensor to the end of memory whose next page cannot be read.

    The copy has the shape and strides of ``x``. Its memory is never freed.
    """
    size = x.numel() * x.element_size()
    if not size:
        return x
    page = mmap.PAGESIZE
    pages = -(-size // page)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length = ctypes.c_size_t((pages + 1) * page)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    start = libc.mmap(None, length, access, flags, -1, ctypes.c_long(0))
    end = start + pages * page
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    buffer = (ctypes.c_char * size).from_address(end - size)
    copy = torch.frombuffer(buffer, dtype=x.dtype).as_strided(x.shape, x.stride())
    return copy.copy_(x)


def check(op: Callable, *args) -> None:
    """Compares an operator on guarded copies of its arguments with one on plain copies.

    Results are compared, and the arguments, which an operator may write to. The last
    line that is printed names the call that crashed.
    """

    def run(place: Callable) -> list[Tensor]:
        placed = [place(x) if isinstance(x, Tensor) else x for x in args]
        out = op(*placed)
        outs = [out] if isinstance(out, Tensor) else list(out or ())
        return [*outs, *(x for x in placed if isinstance(x, Tensor))]

    print(op, *(x.shape if isinstance(x, Tensor) else x for x in args), flush=True)
    for measured, expected in zip(run(guard), run(torch.clone), strict=True):
        assert torch.equal(measured, expected)


def check_attention(dtype: torch.dtype, width: int) -> None:
    ops, heads = torch.ops.dsnet_mm, 2
    for length, rest in ((3, 7), (70, 33)):
        local = torch.randn(2, length, 3 * heads * width).to(dtype)
        global_ = torch.randn(2, rest, 3 * heads * width).to(dtype)
        seed = torch.tensor([5])
        for dropout_p in (0.0, 0.3):
            options = seed, heads, dropout_p
            check(ops.co_attention, local, global_, *options)
            outs = ops.co_attention(local, global_, *options)
            grads = [torch.randn(x.shape).to(dtype) for x in outs[:2]]
            check(ops.co_attention_backward, *grads, local, global_, *outs, *options)
            check(ops.self_attention, local, *options)
            outs = ops.self_attention(local, *options)
            check(ops.self_attention_backward, grads[0], local, *outs, *options)


def check_projections(dtype: torch.dtype) -> None:
    ops = torch.ops.dsnet_mm
    for pixels, width, hidden in ((1, 32, 32), (37, 64, 320), (300, 96, 96)):
        x, add, h_l = torch.randn(3, pixels, width).to(dtype)
        w1 = torch.randn(hidden, width).to(dtype)
        w2, w = torch.randn(width, hidden).to(dtype), torch.randn(width, width)
        b1, b2 = torch.randn(hidden).to(dtype), torch.randn(width).to(dtype)
        w = pack(w.to(dtype))
        packed = pack(w1), b1, pack(w2), b2
        check(ops.linear, x, w, b2)
        check(ops.linear, x, w, None)
        check(ops.linear_, add, x, w, b2)
        check(ops.ffn, x, *packed)
        check(ops.merge_, x, add, h_l, w, b2, w, *packed)
        check(ops.merge_, x, add, None, None, None, w, *packed)
        check(ops.ffn_backward, add, x, w1, b1, w2)


def check_maps(dtype: torch.dtype, channels: int) -> None:
    ops = torch.ops.dsnet_mm
    for size in ((1, 1), (5, 3), (8, 8)):
        x = torch.randn(2, channels, *size).to(dtype)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
        scale, shift = torch.randn(2, channels)
        weight, bias, scale, shift = (t.to(dtype) for t in (weight, bias, scale, shift))
        check(ops.residual_conv, x, weight, bias, scale, shift)
        check(ops.residual_conv, x, weight, bias, None, None)
        out = torch.randn(2, channels, 7, 9).to(dtype)
        check(ops.resize_add_, out.contiguous(memory_format=CHANNELS_LAST), x)


def check_all() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        for width in (1, 8, 12, 16, 40):
            check_attention(dtype, width)
        if dtype in PACKED_DTYPES:
            check_projections(dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for channels in (1, 8, 12, 24, 37, 64):
            check_maps(dtype, channels)


@pytest.mark.parametrize('capability', ['avx512', 'avx2', 'default'])
def test_nothing_is_read_beyond_the_end(capability):
    done = run_python(
        'import torch\n'
        'from tests.ops.test_memory_bounds import check_all\n'
        'check_all()\n'
        'print(torch.backends.cpu.get_cpu_capability())',
        ATEN_CPU_CAPABILITY=capability,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f'{last} {done.stderr}'
    if last != [capability.upper()]:
        pytest.skip(f'this machine runs {last}')


def test_the_guard_page_cannot_be_read():
    done = run_python(
        'import ctypes, torch\n'
        'from tests.ops.test_memory_bounds import guard\n'
        'x = guard(torch.zeros(3))\n'
        'print(ctypes.string_at(x.data_ptr(), 12) == bytes(12), flush=True)\n'
        'ctypes.string_at(x.data_ptr(), 13)'
    )
    assert done.stdout == 'True\n'
    assert done.returncode != 0  # SIGSEGV, which AddressSanitizer turns into an exit.

"""The CUDA kernels without a GPU: compiled, and run on the CPU."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dsnet_mm.ops import reference_co_attention

REPO = Path(__file__).resolve().parents[1]
CUDA = REPO / 'dsnet_mm' / 'ops' / 'csrc' / 'cuda'
SHIM = REPO / 'tests' / 'cuda_on_cpu'
needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no g++')
needs_nvcc = pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc')


@needs_nvcc
def test_nvcc_compiles_the_kernels_and_their_launches(tmp_path):
    """About a minute, for compute capability 8.0 (A100) and 9.0 (H100)."""
    include = Path(torch.__file__).parent / 'include'
    # PyTorch's CPU wheel has its CUDA headers but for this generated one.
    stub = tmp_path / 'c10/cuda/impl/cuda_cmake_macros.h'
    stub.parent.mkdir(parents=True)
    stub.write_text('#define C10_CUDA_BUILD_SHARED_LIBS\n')
    mmcv = Path(find_spec('mmcv').origin).parent / 'ops/csrc/common'
    folders = (tmp_path, include, include / 'torch/csrc/api/include', mmcv)
    # As torch.utils.cpp_extension compiles.
    macros = ('HALF_OPERATORS', 'HALF_CONVERSIONS', 'BFLOAT16_CONVERSIONS')
    done = subprocess.run(
        [
            *('nvcc', '-c', CUDA / 'co_attention_cuda.cu', '-o', 'out.o'),
            *(f'-gencode=arch=compute_{v},code=sm_{v}' for v in (80, 90)),
            *('-std=c++20', '--expt-relaxed-constexpr', '-DMMCV_WITH_CUDA'),
            *(f'-D__CUDA_NO_{name}__' for name in macros),
            *(f'-I{folder}' for folder in folders),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp('cuda_on_cpu') / 'kernels.so'
    subprocess.run(
        [
            *('g++', '-std=c++17', '-O1', '-shared', '-fPIC', f'-I{CUDA}'),
            *(SHIM / 'kernels.cpp', '-o', library),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library)).co_attention


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


@needs_compiler
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize(
    'shape',
    # Less than a tile (16) and a block (128, 64, 32 tokens), more, one, two and
    # four threads to a token, widths that do not fill them.
    [(1, 1, 1, 1, 8), (2, 130, 17, 2, 32), (1, 70, 40, 3, 48), (1, 20, 35, 1, 128)],
)
def test_kernels_equal_reference(kernels, shape, dropout_p):
    n, length, rest, heads, width = shape
    torch.manual_seed(0)
    channels = heads * width
    inputs = [torch.randn(n, tokens, 3 * channels) for tokens in (length, rest)]
    grad_out = [torch.randn(n, tokens, channels) for tokens in (length, rest)]
    seed = torch.tensor([2**40 + 7])
    out = [torch.full_like(x, torch.nan) for x in grad_out]
    grad = [torch.full_like(x, torch.nan) for x in inputs]
    lse = [torch.empty(n, heads, tokens) for tokens in (length, rest)]
    delta = [torch.empty_like(x) for x in lse]
    kernels(
        pointers(*inputs),
        (ctypes.c_int64 * 2)(length, rest),
        *(ctypes.c_int64(x) for x in (n, heads, width)),
        ctypes.c_void_p(seed.data_ptr()),
        ctypes.c_double(dropout_p),
        *(pointers(*x) for x in (out, lse, grad_out, delta, grad)),
    )
    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference_co_attention(*exact, heads, dropout_p, seed)
    expected_grad = torch.autograd.grad(expected, exact, [x.double() for x in grad_out])
    for measured, e in zip([*out, *grad], [*expected, *expected_grad], strict=True):
        assert (measured - e).abs().max() < 1e-5 * max(e.abs().max(), 1)

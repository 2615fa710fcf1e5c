"""The CUDA kernels without a GPU: compiled, and run on the CPU."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dsnet_mm.ops import reference_co_attention

REPO = Path(__file__).resolve().parents[2]
CUDA = REPO / 'dsnet_mm' / 'ops' / 'csrc' / 'cuda'
SHIM = REPO / 'tests' / 'cuda_on_cpu'
needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no g++')
needs_nvcc = pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc')


@needs_nvcc
def test_nvcc_compiles_the_kernels_and_their_launches(tmp_path):
    """For compute capability 8.0 (A100) and 9.0 (H100), without optimisation."""
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
            *('-O0', '-Xcicc', '-O0', '-Xptxas', '-O0'),
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


def assert_kernels_equal_reference(kernels, inputs, heads, dropout_p, tolerance=1e-5):
    """Compares outputs and gradients; returns the kernels' lse of either stream."""
    n, channels = len(inputs[0]), inputs[0].shape[2] // 3
    tokens = [x.shape[1] for x in inputs]
    grad_out = [torch.randn(n, t, channels) for t in tokens]
    seed = torch.tensor([2**40 + 7])
    out = [torch.full_like(x, torch.nan) for x in grad_out]
    grad = [torch.full_like(x, torch.nan) for x in inputs]
    lse = [torch.empty(n, heads, t) for t in tokens]
    delta = [torch.empty_like(x) for x in lse]
    kernels(
        pointers(*inputs),
        (ctypes.c_int64 * 2)(*tokens),
        *(ctypes.c_int64(x) for x in (n, heads, channels // heads)),
        ctypes.c_void_p(seed.data_ptr()),
        ctypes.c_double(dropout_p),
        *(pointers(*x) for x in (out, lse, grad_out, delta, grad)),
    )
    exact = [x.double().requires_grad_() for x in inputs]
    expected = reference_co_attention(*exact, heads, dropout_p, seed)
    expected_grad = torch.autograd.grad(expected, exact, [x.double() for x in grad_out])
    for measured, e in zip([*out, *grad], [*expected, *expected_grad], strict=True):
        assert (measured - e).abs().max() < tolerance * max(e.abs().max(), 1)
    return lse


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
    inputs = [torch.randn(n, tokens, 3 * heads * width) for tokens in (length, rest)]
    assert_kernels_equal_reference(kernels, inputs, heads, dropout_p)


@needs_compiler
@pytest.mark.parametrize('dropout_p', [0.0, 0.3])
@pytest.mark.parametrize('width', [8, 48, 128])
def test_scores_far_below_zero(kernels, width, dropout_p):
    """exp2(-lse) overflows, and would be the weight of a key beyond the end."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, tokens, 3, width) for tokens in (20, 35)]
    for x in inputs:
        x[:, :, 0, 0] = (110 * width**0.5) ** 0.5  # queries
        x[:, :, 1, 0] = -x[:, :, 0, 0]  # keys
    inputs = [x.flatten(2) for x in inputs]
    # The rounding of a score grows with the score.
    for lse in assert_kernels_equal_reference(kernels, inputs, 1, dropout_p, 1e-4):
        assert lse.max() < -128

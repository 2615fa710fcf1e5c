"""The CUDA kernels without a GPU: compiled, and run on the CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dsnet_mm.ops import reference_co_attention

REPO = Path(__file__).resolve().parents[1]
CUDA = REPO / 'dsnet_mm' / 'ops' / 'csrc' / 'cuda'
SHIM = REPO / 'tests' / 'cuda_on_cpu'
needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no g++')
needs_nvcc = pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc')

INSTANCES = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "attention_kernel.cuh"
using namespace dsnet;
#define INSTANCE(S, PARTS) \\
  template __global__ void attend_kernel<S, PARTS>(Direction<S>, S*, float*); \\
  template __global__ void grad_q_kernel<S, PARTS>( \\
      Direction<S>, const S*, const S*, const float*, float*, S*); \\
  template __global__ void grad_kv_kernel<S, PARTS>( \\
      Direction<S>, const S*, const float*, const float*, S*);
#define INSTANCES(S) INSTANCE(S, 1) INSTANCE(S, 2) INSTANCE(S, 4)
INSTANCES(float) INSTANCES(__half) INSTANCES(__nv_bfloat16)
"""


@needs_nvcc
@pytest.mark.parametrize('arch', ['sm_80', 'sm_90'])
def test_nvcc_compiles_the_kernels_without_spilling(arch, tmp_path):
    source = tmp_path / 'kernels.cu'
    source.write_text(INSTANCES)
    done = subprocess.run(
        ['nvcc', f'-arch={arch}', '-Xptxas=-v', '-cubin', f'-I{CUDA}', source],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if 'spill' in line]
    assert len(spills) == 27
    assert all('0 bytes spill stores, 0 bytes spill loads' in line for line in spills)


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

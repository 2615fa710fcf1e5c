"""Builds the compiled ops, which pyproject.toml cannot describe.

The ops are compiled if torch, mmcv and a C++ compiler are available. pip must be called
with ``--no-build-isolation``; otherwise the build does not find torch and mmcv.

Environment variables:
    DSNET_MM_WITH_OPS: 1 makes the build fail if the ops cannot be compiled. 0 leaves
        the ops out.
    FORCE_CUDA: 1 compiles for CUDA on a machine without GPU. TORCH_CUDA_ARCH_LIST
        names the architectures, sm_80 or later. An nvcc of another CUDA than torch's
        cannot compile for it: the ops are then compiled for the CPU only.
    MAX_JOBS: Number of files that are compiled at the same time.
    DSNET_MM_SANITIZE: 1 compiles the ops for ``make test-asan``, with AddressSanitizer
        and UndefinedBehaviorSanitizer, for the CPU only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path('dsnet_mm/ops/csrc')
SOURCES = (
    'autograd.cpp',
    'co_attention.cpp',
    'cpu/attention/co_attention_cpu.cpp',
    'cpu/inference/depthwise_cpu.cpp',
    'cpu/inference/ds_block_cpu.cpp',
    'cpu/inference/projections_cpu.cpp',
    'cpu/inference/resize_cpu.cpp',
)
CUDA_SOURCES = ('cuda/co_attention_cuda.cu',)
SANITIZE = ['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined']
BUILD_INFO = Path('dsnet_mm/ops/build_info.json')


def note(**info: str | None) -> None:
    """Writes build_info.json: what the ops are built for, or why they are not built."""
    BUILD_INFO.write_text(json.dumps(info))


# What needs the repository with its results is not in the wheel.
REPOSITORY_ONLY = ('evidence', 'reproduce.py', 'publish_weights.py', 'install.sh')


class BuildPy(build_py):
    """Adds configurations and tools to the wheel, in the folder that mim reads."""

    def run(self) -> None:
        if not self.distribution.ext_modules:
            note(reason=why_not())
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib) / 'dsnet_mm' / '.mim'
        for name in ('configs', 'tools'):
            shutil.copytree(
                name,
                mim / name,
                ignore=shutil.ignore_patterns('__pycache__', *REPOSITORY_ONLY),
                dirs_exist_ok=True,
            )
        shutil.copy('model-index.yml', mim)


def mmcv_headers() -> Path:
    """Returns the folder of mmcv's C++ headers. mmcv is not imported."""
    return Path(find_spec('mmcv').origin).parent / 'ops/csrc/common'


def why_not() -> str | None:
    """Returns why the ops cannot be compiled, or None if they can."""
    if os.environ.get('DSNET_MM_WITH_OPS') == '0':
        return 'DSNET_MM_WITH_OPS=0'
    missing = [name for name in ('torch', 'mmcv') if find_spec(name) is None]
    if missing:
        return (
            f'the build does not find {" and ".join(missing)} '
            f'(pip install --no-build-isolation lets it find installed packages)'
        )
    if not (mmcv_headers() / 'pytorch_device_registry.hpp').is_file():
        return 'the installed mmcv has no C++ headers'
    if not any(map(shutil.which, (os.environ.get('CXX', 'c++'), 'g++', 'clang++'))):
        return 'there is no C++ compiler'
    return None


def nvcc_release(cuda_home: str | None) -> str | None:
    """Returns the release of the nvcc in a CUDA toolkit, such as '13.0', or None."""
    nvcc = Path(cuda_home or '', 'bin/nvcc')
    if not cuda_home or not nvcc.is_file():
        return None
    done = subprocess.run([nvcc, '--version'], capture_output=True, text=True)
    release = re.search(r'release (\d+\.\d+)', done.stdout)
    return release and release[1]


def why_not_cuda(torch_cuda: str | None, nvcc: str | None) -> str | None:
    """Returns why a GPU's ops cannot be compiled, or None if they can.

    Args:
        torch_cuda: CUDA version that torch is compiled for, or None.
        nvcc: Release of the installed nvcc, or None.
    """
    if torch_cuda is None:
        return 'torch is compiled for the CPU'
    if nvcc is None:
        return f'torch is compiled for CUDA {torch_cuda}, but there is no nvcc'
    if nvcc.split('.')[0] != torch_cuda.split('.')[0]:
        return (
            f'torch is compiled for CUDA {torch_cuda} and needs an nvcc of that major '
            f'version, but nvcc is of CUDA {nvcc}'
        )
    return None


def ops() -> dict:
    """Returns the arguments of ``setup`` that compile the ops, empty if none can be."""
    reason = why_not()
    if reason:
        message = f'dsnet_mm is built without its compiled ops: {reason}.'
        if os.environ.get('DSNET_MM_WITH_OPS') == '1':
            sys.exit(message)
        # pip hides the output of a build. `python -m dsnet_mm` repeats the reason.
        print(message, file=sys.stderr)
        return {}

    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
    )

    sanitize = os.environ.get('DSNET_MM_SANITIZE') == '1'
    wanted = torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
    no_cuda = None
    if wanted and not sanitize:
        no_cuda = why_not_cuda(torch.version.cuda, nvcc_release(CUDA_HOME))
        if no_cuda:
            print(f'The ops are built for the CPU only: {no_cuda}.', file=sys.stderr)
    cuda = wanted and not sanitize and not no_cuda

    class BuildOps(BuildExtension):
        def run(self) -> None:
            version = torch.version.cuda if cuda else None
            note(torch=torch.__version__, cuda=version, no_cuda=no_cuda)
            super().run()

    flags = ['-fno-math-errno', '-Wno-psabi']
    if sanitize:
        flags += ['-O1', '-g1', '-fno-omit-frame-pointer', *SANITIZE]
    else:
        flags += ['-O3', '-g0']
    # at::parallel_for is a header. Without this flag it runs on one thread. The OpenMP
    # library is the one that torch has loaded.
    openmp = ['-fopenmp'] * (sys.platform == 'linux')
    extension = (CUDAExtension if cuda else CppExtension)(
        'dsnet_mm.ops._C',
        [str(CSRC / source) for source in SOURCES + CUDA_SOURCES * cuda],
        include_dirs=[str(mmcv_headers())],
        depends=[str(path) for path in sorted(CSRC.rglob('*.*h'))],
        define_macros=[('MMCV_WITH_CUDA', None)] * cuda,
        extra_compile_args=dict(cxx=flags + openmp, nvcc=['-O3']),
        extra_link_args=openmp + SANITIZE * sanitize,
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=BuildOps))


if int(setuptools.__version__.split('.')[0]) < 77:
    # Older versions do not read pyproject.toml in full. They install a package with
    # the name UNKNOWN.
    sys.exit(
        f'setuptools {setuptools.__version__} is too old to build dsnet_mm; '
        f"install another one: pip install 'setuptools>=77,<82'"
    )
arguments = ops()
arguments.setdefault('cmdclass', {})['build_py'] = BuildPy
setup(**arguments)

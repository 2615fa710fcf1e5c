"""Build steps that pyproject.toml cannot express: the compiled ops.

Environment variables:
    DSNET_MM_WITH_OPS: 1 to fail where the ops cannot be compiled, 0 to leave
        them out. By default they are compiled if torch, mmcv and a compiler
        are there; pip needs ``--no-build-isolation`` to see the first two.
    FORCE_CUDA: 1 to compile for CUDA where there is no GPU; the architectures
        are those of TORCH_CUDA_ARCH_LIST, sm_80 and later.
    MAX_JOBS: How many files are compiled at a time.
    DSNET_MM_SANITIZE: 1 to compile for ``make test-asan``: with AddressSanitizer and
        UndefinedBehaviorSanitizer, for the CPU only, and with plain C++ in place of
        AMX, whose memory accesses the sanitizers do not see.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path('dsnet_mm/ops/csrc')
SOURCES = (
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
    """Writes down what the ops are built for, or why they are not; for the doctor."""
    BUILD_INFO.write_text(json.dumps(info))


class BuildPy(build_py):
    """Adds configurations and tools to the wheel, where mim looks for them."""

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
                ignore=shutil.ignore_patterns('__pycache__'),
                dirs_exist_ok=True,
            )
        shutil.copy('model-index.yml', mim)


def mmcv_headers() -> Path:
    """Returns the headers of the installed mmcv, found without importing it."""
    return Path(find_spec('mmcv').origin).parent / 'ops/csrc/common'


def why_not() -> str | None:
    """Tells what the ops cannot be compiled without."""
    if os.environ.get('DSNET_MM_WITH_OPS') == '0':
        return 'DSNET_MM_WITH_OPS=0'
    missing = [name for name in ('torch', 'mmcv') if find_spec(name) is None]
    if missing:
        return (
            f'{" and ".join(missing)} cannot be seen by the build '
            f'(pip install --no-build-isolation shows it what is installed)'
        )
    if not (mmcv_headers() / 'pytorch_device_registry.hpp').is_file():
        return 'the installed mmcv has no C++ headers'
    if not any(map(shutil.which, (os.environ.get('CXX', 'c++'), 'g++', 'clang++'))):
        return 'there is no C++ compiler'
    return None


def ops() -> dict:
    """Returns the arguments of ``setup`` that compile the ops, if any can be."""
    reason = why_not()
    if reason:
        message = f'dsnet_mm is built without its compiled ops: {reason}.'
        if os.environ.get('DSNET_MM_WITH_OPS') == '1':
            sys.exit(message)
        # pip swallows what a build prints, so the doctor repeats it.
        print(message, file=sys.stderr)
        return {}

    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
    )

    class BuildOps(BuildExtension):
        def run(self) -> None:
            note(torch=torch.__version__, cuda=torch.version.cuda if cuda else None)
            super().run()

    wanted = torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
    sanitize = os.environ.get('DSNET_MM_SANITIZE') == '1'
    cuda = bool(torch.version.cuda and CUDA_HOME and wanted and not sanitize)
    flags = ['-fno-math-errno', '-Wno-psabi']
    if sanitize:
        flags += ['-O1', '-g1', '-fno-omit-frame-pointer', *SANITIZE]
    else:
        flags += ['-O3', '-g0']
    # Without it at::parallel_for, which is a header, runs on one thread. The
    # library itself is the one that torch has loaded.
    openmp = ['-fopenmp'] * (sys.platform == 'linux')
    extension = (CUDAExtension if cuda else CppExtension)(
        'dsnet_mm.ops._C',
        [str(CSRC / source) for source in SOURCES + CUDA_SOURCES * cuda],
        include_dirs=[str(mmcv_headers())]
        + [str(Path('tests/amx_on_cpu').resolve())] * sanitize,
        depends=[str(path) for path in sorted(CSRC.rglob('*.*h'))],
        define_macros=[('MMCV_WITH_CUDA', None)] * cuda
        + [('DSNET_AMX_ON_CPU', None)] * sanitize,
        extra_compile_args=dict(cxx=flags + openmp, nvcc=['-O3']),
        extra_link_args=openmp + SANITIZE * sanitize,
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=BuildOps))


arguments = ops()
arguments.setdefault('cmdclass', {})['build_py'] = BuildPy
setup(**arguments)

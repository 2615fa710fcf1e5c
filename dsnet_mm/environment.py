"""Checks packages, compiled ops and devices, for ``python -m dsnet_mm`` and others."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

# Import name -> distributions that provide it. The first is the one that is pinned.
DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'open_clip': ('open_clip_torch',),
}
# Import name -> lowest supported version, first version that is not supported.
SUPPORTED = {
    'mmengine': ('0.10.4', '1.0'),
    'mmcv': ('2.0.0', '2.4'),
    'mmdet': ('3.2.0', '4.0'),
    'mmpretrain': ('1.2.0', '2.0'),
    'open_clip': ('3.0', '4.0'),
}
# Packages that every network needs. Each of the others is for a part of this package.
REQUIRED = ('mmengine', 'mmcv')
# Import name -> version of the maintained family that this package is tested with.
PINNED = {
    'mmengine': '0.10.12',
    'mmcv': '2.3.6',
    'mmdet': '3.5.1',
    'mmpretrain': '1.3.6',
}


class Installed(NamedTuple):
    """The distributions of an installed package, and the version of the first."""

    distributions: tuple[str, ...]
    version: str


def find_installed(name: str) -> Installed | None:
    """Finds a package by its import name, without importing it."""
    found = {}
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return Installed(tuple(found), next(iter(found.values()))) if found else None


def install_command(name: str) -> str:
    """Returns the command that installs the pinned version of a package."""
    pin = DISTRIBUTIONS[name][0]
    if name in PINNED:
        pin += f'=={PINNED[name]}'
    flag = '' if name in ('mmengine', 'open_clip') else '--no-build-isolation '
    return f'pip install {flag}{pin}'


def require(*names: str, user: str) -> None:
    """Checks that packages are installed in a supported version.

    Args:
        *names: Import names, keys of ``SUPPORTED``.
        user: What needs the packages, for the error message.

    Raises:
        ImportError: If a package is missing or its version is not supported.
    """
    for name in names:
        low, high = SUPPORTED[name]
        installed = find_installed(name)
        if installed is None:
            found = 'is not installed'
        elif not Version(low) <= Version(installed.version) < Version(high):
            found = f'is installed in version {installed.version}'
        else:
            continue
        raise ImportError(
            f'{user} needs {name} (>={low}, <{high}), which {found}; '
            f'{install_command(name)}'
        )


def existing_device(name: str) -> str:
    """Returns the name of a device, the best one for ``'auto'``.

    Raises:
        ValueError: If this machine does not have it.
    """
    import torch

    if name == 'auto':
        if not torch.accelerator.is_available():
            return 'cpu'
        return torch.accelerator.current_accelerator().type
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f'there is no device {name!r} here ({str(error).splitlines()[0]}); '
            f"use 'auto' or 'cpu'."
        ) from error
    return name


def find_problems() -> list[str]:
    """Returns one sentence for each problem of the installation, with its remedy."""
    problems = []
    for name in SUPPORTED:
        if name not in REQUIRED and not find_installed(name):
            continue
        try:
            require(name, user='dsnet_mm')
        except ImportError as error:
            problems.append(str(error))
            continue
        installed = find_installed(name)
        if len(installed.distributions) > 1:
            both = ' and '.join(installed.distributions)
            problems.append(
                f'{both} are both installed, but they contain the same files; '
                f'pip uninstall {" ".join(installed.distributions)}, then '
                f'{install_command(name)}'
            )
    try:
        importlib.import_module('cv2')
    except ImportError as error:
        problems.append(
            f'OpenCV cannot be imported ({error}); pip uninstall opencv-python '
            f'opencv-python-headless, then pip install opencv-python-headless'
        )
    if find_spec('mmcv') and not mmcv_ops()[0]:
        problems.append(
            f'mmcv has no compiled ops, so mmdet does not work ({mmcv_ops()[1]}); '
            f'install torch, then mmcv: pip install --no-cache-dir '
            f'--force-reinstall --no-deps --no-build-isolation '
            f'onedl-mmcv=={PINNED["mmcv"]}'
        )
    mmengine = find_installed('mmengine')
    setuptools = find_installed('setuptools')
    if (
        mmengine
        and mmengine.distributions == ('mmengine',)
        and setuptools
        and Version(setuptools.version) >= Version('82')
    ):
        problems.append(
            f'setuptools {setuptools.version} has no pkg_resources, which the '
            f"official mmengine needs; pip install 'setuptools<82'"
        )
    return problems


def mmcv_ops() -> tuple[bool, str]:
    """Returns whether mmcv's ops load, and their devices or the error."""
    try:
        importlib.import_module('mmcv._ext')
        ops = importlib.import_module('mmcv.ops')
    except ImportError as error:
        return False, str(error)
    cuda = ops.get_compiling_cuda_version()
    return True, 'the CPU' if cuda == 'not available' else f'CPU and CUDA {cuda}'


def ops_build() -> str:
    """Returns the devices the ops are compiled for, or why there are no ops."""
    native = importlib.import_module('dsnet_mm.ops.native')
    if native.WHY_NOT:
        return native.WHY_NOT
    info = native.build_info()
    devices = f'CPU and CUDA {info["cuda"]}' if info.get('cuda') else 'the CPU'
    if info.get('no_cuda'):
        devices += f' only, because {info["no_cuda"]}'
    packing = importlib.import_module('dsnet_mm.ops.packing')
    torch = importlib.import_module('torch')
    amx = ', bfloat16 by AMX' if torch.bfloat16 in packing.PACKED_DTYPES else ''
    return f'compiled for {devices}{amx}'


def co_attention_path(device: str) -> str:
    """Returns the implementation of the co-attention on a device type, and why."""
    ops = importlib.import_module('dsnet_mm.ops')
    try:
        path, reason = ops.select_path(device)
    except ValueError as error:
        return str(error)
    return f'{path} ({reason})'


def nvcc_version() -> str:
    """Returns the release of nvcc, or 'none'."""
    if not shutil.which('nvcc'):
        return 'none'
    out = subprocess.run(['nvcc', '--version'], capture_output=True, text=True).stdout
    return next((w for w in out.split() if w.startswith('V')), 'unknown').lstrip('V')


def python_version() -> str:
    """Returns the version of the running Python."""
    return '.'.join(map(str, sys.version_info[:3]))


def commit() -> str:
    """Returns the commit of the source code, with a + if files are changed.

    It is 'unknown' if the package is not in its repository.
    """

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:  # no git
            return ''
        return done.stdout.strip()

    if not git('ls-files', Path(__file__).name):
        return 'unknown'  # installed into an environment in the repository of others
    # Stored results do not count as a change.
    others = (':(top)', ':(top,exclude)results')
    changed = git('status', '--porcelain', '--untracked-files=no', '--', *others)
    return git('rev-parse', '--short=10', 'HEAD') + '+' * bool(changed)


def machine() -> dict[str, str | int | None]:
    """Returns the processor, its instructions and the number of threads."""
    import torch

    try:
        text = Path('/proc/cpuinfo').read_text()
        name = re.search(r'model name\s*: (.*)', text)[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return dict(
        processor=name,
        cores=os.cpu_count(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
    )

"""What is installed, whether it fits together, and what to do if not."""

import importlib
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from packaging.version import Version

# Import name -> distributions that provide it, the one we pin first.
DISTRIBUTIONS = {
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
    'open_clip': ('open_clip_torch',),
}
# Import name -> lowest version that works, first version that is not known to.
SUPPORTED = {
    'mmengine': ('0.10.4', '1.0'),
    'mmcv': ('2.0.0', '2.4'),
    'mmdet': ('3.2.0', '4.0'),
    'mmpretrain': ('1.2.0', '2.0'),
    'open_clip': ('3.0', '4.0'),
}
# Those without which nothing works; the others are for a part each.
REQUIRED = ('mmengine', 'mmcv')
# Import name -> version of the maintained line that this package is tested with.
PINNED = {
    'mmengine': '0.10.12',
    'mmcv': '2.3.6',
    'mmdet': '3.5.1',
    'mmpretrain': '1.3.6',
}


class Installed(NamedTuple):
    """An installed package: its distributions and the version of the first."""

    distributions: tuple[str, ...]
    version: str


def find_installed(name: str) -> Installed | None:
    """Looks a package up by its import name, without importing it."""
    found = {}
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return Installed(tuple(found), next(iter(found.values()))) if found else None


def install_command(name: str) -> str:
    """Returns the command that installs a package as this project pins it."""
    pin = DISTRIBUTIONS[name][0]
    if name in PINNED:
        pin += f'=={PINNED[name]}'
    flag = '' if name in ('mmengine', 'open_clip') else '--no-build-isolation '
    return f'pip install {flag}{pin}'


def require(*names: str, user: str) -> None:
    """Checks that packages are there in a version that works.

    Args:
        *names: Import names, keys of ``SUPPORTED``.
        user: What needs them, for the message.

    Raises:
        ImportError: If one is missing or outside the supported versions.
    """
    for name in names:
        low, high = SUPPORTED[name]
        installed = find_installed(name)
        if installed is None:
            found = 'is not installed'
        elif not Version(low) <= Version(installed.version) < Version(high):
            found = f'is {installed.version} here'
        else:
            continue
        raise ImportError(
            f'{user} needs {name} (>={low}, <{high}), which {found}; '
            f'{install_command(name)}'
        )


def find_problems() -> list[str]:
    """Returns one sentence for each thing that does not fit, with its remedy."""
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
                f'{both} are both installed and write the same files of {name}; '
                f'pip uninstall {" ".join(installed.distributions)}, then '
                f'{install_command(name)}'
            )
    try:
        importlib.import_module('cv2')
    except ImportError as error:
        problems.append(
            f'OpenCV does not import ({error}); pip uninstall opencv-python '
            f'opencv-python-headless, then pip install opencv-python-headless'
        )
    if find_spec('mmcv') and not mmcv_ops()[0]:
        problems.append(
            f'mmcv has no compiled ops, so mmdet does not work ({mmcv_ops()[1]}); '
            f'with torch installed first: pip install --no-cache-dir '
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
    """Tells whether mmcv's compiled ops load, and for what, or why not."""
    try:
        importlib.import_module('mmcv._ext')
        ops = importlib.import_module('mmcv.ops')
    except ImportError as error:
        return False, str(error)
    cuda = ops.get_compiling_cuda_version()
    return True, 'CPU' if cuda == 'not available' else f'CPU and CUDA {cuda}'


def ops_build() -> str:
    """Tells what the ops are compiled for, or why they are not there."""
    native = importlib.import_module('dsnet_mm.ops.native')
    if native.WHY_NOT:
        return native.WHY_NOT
    cuda = native.build_info().get('cuda')
    devices = f'CPU and CUDA {cuda}' if cuda else 'the CPU'
    packing = importlib.import_module('dsnet_mm.ops.packing')
    torch = importlib.import_module('torch')
    amx = ', bfloat16 by AMX' if torch.bfloat16 in packing.PACKED_DTYPES else ''
    return f'compiled for {devices}{amx}'


def co_attention_path(device: str) -> str:
    """Tells how the co-attention is computed on a type of device, and why."""
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

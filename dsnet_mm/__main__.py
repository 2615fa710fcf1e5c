"""``python -m dsnet_mm`` reports packages, compiled ops, and problems of either."""

import importlib
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec

import torch
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from . import __version__
from .environment import REQUIRED, SUPPORTED, find_installed, install_command, require
from .ops import native, select_path
from .ops.packing import PACKED_DTYPES


def find_problems() -> list[str]:
    """Returns one sentence for each problem of the installation, with its remedy."""
    problems = []
    for name in SUPPORTED:
        installed = find_installed(name)
        if name not in REQUIRED and not installed:
            continue
        try:
            require(name, user='dsnet_mm')
        except ImportError as error:
            problems.append(str(error))
            continue
        if len(installed.distributions) > 1:
            problems.append(
                f'{" and ".join(installed.distributions)} are both installed, but they '
                f'contain the same files; pip uninstall '
                f'{" ".join(installed.distributions)}, then {install_command(name)}'
            )
    try:
        importlib.import_module('cv2')
    except ImportError as error:
        problems.append(
            f'OpenCV cannot be imported ({error}); pip uninstall opencv-python '
            f'opencv-python-headless, then pip install opencv-python-headless'
        )
    if find_spec('mmcv') and not mmcv_ops()[0]:
        again = install_command('mmcv').replace(
            'pip install', 'pip install --no-cache-dir --force-reinstall --no-deps'
        )
        problems.append(
            f'mmcv has no compiled ops, so mmdet does not work ({mmcv_ops()[1]}); '
            f'install torch, then mmcv: {again}'
        )
    mmengine, setuptools = find_installed('mmengine'), find_installed('setuptools')
    official = mmengine and mmengine.distributions == ('mmengine',)
    if official and setuptools and Version(setuptools.version) >= Version('82'):
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
    if native.WHY_NOT:
        return native.WHY_NOT
    info = native.build_info()
    devices = f'CPU and CUDA {info["cuda"]}' if info.get('cuda') else 'the CPU'
    if info.get('no_cuda'):
        devices += f' only, because {info["no_cuda"]}'
    types = ', float32 and bfloat16' if torch.bfloat16 in PACKED_DTYPES else ''
    return f'compiled for {devices}{types}'


def co_attention_path(device: str) -> str:
    """Returns the implementation of the co-attention on a device type, and why."""
    try:
        return '{} ({})'.format(*select_path(device))
    except ValueError as error:
        return str(error)


def nvcc_version() -> str:
    """Returns the release of nvcc, or 'none'."""
    if not shutil.which('nvcc'):
        return 'none'
    out = subprocess.run(['nvcc', '--version'], capture_output=True, text=True).stdout
    return next((w for w in out.split() if w.startswith('V')), 'unknown').lstrip('V')


def main() -> int:
    """Prints the report. Returns 1 if there is a problem, else 0."""
    table = Table(
        'package',
        'version',
        'distribution, or command that installs it',
        title=f'dsnet_mm {__version__}',
    )
    table.add_row('python', platform.python_version(), '')
    for name in ('torch', 'torchvision', *SUPPORTED):
        installed = find_installed(name)
        if installed:
            table.add_row(name, installed.version, ', '.join(installed.distributions))
        else:
            advice = install_command(name) if name in SUPPORTED else ''
            table.add_row(name, 'not installed', advice)

    mmengine = find_installed('mmengine')
    onedl = mmengine and any(n.startswith('onedl') for n in mmengine.distributions)
    family = 'onedl (maintained)' if onedl else 'official' if mmengine else 'none'
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    compiled, detail = mmcv_ops()
    cuda = torch.version.cuda
    facts = {
        'OpenMMLab family': family,
        'torch is compiled for': f'CUDA {cuda}' if cuda else 'CPU',
        'GPUs': ', '.join(gpus) or 'none',
        'nvcc': nvcc_version(),
        'mmcv ops': f'{"compiled for" if compiled else "not available:"} {detail}',
        'dsnet_mm ops': ops_build(),
    }
    for device in ('cpu', 'cuda') if gpus else ('cpu',):
        facts[f'dsnet_mm co-attention on {device}'] = co_attention_path(device)
    console = Console()
    console.print(table)
    for name, value in facts.items():
        console.print(f'{name}: {value}', highlight=False)
    problems = find_problems()
    for problem in problems:
        console.print(f'[red]Problem:[/red] {problem}', highlight=False, soft_wrap=True)
    if not problems:
        console.print('[green]No problem was found.[/green]')
    return bool(problems)


if __name__ == '__main__':
    sys.exit(main())

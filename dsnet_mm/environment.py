"""Installed packages, devices, and what a recorded run names: commit and machine."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
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
    # Stored results, and pages that are made of them, do not count as a change.
    others = (':(top)', ':(top,exclude)results', ':(top,exclude)docs')
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

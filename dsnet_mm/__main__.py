"""``python -m dsnet_mm`` reports packages, compiled ops, and problems of either."""

import sys

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from .environment import (
    SUPPORTED,
    co_attention_path,
    find_installed,
    find_problems,
    install_command,
    mmcv_ops,
    nvcc_version,
    ops_build,
    python_version,
)


def main() -> int:
    """Prints the report. Returns 1 if there is a problem, else 0."""
    table = Table(
        'package',
        'version',
        'distribution, or command that installs it',
        title=f'dsnet_mm {__version__}',
    )
    table.add_row('python', python_version(), '')
    for name in ('torch', 'torchvision', *SUPPORTED):
        installed = find_installed(name)
        if installed:
            table.add_row(name, installed.version, ', '.join(installed.distributions))
        else:
            advice = install_command(name) if name in SUPPORTED else ''
            table.add_row(name, 'not installed', advice)

    mmengine = find_installed('mmengine')
    family = 'none'
    if mmengine:
        onedl = any(name.startswith('onedl') for name in mmengine.distributions)
        family = 'onedl (maintained)' if onedl else 'official'
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available, detail = mmcv_ops()
    facts = {
        'OpenMMLab family': family,
        'torch is compiled for': f'CUDA {torch.version.cuda}'
        if torch.version.cuda
        else 'CPU',
        'GPUs': ', '.join(torch.cuda.get_device_name(i) for i in range(gpus)) or 'none',
        'nvcc': nvcc_version(),
        'mmcv ops': f'compiled for {detail}'
        if available
        else f'not available: {detail}',
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

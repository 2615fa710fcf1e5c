"""Parameters and multiply-adds of a configuration, or of the published models.

python tools/analysis_tools/get_flops.py configs/dsnet/dsnet-tiny_8xb128_in1k.py
python tools/analysis_tools/get_flops.py dsnet    # beside the paper's tables
python tools/analysis_tools/get_flops.py dsfpn    # choices of DS-FPN

The paper's tables count every projection at full resolution; the blocks here project
the global half of the channels at its low resolution, which gives the same. "dsnet"
counts the published order, and beside it what is "computed here", as all else does.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from dsnet_mm.models import DSFPN, DSNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/

from measure.complexity import Complexity, count_complexity
from measure.rows import PlainDSNet

# Table 4 and Table 2 of the paper: parameters in millions, multiply-adds in
# billions. The 48.8 M of B without ISA cannot be: B* has 49.3 M, and ISA alone 7.5 M.
PAPER = {
    'DS-Net-T': (dict(arch='tiny', isa=False), '9.1', '1.6'),
    'DS-Net-T*': (dict(arch='tiny'), '10.5', '1.8'),
    'DS-Net-S': (dict(arch='small', isa=False), '19.7', '3'),
    'DS-Net-S*': (dict(arch='small'), '23', '3.5'),
    'DS-Net-B': (dict(arch='base', isa=False), '48.8', '7.6'),
    'DS-Net-B*': (dict(arch='base'), '49.3', '8.4'),
    'T, alpha=0': (dict(arch='tiny', isa=False, alpha=0.0), '8.6', '1.573'),
    'T, alpha=0.25': (dict(arch='tiny', isa=False, alpha=0.25), '8.7', '1.578'),
    'T, alpha=0.5': (dict(arch='tiny', isa=False, alpha=0.5), '9.1', '1.592'),
    'T, alpha=0.75': (dict(arch='tiny', isa=False, alpha=0.75), '9.8', '1.615'),
    'T, alpha=1': (dict(arch='tiny', isa=False, alpha=1.0), '10.7', '1.647'),
}

DSFPN_CHOICES = {
    'plain FPN': dict(num_plain_levels=4, add_extra_convs=False),
    'default': dict(),
    'isa=False': dict(isa=False),
    'smooth=False': dict(smooth=False),
    'project_first=False': dict(project_first=False),
    'project_first=False, isa=False': dict(project_first=False, isa=False),
    'num_plain_levels=0': dict(num_plain_levels=0),
    'alpha=0.25, isa=False': dict(alpha=0.25, isa=False),
}


class Classifier(nn.Module):
    """A backbone, average pooling of its last map and a linear layer."""

    def __init__(self, backbone: DSNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def published_models() -> Iterator[tuple[str, str, str, Complexity, Complexity]]:
    """Yields name, published parameters and multiply-adds, and our counts.

    They are those of the published order of operations, and of this package's.
    """
    image = torch.zeros(1, 3, 224, 224)
    for name, (backbone, params, multiply_adds) in PAPER.items():
        models = (Classifier(kind(**backbone)) for kind in (PlainDSNet, DSNet))
        counts = (count_complexity(model, image) for model in models)
        yield name, params, multiply_adds, *counts


def dsfpn_choices(height: int, width: int) -> Iterator[tuple[str, Complexity]]:
    """Yields each choice of the neck and its counts behind a DS-Net."""
    channels = (64, 128, 320, 512)
    maps = [
        torch.zeros(1, c, height // stride, width // stride)
        for c, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    for name, options in DSFPN_CHOICES.items():
        neck = DSFPN(channels, out_channels=256, num_outs=5, **options)
        yield name, count_complexity(neck, maps)


def count_config(
    path: Path, options: dict | None, shape: tuple[int, int]
) -> Complexity:
    """Counts the model of a configuration on one image of ``shape``."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    # A detector's ``forward`` wants its samples, ``_forward`` the tensor path.
    if hasattr(model, '_forward'):
        model.forward = model._forward
    return count_complexity(model, torch.zeros(1, 3, *shape))


def row(counts: Complexity) -> tuple[str, str, str]:
    """Returns the cells of a count: parameters, multiply-adds, all operations."""
    return (
        f'{counts.params / 1e6:.2f}',
        f'{counts.multiply_adds / 1e9:.3f}',
        f'{(counts.multiply_adds + counts.elementwise) / 1e9:.3f}',
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description='Count parameters and multiply-adds.')
    parser.add_argument('target', help='a configuration file, "dsnet" or "dsfpn"')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        help='height and width of the image, or one number for both '
        '(default: 224, for detection and dsfpn 800 1344)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args(argv)
    if args.shape and len(args.shape) > 2:
        parser.error(f'--shape takes one or two numbers, got {args.shape}.')

    columns = ('params, M', 'MACs, G', '+ element-wise')
    uncounted: tuple[str, ...] = ()
    if args.target == 'dsnet':
        table = Table(
            Column(no_wrap=True),
            *columns,
            'paper: M, G',
            'MACs as computed here',
            title='224 x 224',
        )
        for name, params, multiply_adds, counts, ours in published_models():
            paper = f'{params}, {multiply_adds}'
            table.add_row(name, *row(counts), paper, row(ours)[1])
    elif args.target == 'dsfpn':
        height, width = ((args.shape or [800, 1344]) * 2)[:2]
        table = Table('', *columns, title=f'DS-FPN, {height} x {width}')
        for name, counts in dsfpn_choices(height, width):
            table.add_row(name, *row(counts))
    else:
        path = Path(args.target)
        if not path.is_file():
            parser.error(
                f'{path} is neither a configuration file nor "dsnet" or "dsfpn".'
            )
        detection = Config.fromfile(path).get('default_scope') == 'mmdet'
        default = [800, 1344] if detection else [224]
        height, width = ((args.shape or default) * 2)[:2]
        counts = count_config(path, args.cfg_options, (height, width))
        uncounted = counts.uncounted
        table = Table(*columns, title=f'{path.name}, {height} x {width}')
        table.add_row(*row(counts))
    Console().print(table)
    if uncounted:
        print('Not counted:', ', '.join(uncounted))


if __name__ == '__main__':
    main()

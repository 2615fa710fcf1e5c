"""``tools/few_shot.py encode``: a data set into a file of features."""

import argparse
import os

import torch

from dsnet_mm.few_shot.config import FewShotConfig
from dsnet_mm.few_shot.encode import encode, share_of_torchrun

from .arguments import add_data_arguments, read_options


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        'encode',
        help='encode a data set into a file for run --features',
        description='Several processes share the work: torchrun --nproc-per-node 4 '
        'tools/few_shot.py encode ... On machines without a common torchrun, set RANK '
        'and WORLD_SIZE; they need a common cache_dir. The same command continues '
        'after an interruption, with any number of processes.',
    )
    add_data_arguments(parser)
    parser.add_argument('--out', required=True, help='file to write, .safetensors')
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Runs the command."""
    options = read_options(args, ())
    shots = options.pop('shots', None)
    rank, processes = share_of_torchrun()
    if processes > 1 and torch.cuda.is_available():
        options.setdefault('device', f'cuda:{os.environ.get("LOCAL_RANK", 0)}')
    try:
        config = FewShotConfig(**options)
    except TypeError as error:
        raise ValueError(f'unknown option: {error}.') from error
    missing = encode(
        config,
        args.out,
        None if shots is None else tuple(shots),
        (rank, processes),
        quiet=int(os.environ.get('LOCAL_RANK', 0)) > 0,
    )
    if missing:
        print(
            f'process {rank} of {processes} is done; {missing} images are missing, '
            f'and the process that encodes the last of them writes {args.out}. If no '
            f'other process is at work, call the command again.'
        )
    else:
        print(f'{args.out} is written; tools/few_shot.py run --features {args.out}')

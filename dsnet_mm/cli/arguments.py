"""Command-line arguments that the tools have in common."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import DictAction


class CfgOptions(DictAction):
    """MMEngine's KEY=VALUE options, with an error for what is not one.

    MMEngine removes blanks from values and splits them at commas.
    ``data_root`` is a path and is kept as it is.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)
        for value in values:
            key, _, text = value.partition('=')
            if key == 'data_root':
                getattr(namespace, self.dest)[key] = text


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``config`` and ``--cfg-options``."""
    parser.add_argument(
        'config', help='configuration file, or name of one of this package'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='set values of the configuration, such as train_dataloader.batch_size=4; '
        'data_root=PATH moves all data sets and evaluators to that folder',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--work-dir``, ``--launcher`` and ``--local-rank``."""
    parser.add_argument(
        '--work-dir', help='folder of results (default: work_dirs/<configuration>)'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help='comes from torch.distributed.launch; torchrun does without',
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--trust-checkpoint``."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='load checkpoints that can run programs; for old files of your own',
    )


@contextmanager
def user_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns errors of files and values into a sentence and exit code 2."""
    try:
        yield
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))

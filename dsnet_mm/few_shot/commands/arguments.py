"""Arguments that several commands have."""

import argparse

from dsnet_mm.environment import install_command

try:
    from mmengine.config import Config, DictAction
except ImportError:  # These commands need mmengine for the two options below only.
    Config, DictAction = None, 'store'


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a data set and an encoder."""
    parser.add_argument('config', nargs='?', help='configuration file')
    parser.add_argument('--dataset', help='name, folder or CSV file')
    parser.add_argument('--model', help='model of open_clip, or a JSON file')
    parser.add_argument('--pretrained', help='tag or file of its weights')
    parser.add_argument(
        '--download',
        action='store_true',
        default=None,
        help='fetch weights that are not here',
    )
    parser.add_argument('--data-root', help='folder of the public data sets')
    parser.add_argument(
        '--device', help='device of the encoder (default: auto, a GPU if there is one)'
    )
    parser.add_argument(
        '--shots', nargs='+', type=int, help='training images of each class'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='other options, see FewShotConfig, such as views=0 or '
        'overrides.clip_adapter.alpha=0.5',
    )


def read_options(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """Returns the options of a configuration file and of the command line.

    Args:
        args: The parsed arguments.
        names: Those that are options and were added to ``add_data_arguments``.

    Raises:
        ImportError: If they need mmengine, which is not installed.
        ValueError: If the file has no ``few_shot``.
    """
    options: dict = {}
    if Config is None and (args.config is not None or args.cfg_options):
        raise ImportError(
            f'a configuration file, or --cfg-options, needs mmengine; '
            f'{install_command("mmengine")}'
        )
    if args.config is not None:
        found = Config.fromfile(args.config).get('few_shot')
        if found is None:
            raise ValueError(f'{args.config} has no few_shot=dict(...).')
        options = found.to_dict()
    for key in (
        'dataset',
        'model',
        'pretrained',
        'download',
        'data_root',
        'device',
        'shots',
        *names,
    ):
        if getattr(args, key) is not None:
            options[key] = getattr(args, key)
    if args.cfg_options:
        nested = Config(options)
        nested.merge_from_dict(args.cfg_options)
        options = nested.to_dict()
    return options

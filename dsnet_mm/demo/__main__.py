"""The interactive demo: objects and both streams of DS-Net, classes by CLIP-Adapter.

It is on this machine only, unless --host says otherwise. Stop it by Ctrl+C.
"""

import argparse
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from dsnet_mm.engine.launch import user_errors
from dsnet_mm.environment import existing_device

CONFIG = 'mask_rcnn_dsnet_nuclei'
REPOSITORY = Path(__file__).parents[2]
WEIGHTS = REPOSITORY / 'weights' / f'{CONFIG}.safetensors'
EXAMPLE = REPOSITORY / 'docs' / 'images' / 'nuclei.jpg'
NO_WEIGHTS = (
    f'There are no weights of a detector here: an installed wheel does not hold those '
    f'of `{CONFIG}`. Start the page with `--weights FILE`, and for another model with '
    f'`--config CONFIG --weights FILE`.'
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the arguments and checks those that need no model."""
    parser = argparse.ArgumentParser(
        prog='python -m dsnet_mm.demo', description=__doc__
    )
    parser.add_argument(
        '--config',
        default=CONFIG,
        help='detector: configuration file, or name of one of this package '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--weights',
        help='its checkpoint file (default: the one in weights/ of the repository)',
    )
    parser.add_argument(
        '--model',
        help='image encoder for a few images per class: model of open_clip, a JSON '
        'file, or timm:NAME (default: EfficientNet-Lite0)',
    )
    parser.add_argument('--pretrained', help='tag or file of its weights')
    parser.add_argument(
        '--download', action='store_true', help='fetch its weights if not here'
    )
    parser.add_argument('--device', default='auto', help='device of both')
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen at (%(default)s)'
    )
    parser.add_argument(
        '--trusted-host',
        nargs='+',
        default=[],
        metavar='NAME',
        help='further names or addresses under which browsers open the page',
    )
    parser.add_argument('--port', type=int, help='port (default: first free from 7860)')
    args = parser.parse_args(argv)
    if args.weights is None and args.config != CONFIG:
        parser.error(f'--config {args.config} needs --weights FILE')
    if args.pretrained and not args.model:
        parser.error(f'--pretrained {args.pretrained} needs --model MODEL')
    if find_spec('gradio') is None:
        parser.error("the page needs gradio; pip install 'dsnet_mm[demo]'")
    args.parser = parser
    return args


def launch(args: argparse.Namespace, folder: Path) -> 'tuple[gradio.Blocks, str]':  # noqa: F821
    """Loads the models and starts the page.

    Args:
        args: What :func:`parse_args` returned.
        folder: Empty folder for uploads and other files.

    Returns:
        The page, and its address.
    """
    # Gradio reads both when it is imported, or when a page is built.
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    os.environ['GRADIO_TEMP_DIR'] = str(folder / 'uploads')
    from .actions import MAX_BYTES, Detector, load_encoder
    from .guard import GuardedApp
    from .page import CSS, THEME, Page

    with user_errors(args.parser):
        device = existing_device(args.device)
        weights = args.weights or (str(WEIGHTS) if WEIGHTS.is_file() else None)
        detector = NO_WEIGHTS
        if weights:
            detector = Detector(args.config, weights, device)
        encoder = None
        if args.model:
            encoder = load_encoder(args.model, args.pretrained, args.download, device)
        own = args.config == CONFIG and EXAMPLE.is_file()
        page = Page(detector, encoder, folder / 'uploads', EXAMPLE if own else None)
    blocks, host = page.build(), args.host.strip('[]')
    trusted = ['localhost', '127.0.0.1', '::1', host, *args.trusted_host]
    try:
        _, address, _ = blocks.launch(
            server_name=f'[{host}]' if ':' in host else host,
            server_port=args.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_BYTES,
            ssr_mode=False,
            footer_links=[],
            theme=THEME,
            css=CSS,
            state_session_capacity=100,
            _app=GuardedApp(trusted),
        )
    except OSError:
        args.parser.error(
            f'the page cannot listen at {args.host}, port {args.port or "7860 to 7959"}'
            f'; choose another --host or --port'
        )
    return blocks, address


@contextmanager
def own_folder() -> Iterator[Path]:
    """Gives a temporary folder, and removes those that killed pages have left."""

    def lock(folder: str | Path) -> None:
        """Locks a folder until this process ends, however it ends, or fails."""
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    prefix = 'dsnet_mm_page_'
    for left in Path(tempfile.gettempdir()).glob(f'{prefix}*'):
        with suppress(OSError):  # of a running page, or of another user
            lock(left)
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f'{prefix}{os.getpid()}_') as folder:
        lock(folder)
        yield Path(folder)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl+C does: files are removed
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), own_folder() as folder:
        tempfile.tempdir = str(folder)  # of all files of this process
        blocks, address = launch(args, folder)
        print(f'The page is at {address}; stop it by Ctrl+C.', flush=True)
        blocks.block_thread()


if __name__ == '__main__':
    main()

"""Find objects in images, or classify them.

Writes into the folder OUT: predictions.json in COCO's result format, images.json with
the images, classes and failures, and the drawn images. predictions.jsonl grows with
each image; a stopped command goes on with --resume. The exit status is 1 if an image
could not be read.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsnet_mm.checkpoint import restricted_loading
from dsnet_mm.engine.config import load_config
from dsnet_mm.engine.launch import (
    OldFlag,
    add_config_arguments,
    add_trust_argument,
    user_errors,
)
from dsnet_mm.files import PART, print_any_name, remove_parts, write_atomic
from dsnet_mm.progress import progress_bar

from .drawing import draw
from .predictor import Predictor, list_images
from .results import Results, version_of

MAX_NAME = 255  # bytes of the name of a file


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('image', type=Path, help='image, or folder of images')
    parser.add_argument('--out', type=Path, required=True, help='new folder of results')
    parser.add_argument(
        '--device', help='cpu, cuda, cuda:1 ... (default: a GPU, if any)'
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='images or tiles in a forward'
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='minimum score of an object'
    )
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold batch norms into the layers beside them (fuse_for_inference)',
    )
    parser.add_argument(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='cut images into tiles of this side, and make one object of its parts',
    )
    parser.add_argument(
        '--overlap',
        type=int,
        default=128,
        metavar='PIXELS',
        help='overlap of tiles, larger than a common object',
    )
    parser.add_argument(
        '--adapter',
        nargs='+',
        default=[],
        metavar='FILE',
        help='use an adapter of the detector; "auto FILE ..." uses the nearest one, or '
        'none, for each image',
    )
    parser.add_argument(
        '--no-images', action='store_true', help='do not draw the images'
    )
    parser.add_argument('--no-pictures', action=OldFlag, new='--no-images')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='go on in OUT, where the same command was stopped',
    )
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    print_any_name()
    lines = args.out / 'predictions.jsonl'

    with user_errors(parser), restricted_loading(trust=args.trust_checkpoint):
        check_out(args.out, lines, args.resume)
        # OUT may be inside the folder of images.
        out = args.out.absolute()
        paths = [x for x in list_images(args.image) if out not in x.absolute().parents]
        predictor = Predictor(
            args.config,
            args.checkpoint,
            device=args.device,
            batch_size=args.batch_size,
            score_thr=args.score_thr,
            fuse=args.fuse,
            tile=args.tile,
            overlap=args.overlap,
            cfg_options=args.cfg_options,
            adapters=args.adapter,
        )
        results = Results(lines, describe(args))
    root = args.image if args.image.is_dir() else args.image.parent
    names = {path: str(path.relative_to(root)) for path in paths}
    drawn = {} if args.no_images else drawn_names(names.values())
    failed: dict[str, str] = {}
    # A stopped run makes the same batches again.
    size = 1 if args.tile else args.batch_size
    try:
        remove_parts(args.out)
        with progress_bar(len(paths), 'reading', 'images') as bar:

            def track(chunks: list) -> Iterator:
                for i, chunk in enumerate(chunks, 1):
                    if args.tile:
                        now = f'forward {i} of {len(chunks)}'
                        bar.set_postfix_str(now, refresh=False)
                        bar.update(0)
                    yield chunk

            for start in range(0, len(paths), size):
                batch = {names[path]: path for path in paths[start : start + size]}
                if not all(results.has(*item) for item in batch.items()):
                    for record, image in work(predictor, batch, drawn, failed, track):
                        if image is not None:
                            name = drawn[record['file_name']]
                            write_atomic(args.out / 'images' / name, image)
                        results.add(record)
                bar.update(len(batch))
        found = results.join(args.out, names.values(), predictor.class_names, failed)
    except (OSError, KeyboardInterrupt) as error:
        parser.error(f'{str(error) or "stopped"}; --resume goes on from here')

    table = Table('class', 'objects' if predictor.detects else 'images')
    for name, count in found:
        table.add_row(escape(name), str(count))
    Console().print(table)
    for name, reason in failed.items():
        print(f'{root / name} was skipped: {reason}')
    print(
        f'{len(paths) - len(failed)} of {len(paths)} images were read. Results are in '
        f'{args.out}.'
    )
    if failed:
        sys.exit(1)


def check_out(out: Path, lines: Path, resume: bool) -> None:
    """Refuses a folder with content, unless it is that of a run to be resumed."""
    if lines.is_file():
        if not resume:
            raise ValueError(f'{out} exists; add --resume, or choose another folder')
    elif out.is_file() or (out.is_dir() and {x.suffix for x in out.iterdir()} - {PART}):
        raise ValueError(f'{out} exists and is left alone; choose another folder')


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the results of a command depend on, apart from the images."""
    cfg = load_config(args.config, args.cfg_options)
    weights = Path(args.checkpoint)  # or an address
    content = weights.read_bytes() if weights.is_file() else args.checkpoint.encode()
    keys = ('batch_size', 'score_thr', 'fuse', 'tile', 'overlap', 'no_images')
    if args.adapter:
        files = [Path(name).read_bytes() for name in args.adapter if name != 'auto']
        content += b''.join([args.adapter[0].encode(), *files])
    return dict(
        config=sha256(repr(cfg.to_dict()).encode()).hexdigest(),
        checkpoint=sha256(content).hexdigest(),
        **{key: getattr(args, key) for key in keys},
    )


def drawn_names(names: Collection[str]) -> dict[str, str]:
    """Returns the name of each drawn image: its own, and ``.jpg`` if it is no PNG.

    It is a hash if the name is taken or too long.
    """
    drawn, taken = {}, set(names)
    for name in names:
        path = Path(name)
        if path.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
            path = path.with_name(f'{path.name}.jpg')
            if str(path) in taken or len(os.fsencode(path.name)) > MAX_NAME:
                path = path.with_name(f'{sha256(os.fsencode(name)).hexdigest()}.jpg')
        drawn[name] = str(path)
    return drawn


def work(
    predictor: Predictor,
    batch: dict[str, Path],
    drawn: dict[str, str],
    failed: dict[str, str],
    track: Callable[[Iterable], Iterable],
) -> Iterator[tuple[dict, bytes | None]]:
    """Yields the results of a batch of images. A bad image does not end it.

    Args:
        predictor: The predictor.
        batch: Files by name.
        drawn: Names of the drawn images, empty if none are drawn.
        failed: Where the reason is written if there is no result.
        track: See :class:`Predictor`.

    Yields:
        What :meth:`Results.add` takes, and the drawn image if there is one.
    """
    versions = {name: version_of(path) for name, path in batch.items()}
    images = {}
    for name, path in batch.items():
        try:
            images[name] = predictor.read(str(path))
        except ValueError as error:
            failed[name] = str(error)
    done = []
    try:
        predictions = list(predictor([*images.values()], track))
        for name, prediction in zip([*images], predictions, strict=True):
            record = dict(
                file_name=name,
                width=prediction.width,
                height=prediction.height,
                version=versions[name],
                found=prediction.to_coco(0),
            )
            encoded = None
            if name in drawn:
                # A large image is not kept while it is drawn.
                image = draw(images.pop(name), prediction, predictor.palette)
                _, encoded = cv2.imencode(Path(drawn[name]).suffix, image)
                encoded = encoded.tobytes()
            done.append((record, encoded))
    except Exception as error:  # of any type, such as memory that is short
        images.clear()
        read = [name for name in batch if name not in failed]
        if len(read) == 1:
            failed[read[0]] = f'{type(error).__name__}: {error}'
            return
        for name in read:
            yield from work(predictor, {name: batch[name]}, drawn, failed, track)
        return
    yield from done


if __name__ == '__main__':
    main()

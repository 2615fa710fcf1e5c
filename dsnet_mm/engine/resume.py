"""The checkpoint that a training goes on from, and the lock of its folder."""

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.weights import DamagedCheckpointError, check_finite

POINTER = 'last_checkpoint'
"""File of a working directory in which MMEngine names the latest checkpoint."""

STOPPED = 'stopped.pth'
"""Checkpoint of a training that a signal stopped, until there is a newer one."""


class WeightsOnlyError(ValueError):
    """A checkpoint has no state of a training."""


class PointerError(ValueError):
    """The file ``last_checkpoint`` names no checkpoint of its folder."""


KNOWN = (DamagedCheckpointError, WeightsOnlyError, PointerError)


def read_training_state(path: str) -> dict[str, Any]:
    """Reads a checkpoint that training can be resumed from.

    Args:
        path: As of :func:`dsnet_mm.checkpoint.read_checkpoint`.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read, or holds values that are not
            finite.
        WeightsOnlyError: If it has no state of a training.
        ValueError: If it is not safe to load, or holds no state dict.
    """
    checkpoint = read_checkpoint(path)
    meta, *others = (checkpoint.get(k) for k in ('meta', 'message_hub', 'optimizer'))
    if not (
        all(isinstance(part, dict) for part in others)
        and all(isinstance(meta.get(key), int) for key in ('epoch', 'iter'))
    ):
        raise WeightsOnlyError(
            f'{path} holds no whole state of a training (meta with epoch and iter, '
            f'message_hub, optimizer); start from its weights in another --work-dir '
            f'by --cfg-options load_from={path}'
        )
    ema = checkpoint.get('ema_state_dict')
    check_finite(ema if isinstance(ema, dict) else {}, path)
    return checkpoint


def examine(
    work_dir: str | Path, folder: str | Path | None = None
) -> tuple[str | None, dict[str, Exception]]:
    """Looks for the checkpoint that a training goes on from.

    It is the one that ``last_checkpoint`` names, as a file of this folder, so that a
    copy of a working directory goes on from its own files. If that is not usable, it is
    the newest one that is.

    Args:
        work_dir: Working directory.
        folder: Folder of the checkpoints, None for the working directory.

    Returns:
        The checkpoint, None if there is no usable one, and by their paths what is wrong
        with those that come before it.
    """
    pointer, folder = Path(work_dir, POINTER), Path(folder or work_dir)
    wrong, named, times = {}, '', {}
    try:
        named = pointer.read_text('utf-8').strip()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        wrong[str(pointer)] = PointerError(f'{pointer} cannot be read: {error}')
    if '://' in named:
        paths = [named]
    else:
        for path in folder.glob('*'):
            with suppress(OSError):  # another process may rename it now
                times[path.name] = path.stat().st_mtime
        name = PurePath(named).name
        if named and name not in times:
            wrong[str(pointer)] = PointerError(f'{pointer} names {named}, not there')
        names = [n for n in times if n == name or n.endswith('.pth')]
        names.sort(key=lambda n: (n != name, -times[n]))
        paths = [str(folder / n) for n in names]
    for path in paths:
        try:
            read_training_state(path)
            return path, wrong
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            wrong[path] = error
    return None, wrong


def find_checkpoint_to_resume(
    work_dir: str | Path, folder: str | Path | None = None, set_aside: bool = False
) -> str | None:
    """Finds the checkpoint of :func:`examine`, and warns of what was wrong.

    Args:
        work_dir: Working directory.
        folder: Folder of the checkpoints, None for the working directory.
        set_aside: Whether to rename damaged checkpoints to ``*.damaged``, which a
            training would overwrite otherwise.

    Returns:
        The checkpoint, or None if there is none and training starts anew.

    Raises:
        ValueError: If there is no usable checkpoint, but one that is not safe to load.
        OSError: If there is no usable checkpoint, but one that this user may not read.
    """
    found, wrong = examine(work_dir, folder)
    told = []
    for path, error in wrong.items():
        text = str(error)
        if isinstance(error, DamagedCheckpointError) and set_aside:
            aside = f'{path}.{time.strftime("%Y%m%d_%H%M%S")}.damaged'
            os.rename(path, aside)
            text += f' (renamed to {aside})'
        elif isinstance(error, WeightsOnlyError) and found:
            continue
        elif not found and not isinstance(error, KNOWN):
            raise error
        told.append(text)
    if told:
        goes_on = f'goes on from {found}' if found else f'starts anew in {work_dir}'
        warnings.warn(f'{"; ".join(told)}; training {goes_on}.', stacklevel=2)
    return found


@contextmanager
def only_training(work_dir: str | Path) -> Iterator[None]:
    """Keeps other trainings out of a working directory.

    The lock is one of the kernel on the file ``.lock``, also over NFS. It ends with the
    process, however that ends. The file says who has it.

    Raises:
        ValueError: If another training has it.
    """
    import fcntl  # not on Windows

    path = Path(work_dir, '.lock')
    with path.open('a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f'{work_dir} is in use by another training, {file.read()}; wait for '
                f'its end or choose another --work-dir; delete {path} only if that '
                f'process is certainly dead, as after the loss of its machine'
            ) from None
        except OSError as error:
            warnings.warn(
                f'{path} cannot be locked here ({error.strerror}); take care that '
                f'only one training writes to {work_dir}',
                stacklevel=3,
            )
        file.truncate(0)
        file.write(
            f'process {os.getpid()} on {socket.gethostname()} since {time.ctime()}'
        )
        file.flush()
        yield

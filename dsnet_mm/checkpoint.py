"""Checkpoints: reading without running what is in them, loading, finding the newest.

A checkpoint is a pickle, and a pickle can name any function to be called. MMEngine
reads it by ``torch.load``, which is replaced while :func:`restricted_loading` is
active. A file that ends with ``.safetensors`` is then read as a checkpoint too. It
holds tensors and text only.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader, find_latest_checkpoint
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dsnet_mm.files import check_card, check_file, write_atomic

try:  # NumPy 2, and NumPy 1.26 for pickles of NumPy 2
    from numpy._core import multiarray as _multiarray
except ImportError:
    from numpy.core import multiarray as _multiarray


def _get_statistic(owner: Any, name: str) -> Callable:
    """Replaces ``getattr``, through which a pickle could reach any function.

    A pickled HistoryBuffer names its statistics by it.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'GLOBAL getattr(..., {name!r})')
    return getattr(owner, name)


def _alias(function: Callable, module: str, name: str) -> Callable:
    """Returns a function that a pickle calls by another name."""

    def alias(*args: Any) -> Any:
        return function(*args)

    alias.__module__, alias.__name__, alias.__qualname__ = module, name, name
    return alias


# What MMEngine writes beside tensors and plain Python values: the histories of its
# log, and NumPy's arrays and numbers. NumPy 2 renamed numpy.core to numpy._core.
ALLOWED = [
    HistoryBuffer,
    _alias(_get_statistic, 'builtins', 'getattr'),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'},
    *(
        _alias(getattr(_multiarray, name), f'numpy.{core}.multiarray', name)
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ),
]

# ------------------------------------------------------------------------- reading


class DamagedCheckpointError(ValueError):
    """A file is no checkpoint, or only a part of one."""

    def __init__(self, path: Any) -> None:
        super().__init__(
            f'{path} cannot be read as a checkpoint; it is damaged or something else'
        )


_active = False


@contextmanager
def restricted_loading(trust: bool = False) -> Iterator[None]:
    """Lets ``torch.load`` build tensors and what MMEngine writes, nothing else.

    It reads ``.safetensors`` files too. It raises ValueError for a file that holds
    anything else. Where two of these contexts are nested, the outer one decides.

    Args:
        trust: Load any file, which can then run any program.
    """
    global _active
    if _active:
        yield
        return
    load = torch.load

    def read(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith('.safetensors'):
            return _read_safetensors(file)
        if trust:
            return load(file, *args, **{**kwargs, 'weights_only': False})
        return _read_restricted(load, file, *args, **{**kwargs, 'weights_only': True})

    _active, torch.load = True, read
    try:
        yield
    finally:
        _active, torch.load = False, load


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint under :func:`restricted_loading`.

    Args:
        path: Checkpoint file, ``.pth`` or ``.safetensors``, or an address that MMEngine
            knows.

    Returns:
        The checkpoint, on the CPU. Of a ``.safetensors`` file it is ``state_dict``,
        with half precision made single, and ``meta``, the texts of the file by name.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read.
        ValueError: If it is not safe to load, holds no state dict, or is not what its
            card describes (:func:`dsnet_mm.files.check_card`).
    """
    check_file(
        path,
        'checkpoint',
        'training writes them as .pth files, and weights/ holds .safetensors files',
    )
    check_card(path)
    try:
        with restricted_loading():
            checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DamagedCheckpointError(path) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, no state dict')
    return checkpoint


def _read_restricted(load: Callable, file: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls ``torch.load`` with :data:`ALLOWED` in the place of what others allow."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(ALLOWED)
    try:
        checkpoint = load(file, *args, **kwargs)
    except pickle.UnpicklingError as error:
        name = re.search(r'GLOBAL (\S+)', str(error))
        if not name:
            raise DamagedCheckpointError(file) from error
        raise ValueError(
            f'{file} is not safe to load: it names {name[1]}, which is neither a '
            f'tensor nor what MMEngine writes, and could run any program; if you trust '
            f'its source, add --trust-checkpoint, or load it in Python within '
            f'dsnet_mm.checkpoint.restricted_loading(trust=True)'
        ) from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        # Runner.resume would run this text as Python. MMEngine writes `cfg`.
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    try:
        with safe_open(str(path), framework='pt') as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = dict(file.metadata() or {})
    except SafetensorError as error:
        raise DamagedCheckpointError(path) from error
    meta.pop('config', None)  # as in _read_restricted
    half = (torch.float16, torch.bfloat16)
    state = {k: v.float() if v.dtype in half else v for k, v in state.items()}
    return dict(state_dict=state, meta=meta)


def write_safetensors(
    path: str | Path, state: dict[str, Tensor], meta: dict[str, str]
) -> None:
    """Writes weights in half precision. Tensors of integers stay as they are.

    Args:
        path: File to write.
        state: State dict of a model.
        meta: Texts to keep with it.

    Raises:
        ValueError: If a weight is too large for half precision.
    """
    half = {
        k: (v.half() if v.is_floating_point() else v).contiguous()
        for k, v in state.items()
    }
    infinite = [k for k, v in half.items() if not v.isfinite().all()]
    if infinite:
        raise ValueError(
            f'{len(infinite)} tensors are not finite in half precision, for example '
            f'{infinite[0]}; they cannot be written to {path}'
        )
    write_atomic(path, safetensors.torch.save(half, meta))


# ---------------------------------------------------------------- loading into a model


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside wrappers for several GPUs and flipped images."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def load_checkpoint(model: nn.Module, path: str) -> dict[str, Any]:
    """Loads a checkpoint that fits a model exactly.

    Only counters of batch norms (``num_batches_tracked``) may be missing.

    Args:
        model: The model, wrapped or not, see :func:`unwrap`.
        path: As of :func:`read_checkpoint`.

    Returns:
        The whole checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, not safe to load, or one of another
            model.
    """
    checkpoint = read_checkpoint(path)
    differing = []
    try:
        missing, unexpected = unwrap(model).load_state_dict(
            _state_dict(checkpoint), strict=False
        )
    except RuntimeError as error:  # the shapes; PyTorch names them in lines
        missing, unexpected = [], []
        differing = [line.strip() for line in str(error).splitlines()[1:]]
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    problems = [
        f'{len(keys)} tensors {what}, for example {keys[0]}'
        for keys, what in (
            (differing, 'have another shape'),
            (missing, 'are missing'),
            (unexpected, 'are unknown to the model'),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f'{path} does not fit the model of this configuration: '
            f'{"; ".join(problems)}; use the configuration it was trained with'
        )
    return checkpoint


def check_match(model: nn.Module, path: str) -> None:
    """Checks that a checkpoint has at least one tensor of a model.

    MMEngine only warns of a ``load_from`` that has none, and trains from random
    weights.

    Args:
        model: The model, wrapped or not, see :func:`unwrap`.
        path: As of :func:`read_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, not safe to load, or has no tensor with the
            name and the shape of one of the model.
    """
    state, own = _state_dict(read_checkpoint(path)), unwrap(model).state_dict()
    if not any(
        isinstance(value, Tensor) and key in own and own[key].shape == value.shape
        for key, value in state.items()
    ):
        raise ValueError(
            f'{path} has no tensor with the name and the shape of one of the model: '
            f'names in it are like {next(iter(state), "nothing")!r}, and those of the '
            f'model like {next(iter(own))!r}; set weights of a backbone alone by '
            f'model.backbone.init_cfg'
        )


def _state_dict(checkpoint: dict[str, Any]) -> dict[str, Any]:
    state = checkpoint.get('state_dict', checkpoint)
    consume_prefix_in_state_dict_if_present(state, 'module.')
    return state


# --------------------------------------------------------------------- the newest one


def newest_first(work_dir: str | Path) -> list[str]:
    """Returns the ``.pth`` files of a folder, the newest first."""
    files = Path(work_dir).glob('*.pth')
    return [str(f) for f in sorted(files, key=lambda f: -f.stat().st_mtime)]


def find_checkpoint_to_resume(work_dir: str) -> str | None:
    """Finds the latest checkpoint of a working directory that is not damaged.

    A training that is killed while it writes leaves a part of a file. The
    newest other checkpoint with the state of a training is then taken, with a
    warning.

    Args:
        work_dir: Working directory.

    Returns:
        The checkpoint, or None if there are none.

    Raises:
        FileNotFoundError: If the latest one is missing.
        ValueError: If the file that names it is missing, or if no checkpoint
            can be read.
    """
    files = newest_first(work_dir)
    named = Path(work_dir, 'last_checkpoint').is_file()
    if not files and not named:
        return None
    latest = find_latest_checkpoint(work_dir) if named else None
    if not latest:
        raise ValueError(
            f'{work_dir} holds checkpoints but no file last_checkpoint that names the '
            f'latest; name it by --resume CHECKPOINT'
        )
    try:
        read_training_state(latest)
        return latest
    except DamagedCheckpointError as error:
        for path in files:
            with suppress(ValueError):
                read_training_state(path)
                warnings.warn(f'{error}; training goes on from {path}.', stacklevel=2)
                return path
        raise


def read_training_state(path: str) -> dict[str, Any]:
    """Reads a checkpoint that training can be resumed from.

    Args:
        path: As of :func:`read_checkpoint`.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds weights only.
    """
    checkpoint = read_checkpoint(path)
    if not {'message_hub', 'optimizer'} <= checkpoint.keys():
        raise ValueError(
            f'{path} holds weights and no state of a training; start from it by '
            f'--cfg-options load_from={path}'
        )
    return checkpoint

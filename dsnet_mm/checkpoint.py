"""Checkpoints: reading, and loading into a model.

A checkpoint is a pickle, and a pickle can name any function to be called.
:mod:`dsnet_mm.weights` reads it without. A file that ends with ``.safetensors`` is read
as a checkpoint too. It holds tensors and text only.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dsnet_mm.files import check_file, write_atomic
from dsnet_mm.weights import (
    check_finite,
    check_kinds,
    read_file,
    restricted_loading,
)

# ------------------------------------------------------------------------- reading


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint under :func:`restricted_loading`.

    Args:
        path: Checkpoint file, ``.pth`` or ``.safetensors``, or an address that MMEngine
            knows.

    Returns:
        The checkpoint, on the CPU, with at least ``state_dict``, tensors by name, and
        ``meta``, a dict. Of a ``.safetensors`` file these are its tensors, with half
        precision made single, and its texts by name.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedCheckpointError: If it cannot be read, or holds values that are not
            finite.
        ValueError: If it is not safe to load, or holds no state dict.
    """
    check_file(
        path,
        'checkpoint',
        'training writes them as .pth files, and weights/ holds .safetensors files',
    )
    with restricted_loading():
        if '://' in path:
            checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
        else:
            checkpoint = read_file(path)
    if isinstance(checkpoint, dict) and 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    checkpoint = _checked(checkpoint, 'content', path)
    meta = _checked(checkpoint.setdefault('meta', {}), 'meta', path)
    names = _checked(meta.get('dataset_meta') or {}, 'dataset_meta', path)
    if not isinstance(names.get('classes') or [], list | tuple):
        raise ValueError(f'{path} holds class names that are no list')
    state = _checked(checkpoint['state_dict'], 'state_dict', path)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f'{path} holds no state dict: {name!r:.80} is no tensor, but of the '
                f'type {type(value).__name__}'
            )
    check_finite(state, path)
    return checkpoint


def _checked(value: Any, name: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(
            f'{path} is no checkpoint: its {name} is of the type '
            f'{type(value).__name__}, and must be a dict with names as keys'
        )
    return value


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
        ValueError: If it is no checkpoint, not safe to load, holds values that are not
            finite, or is one of another model.
    """
    checkpoint, model, differing = read_checkpoint(path), unwrap(model), []
    state = _fitting(checkpoint, model, path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:  # shapes; PyTorch names them in lines
        missing, unexpected = [], []
        lines = str(error).splitlines()
        differing = [line.strip() for line in lines[1:] or lines]
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
    model = unwrap(model)
    state, own = _fitting(read_checkpoint(path), model, path), model.state_dict()
    if not any(k in own and own[k].shape == v.shape for k, v in state.items()):
        raise ValueError(
            f'{path} has no tensor with the name and the shape of one of the model: '
            f'names in it are like {next(iter(state), "nothing")!r}, and those of the '
            f'model like {next(iter(own))!r}; set weights of a backbone alone by '
            f'model.backbone.init_cfg'
        )


def _fitting(checkpoint: dict[str, Any], model: nn.Module, path: str) -> dict[str, Any]:
    """Returns the state dict of a checkpoint, with numbers of the kind of the model."""
    state = checkpoint['state_dict']
    consume_prefix_in_state_dict_if_present(state, 'module.')
    check_kinds(model.state_dict(), state, path)
    return state

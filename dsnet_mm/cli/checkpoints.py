"""Finds, checks and loads the checkpoints that a run starts from."""

import warnings
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import find_latest_checkpoint
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dsnet_mm.checkpoint import DamagedCheckpointError, read_checkpoint
from dsnet_mm.files import check_file

from .config import dicts_in


def check_pretrained(cfg: Config) -> None:
    """Checks the checkpoints that weights are initialised from (``init_cfg``).

    Args:
        cfg: Configuration.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged or not safe to load.
    """
    for node in dicts_in(cfg.model):
        # None keeps a place for one, see DSNet.
        if node.get('type') == 'Pretrained' and node['checkpoint'] is not None:
            check_file(
                node['checkpoint'],
                'checkpoint',
                'the model starts from it (init_cfg); put it there or change the path '
                'by --cfg-options, as in model.backbone.init_cfg.checkpoint=PATH',
            )
            if '://' not in node['checkpoint']:
                read_checkpoint(node['checkpoint'])


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
    files = sorted(
        Path(work_dir).glob('*.pth'),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
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
            try:
                read_training_state(str(path))
            except ValueError:
                continue
            warnings.warn(f'{error}; training goes on from {path}.', stacklevel=2)
            return str(path)
        raise


def read_training_state(path: str) -> dict[str, Any]:
    """Reads a checkpoint that training can be resumed from.

    Args:
        path: Checkpoint file, or an address that MMEngine knows.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds weights only.
    """
    check_file(path, 'checkpoint', 'name one by --resume CHECKPOINT')
    checkpoint = read_checkpoint(path)
    if not {'message_hub', 'optimizer'} <= checkpoint.keys():
        raise ValueError(
            f'{path} holds weights and no state of a training; start from it by '
            f'--cfg-options load_from={path}'
        )
    return checkpoint


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside wrappers for several GPUs and flipped pictures."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def load_checkpoint(model: nn.Module, path: str) -> dict[str, Any]:
    """Loads a checkpoint that fits a model exactly.

    Only counters of batch norms (``num_batches_tracked``) may be missing.

    Args:
        model: The model, wrapped or not, see :func:`unwrap`.
        path: Checkpoint file, ``.pth`` or ``.safetensors``, or an address that
            MMEngine knows.

    Returns:
        The whole checkpoint, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, not safe to load, or one of another
            model.
    """
    check_file(
        path,
        'checkpoint',
        'give a .pth file that training wrote, or .safetensors weights',
    )
    checkpoint = read_checkpoint(path)
    state = checkpoint.get('state_dict', checkpoint)
    consume_prefix_in_state_dict_if_present(state, 'module.')
    differing = []
    try:
        missing, unexpected = unwrap(model).load_state_dict(state, strict=False)
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

"""Converts DS-Net classifiers of the public codes to mmpretrain, and back.

    python tools/model_converters/dsnet_to_mm.py SRC DST
    python tools/model_converters/dsnet_to_mm.py --reverse SRC DST

A public checkpoint is one of the PyTorch code, as a bare state dict or under ``model``,
or one of PaddleClas (``DSNet_{tiny,small,base}_pretrained.pdparams``). PaddleClas uses
the same names, but for the running statistics of batch norms, and has the weights of
linear layers transposed. Paddle is not needed. Ours fit
configs/dsnet/dsnet-{tiny,small,base}_8xb128_in1k.py. With ``--reverse``, a name that
ends with ``.pdparams`` gives the format of PaddleClas.
"""

import argparse
import codecs
import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.files import write_atomic
from dsnet_mm.models import DSNet

# Inside a block: public name -> name in dsnet_mm.
BLOCK_NAMES = {
    'pos_embed': 'pos_embed',
    'norm1': 'norm1',
    'conv1': 'proj_in',
    'norm_conv1': 'local_norm',
    'conv': 'local_conv',
    'norm_sa1': 'global_norm',
    'channel_up': 'global_qkv',
    'norm_conv2': 'isa.local_norm',
    'norm_sa2': 'isa.global_norm',
    'cross_channel_up_conv': 'isa.local_qkv',
    'cross_channel_up_sa': 'isa.global_qkv',
    'fuse_channel_conv': 'isa.local_proj',
    'fuse_channel_sa': 'isa.global_proj',
    'conv2': 'proj_out',
    'norm2': 'norm2',
    'mlp.fc1': 'ffn.fc1',
    'mlp.fc2': 'ffn.fc2',
}
PUBLIC_NAMES = {ours: public for public, ours in BLOCK_NAMES.items()}
# Name in PyTorch -> name in Paddle. Paddle does not count the batches.
STATISTICS = {'running_mean': '_mean', 'running_var': '_variance'}
COUNTER = 'num_batches_tracked'


def convert_key(key: str) -> str:
    """Renames one tensor of a public checkpoint.

    Raises:
        ValueError: If the name is not one of the public code.
    """
    module, _, tensor = key.rpartition('.')
    if module in ('norm', 'head'):
        return dict(norm='backbone.norm3.', head='head.fc.')[module] + tensor
    if match := re.fullmatch(r'patch_embed([1-4])\.proj', module):
        return f'backbone.patch_embeds.{int(match[1]) - 1}.projection.{tensor}'
    match = re.fullmatch(r'blocks([1-4])\.(\d+)\.(.+)', module)
    if match and match[3] in BLOCK_NAMES:
        name = BLOCK_NAMES[match[3]]
        return f'backbone.stages.{int(match[1]) - 1}.{match[2]}.{name}.{tensor}'
    raise ValueError(
        f'{key!r} is not a tensor of the public DS-Net code; the checkpoint is of '
        f'another model, or converted already.'
    )


def public_key(key: str) -> str:
    """Renames one tensor of ours; the inverse of :func:`convert_key`.

    Raises:
        ValueError: If it is not one of a classifier with DS-Net.
    """
    module, _, tensor = key.rpartition('.')
    if module in ('backbone.norm3', 'head.fc'):
        return {'backbone.norm3': 'norm.', 'head.fc': 'head.'}[module] + tensor
    if match := re.fullmatch(r'backbone\.patch_embeds\.([0-3])\.projection', module):
        return f'patch_embed{int(match[1]) + 1}.proj.{tensor}'
    match = re.fullmatch(r'backbone\.stages\.([0-3])\.(\d+)\.(.+)', module)
    if match and match[3] in PUBLIC_NAMES:
        name = PUBLIC_NAMES[match[3]]
        return f'blocks{int(match[1]) + 1}.{match[2]}.{name}.{tensor}'
    raise ValueError(
        f'{key!r} is not a tensor of a classifier with DS-Net; only those have public '
        f'names.'
    )


def check_complete(state: dict[str, Tensor]) -> None:
    """Checks names and shapes against a DS-Net of the same depths and widths.

    Args:
        state: State dict of ours.

    Raises:
        ValueError: If a tensor is missing, left over, or of another shape.
    """
    depths, widths = [0] * 4, [0] * 4
    for key, tensor in state.items():
        if match := re.match(r'backbone\.stages\.([0-3])\.(\d+)\.', key):
            stage = int(match[1])
            depths[stage] = max(depths[stage], int(match[2]) + 1)
        elif match := re.match(r'backbone\.patch_embeds\.([0-3])\..*bias', key):
            widths[int(match[1])] = len(tensor)
    if 0 in depths + widths:
        raise ValueError(
            f'the checkpoint has {depths} blocks and {widths} channels in the stages '
            f'of DS-Net; it is a part of one'
        )
    arch = dict(embed_dims=widths, depths=depths, num_heads=(1, 1, 1, 1))
    network = DSNet(arch).state_dict()
    expected = {f'backbone.{key}': tuple(t.shape) for key, t in network.items()}
    classes = len(state.get('head.fc.bias', ()))
    expected |= {'head.fc.weight': (classes, widths[3]), 'head.fc.bias': (classes,)}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differing = sorted(
        key
        for key in expected.keys() | shapes.keys()
        if expected.get(key) != shapes.get(key)
    )
    if differing:
        key = differing[0]
        raise ValueError(
            f'{len(differing)} tensors differ from those of DS-Net with {depths} '
            f'blocks, for example {key}: {shapes.get(key, "missing")} and not '
            f'{expected.get(key, "there")}'
        )


def to_ours(public: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames all tensors of a public checkpoint and checks that none is missing."""
    state = {convert_key(key): tensor for key, tensor in public.items()}
    check_complete(state)
    return state


def to_public(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames all tensors of ours; the inverse of :func:`to_ours`."""
    check_complete(state)
    return {public_key(key): tensor for key, tensor in state.items()}


def from_paddle(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Gives tensors of PaddleClas the names and layout of the public PyTorch code.

    Args:
        arrays: Those of a ``.pdparams`` file.
    """
    to_torch = {paddle: name for name, paddle in STATISTICS.items()}
    state = {}
    for key, array in arrays.items():
        name = key.rpartition('.')[2]
        prefix = key.removesuffix(name)
        # Paddle has (in, out) for linear layers, PyTorch (out, in).
        array = array.T if array.ndim == 2 else array
        name = to_torch.get(name, name)
        state[prefix + name] = torch.from_numpy(array.copy())
        if name == 'running_var':
            state[prefix + COUNTER] = torch.tensor(0)
    return state


def to_paddle(public: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_paddle`. The counters of batch norms are left out."""
    arrays = {}
    for key, tensor in public.items():
        name = key.rpartition('.')[2]
        if name != COUNTER:
            array = (tensor.T if tensor.ndim == 2 else tensor).contiguous().numpy()
            arrays[key.removesuffix(name) + STATISTICS.get(name, name)] = array
    return arrays


class PaddleUnpickler(pickle.Unpickler):
    """Reads what ``paddle.save`` writes: NumPy arrays by name. Refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns one of the few functions that such a file may call."""
        multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
        allowed = {
            'numpy.core.multiarray._reconstruct': multiarray._reconstruct,
            'numpy._core.multiarray._reconstruct': multiarray._reconstruct,
            'numpy.ndarray': np.ndarray,
            'numpy.dtype': np.dtype,
            # The bytes of an array in old pickles.
            '_codecs.encode': _encode_latin1,
            # Some versions of Paddle store a pair of name and array.
            'builtins.tuple': tuple,
            '__builtin__.tuple': tuple,
            'collections.OrderedDict': OrderedDict,
        }
        if f'{module}.{name}' not in allowed:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return allowed[f'{module}.{name}']


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'it names the encoding {encoding!r}')
    return codecs.encode(text, encoding)


def load_paddle(src: Path) -> dict[str, Tensor]:
    """Loads a ``.pdparams`` file, without Paddle and without running its pickle.

    Returns:
        The state dict of the public PyTorch code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but arrays of floating-point numbers.
    """
    _check(src)
    try:
        with src.open('rb') as file:
            arrays = PaddleUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f'{src} cannot be loaded as parameters of Paddle; it is damaged or holds '
            f'objects that are not safe to load ({error}).'
        ) from error
    if isinstance(arrays, dict):
        # Paddle 2.0 stores its own names of the parameters beside them.
        arrays.pop('StructuredToParameterName@@', None)
        arrays = {
            key: value[1] if isinstance(value, tuple) and len(value) == 2 else value
            for key, value in arrays.items()
        }
    if not (isinstance(arrays, dict) and arrays) or not all(
        isinstance(value, np.ndarray) and value.dtype.kind == 'f'
        for value in arrays.values()
    ):
        raise ValueError(
            f'{src} holds no parameters: arrays of floating-point numbers.'
        )
    return from_paddle(arrays)


def load_public(src: Path) -> dict[str, Tensor]:
    """Loads the state dict of a public checkpoint without running its pickle.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but tensors and training settings.
    """
    _check(src)
    try:
        # The public training script stores its arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(src, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f'{src} cannot be loaded as a file of tensors; it is damaged or holds '
            f'objects that are not safe to load.'
        ) from error
    state = checkpoint.get('model', checkpoint) if isinstance(checkpoint, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f'{src} holds no state dict, neither bare nor under the key "model".'
        )
    return state


def _check(src: Path) -> None:
    if not src.is_file():
        raise FileNotFoundError(f'No checkpoint at {src}.')


def convert(src: Path, dst: Path, reverse: bool) -> tuple[int, bytes]:
    """Returns the number of tensors, and the content of the converted file."""
    buffer = io.BytesIO()
    if reverse:
        _check(src)
        checkpoint = read_checkpoint(str(src))
        state = to_public(checkpoint.get('state_dict', checkpoint))
        if dst.suffix == '.pdparams':
            arrays = to_paddle(state)
            return len(arrays), pickle.dumps(arrays, protocol=4)
        torch.save(dict(model=state), buffer)
    else:
        load = load_paddle if src.suffix == '.pdparams' else load_public
        state = to_ours(load(src))
        torch.save(dict(meta=dict(source=src.name), state_dict=state), buffer)
    return len(state), buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description='Convert a public DS-Net checkpoint for mmpretrain, or back.'
    )
    parser.add_argument(
        'src', type=Path, help='checkpoint of the public PyTorch code or of PaddleClas'
    )
    parser.add_argument('dst', type=Path, help='file to write; must not exist')
    parser.add_argument(
        '--reverse',
        action='store_true',
        help='SRC is one of ours; DST gets the public names, and the format of '
        'PaddleClas if it ends with .pdparams',
    )
    args = parser.parse_args(argv)

    try:
        if args.dst.exists():
            raise ValueError(f'{args.dst} exists and is left alone; choose another.')
        count, content = convert(args.src, args.dst, args.reverse)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    write_atomic(args.dst, content)
    print(f'{count} tensors -> {args.dst}')


if __name__ == '__main__':
    main()

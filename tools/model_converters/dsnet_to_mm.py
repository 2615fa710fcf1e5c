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
import io
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.files import write_atomic
from dsnet_mm.models import DSNet
from dsnet_mm.weights import check_finite, check_kinds, read_paddle, read_pickled

# Inside a block: public name -> ours.
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


def public_name(key: str) -> str:
    """Returns the public name of a tensor of :class:`DSNet`."""
    part, *rest, tensor = key.split('.')
    if part == 'norm3':
        return f'norm.{tensor}'
    if part == 'patch_embeds':
        return f'patch_embed{int(rest[0]) + 1}.proj.{tensor}'
    stage, block, *name = rest
    return f'blocks{int(stage) + 1}.{block}.{PUBLIC_NAMES[".".join(name)]}.{tensor}'


def rename(state: dict[str, Tensor], reverse: bool = False) -> dict[str, Tensor]:
    """Renames all tensors of a classifier and checks that none is missing.

    Names and shapes are those of a DS-Net with the depths and widths of the state dict.

    Args:
        state: State dict with public names, or with ours if ``reverse``.
        reverse: Whether to give the tensors public names.

    Raises:
        ValueError: If a tensor is missing, left over, or of another shape.
    """
    stages = range(4) if reverse else range(1, 5)
    block = r'backbone\.stages\.{}\.(\d+)\.' if reverse else r'blocks{}\.(\d+)\.'
    patches = 'backbone.patch_embeds.{}.projection' if reverse else 'patch_embed{}.proj'
    bias = f'{"head.fc" if reverse else "head"}.bias'

    def length(key: str) -> int:
        shape = state[key].shape if key in state else ()
        return shape[0] if len(shape) == 1 else 0

    depths = [
        len({m[1] for m in (re.match(block.format(stage), k) for k in state) if m})
        for stage in stages
    ]
    widths = [length(f'{patches.format(stage)}.bias') for stage in stages]

    def check_known(key: str, known: bool) -> None:
        if not known:
            code = 'a classifier of dsnet_mm' if reverse else 'the public DS-Net code'
            raise ValueError(
                f'{key!r} is not a tensor of {code}; the checkpoint is of another '
                f'model, or converted already.'
            )

    check_known(next(iter(state), ''), any(depths))
    # Each block has more than 20 tensors, and more than one as large as its width
    # squared. A file that demands more than it holds is not built.
    squares = sum(d * w * w for d, w in zip(depths, widths, strict=True))
    held = sum(tensor.numel() for tensor in state.values())
    if 0 in depths + widths or 20 * sum(depths) > len(state) or squares > held:
        raise ValueError(
            f'the checkpoint has {depths} blocks and {widths} channels in the stages '
            f'of DS-Net; it is a part of one'
        )
    network = DSNet(dict(embed_dims=widths, depths=depths, num_heads=(1, 1, 1, 1)))
    names = {f'backbone.{key}': public_name(key) for key in network.state_dict()}
    own = {f'backbone.{key}': x for key, x in network.state_dict().items()}
    shapes = {key: x.shape for key, x in own.items()}
    for name in ('weight', 'bias'):
        names[f'head.fc.{name}'] = f'head.{name}'
        own[f'head.fc.{name}'] = torch.empty(0)
    classes = length(bias)
    shapes |= {'head.fc.weight': (classes, widths[3]), 'head.fc.bias': (classes,)}
    ours = {key if reverse else public: key for key, public in names.items()}
    for key in state:
        check_known(key, key in ours)
    given = {ours[key]: tensor for key, tensor in state.items()}
    differing = sorted(
        key
        for key, shape in shapes.items()
        if key not in given or tuple(given[key].shape) != tuple(shape)
    )
    if differing:
        key = differing[0]
        shape = tuple(given[key].shape) if key in given else 'missing'
        raise ValueError(
            f'{len(differing)} tensors differ from those of DS-Net with {depths} '
            f'blocks, for example {key}: {shape} and not {tuple(shapes[key])}'
        )
    check_kinds(own, given, 'the checkpoint')
    check_finite(given, 'the checkpoint')
    return {names[k]: x for k, x in given.items()} if reverse else given


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
            if tensor.dtype == torch.bfloat16:  # which NumPy does not have
                tensor = tensor.float()
            array = (tensor.T if tensor.ndim == 2 else tensor).contiguous().numpy()
            arrays[key.removesuffix(name) + STATISTICS.get(name, name)] = array
    return arrays


def load_paddle(src: Path) -> dict[str, Tensor]:
    """Loads a ``.pdparams`` file, without Paddle and without running its pickle.

    Returns:
        The state dict of the public PyTorch code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but arrays of floating-point numbers.
    """
    arrays = read_paddle(src)
    if isinstance(arrays, dict):
        # Paddle 2.0 stores its own names of the parameters beside them.
        arrays.pop('StructuredToParameterName@@', None)
        arrays = {
            key: value[1] if isinstance(value, tuple) and len(value) == 2 else value
            for key, value in arrays.items()
        }
    if not (isinstance(arrays, dict) and arrays) or not all(
        isinstance(key, str)
        and isinstance(value, np.ndarray)
        and value.dtype.kind == 'f'
        for key, value in arrays.items()
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
    # The public training script stores its arguments beside the weights.
    checkpoint = read_pickled(src, ignore=('argparse.Namespace',))
    state = checkpoint.get('model', checkpoint) if isinstance(checkpoint, dict) else {}
    if not (isinstance(state, dict) and state) or not all(
        isinstance(key, str) and isinstance(value, Tensor)
        for key, value in state.items()
    ):
        raise ValueError(
            f'{src} holds no state dict, neither bare nor under the key "model".'
        )
    return state


def convert(src: Path, dst: Path, reverse: bool) -> tuple[int, bytes]:
    """Returns the number of tensors, and the content of the converted file."""
    buffer = io.BytesIO()
    if reverse:
        state = rename(read_checkpoint(str(src))['state_dict'], reverse=True)
        if dst.suffix == '.pdparams':
            arrays = to_paddle(state)
            return len(arrays), pickle.dumps(arrays, protocol=4)
        torch.save(dict(model=state), buffer)
    else:
        load = load_paddle if src.suffix == '.pdparams' else load_public
        state = rename(load(src))
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
        write_atomic(args.dst, content)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'{count} tensors -> {args.dst}')


if __name__ == '__main__':
    main()

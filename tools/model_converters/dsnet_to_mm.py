"""Converts a public DS-Net checkpoint to an mmpretrain classifier checkpoint.

    python tools/model_converters/dsnet_to_mm.py SRC DST

SRC has the names of the public PyTorch code, as a bare state dict or under
``model``. DST fits configs/dsnet/dsnet-{tiny,small,base}_8xb128_in1k.py.
"""

import argparse
import io
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from dsnet_mm.files import write_atomic

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


def load_public(src: Path) -> dict[str, Tensor]:
    """Loads the state dict of a public checkpoint without running its pickle.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything but tensors and training settings.
    """
    if not src.is_file():
        raise FileNotFoundError(f'No checkpoint at {src}.')
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Convert a public DS-Net checkpoint for mmpretrain.'
    )
    parser.add_argument('src', type=Path, help='checkpoint of the public code')
    parser.add_argument('dst', type=Path, help='file to write; must not exist')
    args = parser.parse_args()

    try:
        if args.dst.exists():
            raise ValueError(f'{args.dst} exists and is left alone; choose another.')
        state = {convert_key(key): t for key, t in load_public(args.src).items()}
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    buffer = io.BytesIO()
    torch.save(dict(meta=dict(source=args.src.name), state_dict=state), buffer)
    write_atomic(args.dst, buffer.getvalue())
    print(f'{len(state)} tensors -> {args.dst}')


if __name__ == '__main__':
    main()

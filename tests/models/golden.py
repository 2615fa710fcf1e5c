"""Weights and input of the golden numbers in ``tests/data``, given by formulas."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).resolve().parents[1] / 'data'


def noise(size: int, stream: int) -> np.ndarray:
    """Returns values in [-1, 1) by integer hashing, the same on every machine."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(size, dtype=np.uint64) + np.uint64(1000003 * stream)
    h = (h * np.uint64(2654435761)) & mask
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(2246822519)) & mask
    h ^= h >> np.uint64(13)
    return h.astype(np.float64) / 2**31 - 1


def public_state(arch: str) -> dict[str, Tensor]:
    """Returns a float64 state dict with the names and shapes of the public code."""
    shapes = json.loads((DATA / 'public_keys.json').read_text())[arch]
    state = {}
    for stream, key in enumerate(sorted(shapes)):
        shape = shapes[key]
        values = noise(int(np.prod(shape)), stream).reshape(shape)
        if key.endswith('num_batches_tracked'):
            values = np.array(0)
        elif key.endswith('running_var'):
            values = 1 + 0.5 * values
        elif key.endswith(('running_mean', 'bias')):
            values = 0.1 * values
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values = values * np.sqrt(3 * shape[0] / values.size) * 0.35
        state[key] = torch.from_numpy(values)
    return state


def image(height: int, width: int) -> Tensor:
    """Returns a float64 image of shape (1, 3, height, width)."""
    k = torch.arange(3 * height * width, dtype=torch.float64)
    return (torch.sin(0.0137 * k) + torch.cos(0.00091 * k)).view(1, 3, height, width)


def golden() -> dict[str, Tensor]:
    """Returns the golden numbers of DS-Net-T for ``image(224, 224)``."""
    with np.load(DATA / 'dsnet_tiny_224.npz') as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

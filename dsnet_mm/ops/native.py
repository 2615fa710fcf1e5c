"""The compiled attention ops as PyTorch sees them.

``dsnet_mm::co_attention(local_qkv, global_qkv, seed, num_heads, dropout_p)``
returns h_L and h_G, and for each the logarithm (to base 2, as all exponentials
of the kernels) of the softmax's denominator, (N, num_heads, L or G), from which
the backward recomputes the attention weights. ``dsnet_mm::self_attention(qkv, seed,
num_heads, dropout_p)``, on the CPU only, returns the same of one stream.
"""

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor

# What a library has that these sources were compiled to.
_OPS = (
    'co_attention',
    'ds_block',
    'ffn',
    'ffn_backward',
    'has_projections',
    'linear',
    'linear_',
    'merge_',
    'residual_conv',
    'resize_add_',
    'self_attention',
    'self_attention_backward',
)


def build_info() -> dict[str, str | None]:
    """Returns what the build noted.

    The versions of ``torch`` and ``cuda``, and why it is ``no_cuda`` although there is
    a GPU; or the ``reason`` why nothing was compiled.
    """
    path = Path(__file__).with_name('build_info.json')
    return json.loads(path.read_text()) if path.is_file() else {}


def _load() -> str | None:
    """Loads the compiled ops, or tells why they are not there."""
    info = build_info()
    # Checked first: a library for another torch may load and then crash.
    if info.get('torch', torch.__version__) != torch.__version__:
        return f'built for torch {info["torch"]}, you have {torch.__version__}'
    try:
        importlib.import_module('dsnet_mm.ops._C')
    except ModuleNotFoundError:
        return (
            f'not compiled ({info["reason"]})' if 'reason' in info else 'not compiled'
        )
    except ImportError as error:
        return f'it does not load: {error}'
    ops = torch.ops.dsnet_mm
    if (
        not all(hasattr(ops, name) for name in _OPS)
        or 'hidden' in str(ops.ffn_backward.default._schema)  # it was kept
    ):
        return 'built from older sources'
    return None


#: Why the compiled op cannot be used, or None.
WHY_NOT = _load()


def why_not_cuda() -> str | None:
    """Tells why the compiled op cannot be used on a GPU, or returns None."""
    if not torch.cuda.is_available():
        return 'torch sees no GPU'
    info = build_info()
    if WHY_NOT is None and info.get('cuda'):
        return None
    return (
        f'there is a GPU, but the ops are not for it '
        f'({WHY_NOT or info.get("no_cuda") or "CPU only"}); '
        f'with nvcc of CUDA {torch.version.cuda}, build them: '
        f'DSNET_MM_WITH_OPS=1 pip install --no-build-isolation -e .'
    )


def co_attention(
    local_qkv: Tensor, global_qkv: Tensor, num_heads: int, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The compiled :func:`dsnet_mm.ops.co_attention`, whose inputs are checked.

    A projection whose last axis is strided is copied; any other is read where
    it is.
    """
    seed = _draw_seed(local_qkv.device, dropout_p)
    h_l, h_g, _, _ = torch.ops.dsnet_mm.co_attention(
        local_qkv, global_qkv, seed, num_heads, dropout_p
    )
    return h_l, h_g


def self_attention(qkv: Tensor, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """The compiled :func:`dsnet_mm.ops.self_attention`."""
    seed = _draw_seed(qkv.device, dropout_p)
    return torch.ops.dsnet_mm.self_attention(qkv, seed, num_heads, dropout_p)[0]


def _draw_seed(device: torch.device, dropout_p: float) -> Tensor:
    """Returns a tensor, so that a compiled graph can draw it."""
    if dropout_p > 0:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.zeros(1, dtype=torch.int64, device=device)

from . import meta as meta  # registers fake kernels and FLOP formulas
from .co_attention import attention, co_attention, sdpa_co_attention, self_attention
from .feed_forward import feed_forward
from .packing import can_pack, pack, unpack
from .paths import select_path, use_path
from .plain import dropout_mask, reference_co_attention, split_heads
from .recompute import recomputed
from .resize import resize

__all__ = [
    'attention',
    'can_pack',
    'co_attention',
    'dropout_mask',
    'feed_forward',
    'pack',
    'recomputed',
    'reference_co_attention',
    'resize',
    'sdpa_co_attention',
    'select_path',
    'self_attention',
    'split_heads',
    'unpack',
    'use_path',
]

from .co_attention import (
    attention,
    co_attention,
    sdpa_co_attention,
    select_path,
)
from .ffn import ffn_, has_amx, to_tiles
from .reference import dropout_mask, reference_co_attention, split_heads
from .resize import resize, resize_add

__all__ = [
    'attention',
    'co_attention',
    'dropout_mask',
    'ffn_',
    'has_amx',
    'reference_co_attention',
    'resize',
    'resize_add',
    'sdpa_co_attention',
    'select_path',
    'split_heads',
    'to_tiles',
]

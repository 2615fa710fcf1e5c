from .co_attention import (
    attention,
    co_attention,
    sdpa_co_attention,
    select_path,
)
from .projections import ffn_, linear_, runs_on_amx, to_tiles
from .reference import dropout_mask, reference_co_attention, split_heads
from .resize import resize, resize_add

__all__ = [
    'attention',
    'co_attention',
    'dropout_mask',
    'ffn_',
    'linear_',
    'reference_co_attention',
    'resize',
    'resize_add',
    'runs_on_amx',
    'sdpa_co_attention',
    'select_path',
    'split_heads',
    'to_tiles',
]

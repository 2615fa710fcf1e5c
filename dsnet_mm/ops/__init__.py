from .co_attention import (
    attention,
    co_attention,
    sdpa_co_attention,
    self_attention,
)
from .depthwise import depthwise_conv
from .ds_block import ds_block, runs_ds_block
from .paths import select_path
from .projections import ffn_backward, ffn_hidden, runs_tiled, tiled_ffn, to_tiles
from .reference import dropout_mask, reference_co_attention, split_heads
from .resize import resize, resize_add

__all__ = [
    'attention',
    'co_attention',
    'depthwise_conv',
    'dropout_mask',
    'ds_block',
    'ffn_backward',
    'ffn_hidden',
    'reference_co_attention',
    'resize',
    'resize_add',
    'runs_ds_block',
    'runs_tiled',
    'sdpa_co_attention',
    'select_path',
    'self_attention',
    'split_heads',
    'tiled_ffn',
    'to_tiles',
]

from .co_attention import attention, co_attention, split_heads

__all__ = ['attention', 'co_attention', 'split_heads']

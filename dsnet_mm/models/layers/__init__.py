from .ds_block import DSBlock, InterScaleAlignment, PatchEmbed

__all__ = ['DSBlock', 'InterScaleAlignment', 'PatchEmbed']

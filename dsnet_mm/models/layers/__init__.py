from .ds_block import DSBlock, InterScaleAlignment
from .patch_embed import PatchEmbed

__all__ = ['DSBlock', 'InterScaleAlignment', 'PatchEmbed']

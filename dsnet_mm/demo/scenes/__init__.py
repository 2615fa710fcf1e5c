"""Drawn scenes: a small data set that needs no download.

A picture shows a few objects on a textured background. The class of an object is
its texture together with its shape ('striped disc', 'dotted star'). The texture has
a period of a few pixels. The shape shows only over the whole object. A network has
to use both.

Everything follows from the seed. Picture ``i`` of a split depends only on the seed,
the picture size, the split and ``i``. A larger set begins with the pictures of a
smaller one.
"""

from .contact_sheet import preview
from .data_set import SceneSettings, make_scenes
from .drawing import BACKGROUNDS, draw_scene
from .sampling import MIN_VISIBLE, sample_portrait, sample_scene
from .vocabulary import COLOURS, DETECTION_CLASSES, SHAPES, TEXTURES, SceneObject
from .writing import write_classification, write_detection

__all__ = [
    'BACKGROUNDS',
    'COLOURS',
    'DETECTION_CLASSES',
    'MIN_VISIBLE',
    'SHAPES',
    'TEXTURES',
    'SceneObject',
    'SceneSettings',
    'draw_scene',
    'make_scenes',
    'preview',
    'sample_portrait',
    'sample_scene',
    'write_classification',
    'write_detection',
]

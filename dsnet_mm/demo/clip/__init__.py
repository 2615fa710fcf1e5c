"""The demo of CLIP-Adapter: a small CLIP trained from scratch, and its task.

No download is needed. The training pictures and their captions are drawn. Some
textures and shapes are held out: the model never sees them. The few-shot task is to
classify objects with at least one of them.
"""

from .cifar import CIFAR_HELD_OUT, cifar_pairs, write_cifar
from .drawn import (
    HELD_OUT,
    NEW_SHAPES,
    NEW_TEXTURES,
    random_scene,
    scene_pairs,
    write_pictures,
)
from .pretraining import FOLDER, SIZE, STEPS, pretrain

__all__ = [
    'CIFAR_HELD_OUT',
    'FOLDER',
    'HELD_OUT',
    'NEW_SHAPES',
    'NEW_TEXTURES',
    'SIZE',
    'STEPS',
    'cifar_pairs',
    'pretrain',
    'random_scene',
    'scene_pairs',
    'write_cifar',
    'write_pictures',
]

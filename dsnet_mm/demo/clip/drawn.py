"""Drawn pictures: captioned ones for the pre-training, and the few-shot task."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dsnet_mm.demo.folders import replacing
from dsnet_mm.demo.scenes import COLOURS, SHAPES, TEXTURES, SceneObject, draw_scene

from .pretraining import SIZE, Batch

NEW_TEXTURES, NEW_SHAPES = ('gridded', 'zigzag'), ('heart', 'diamond')
"""Textures and shapes that are in no training picture and in no caption."""

HELD_OUT = tuple(
    f'{texture} {shape}'
    for texture in TEXTURES
    for shape in SHAPES
    if texture in NEW_TEXTURES or shape in NEW_SHAPES
)
"""The 24 classes of the few-shot task: with a new texture, a new shape or both."""

CAPTIONS = (
    'a photo of a {texture} {shape}.',
    'a {texture} {shape}.',
    'a photo of a {colour} {texture} {shape}.',
    'a {colour} {texture} {shape} {place}.',
    'a {texture} {shape} {place}.',
)


def random_scene(
    rng: np.random.Generator, name: str | None = None
) -> tuple[SceneObject, str]:
    """Draws an object and its caption at random.

    Args:
        rng: Random generator.
        name: Texture and shape. None chooses any that is not held out.

    Returns:
        The object and its caption. The caption has the texture and the shape, and
        some captions have the colour or the place.
    """
    while name is None:
        texture = list(TEXTURES)[rng.integers(len(TEXTURES))]
        shape = list(SHAPES)[rng.integers(len(SHAPES))]
        name = f'{texture} {shape}' if f'{texture} {shape}' not in HELD_OUT else None
    texture, shape = name.split()
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    radius = float(SIZE * rng.uniform(0.22, 0.42))
    x, y = rng.uniform(radius, SIZE - 1 - radius, 2).tolist()
    dx, dy = x - SIZE / 2, y - SIZE / 2
    if abs(dx) > abs(dy):
        place = 'on the left' if dx < 0 else 'on the right'
    else:
        place = 'at the top' if dy < 0 else 'at the bottom'
    obj = SceneObject(
        shape=shape,
        texture=texture,
        colour=colour,
        centre=(x, y),
        radius=radius,
        angle=float(rng.uniform(-30, 30)),
        period=float(rng.uniform(4, 6)),
    )
    caption = CAPTIONS[rng.integers(len(CAPTIONS))]
    return obj, caption.format(texture=texture, shape=shape, colour=colour, place=place)


def scene_pairs(batch_size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Draws captioned pictures for the pre-training, without end.

    Args:
        batch_size: Pictures of a batch.
        seed: Seed of the pictures and captions.

    Yields:
        Batches, see ``Batch``. Nothing in them is held out.
    """
    rng = np.random.default_rng([seed, 3])
    while True:
        pairs = [random_scene(rng) for _ in range(batch_size)]
        images = np.stack([draw_scene([obj], SIZE, rng)[0] for obj, _ in pairs])
        captions = [caption for _, caption in pairs]
        yield torch.from_numpy(images).permute(0, 3, 1, 2), captions


def write_pictures(
    out: str | Path, train: int = 24, val: int = 8, test: int = 60, seed: int = 0
) -> None:
    """Writes the few-shot task as ``{train,val,test}/class_name/*.png``.

    Args:
        out: Folder to make. An existing folder is left as it is.
        train: Training pictures of each class.
        val: Validation pictures of each class.
        test: Test pictures of each class.
        seed: Seed of the pictures.
    """
    out = Path(out)
    if out.exists():
        return
    with replacing(out) as fresh:
        for part, count in enumerate((train, val, test)):
            for label, name in enumerate(HELD_OUT):
                folder = fresh / ('train', 'val', 'test')[part] / name.replace(' ', '_')
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([seed, part, label, i])
                    obj, _ = random_scene(rng, name)
                    image, _ = draw_scene([obj], SIZE, rng)
                    Image.fromarray(image).save(folder / f'{i:03d}.png')

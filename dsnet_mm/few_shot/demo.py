"""A CLIP that trains in minutes on drawn scenes, and classes it has never seen.

No download is needed: pictures and captions come from the scene generator. Two of its
textures and two of its shapes are held out; the few-shot task is to tell apart all
that has at least one of them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.datasets.scenes import COLOURS, SHAPES, TEXTURES, SceneObject, draw_scene

from .features import write_atomic

SIZE = 64
"""Height and width of the pictures in pixels."""

NEW_TEXTURES, NEW_SHAPES = ('gridded', 'zigzag'), ('heart', 'diamond')
"""Words that the model never sees, nor anything that looks like them."""

HELD_OUT = tuple(
    f'{texture} {shape}'
    for texture in TEXTURES
    for shape in SHAPES
    if texture in NEW_TEXTURES or shape in NEW_SHAPES
)
"""The 24 classes of the few-shot task: with a new texture, a new shape or both."""

MODEL = {
    'embed_dim': 128,
    'vision_cfg': {
        'image_size': SIZE,
        'layers': [1, 1, 1, 1],
        'width': 16,
        'head_width': 32,
        'patch_size': None,
    },
    'text_cfg': {
        'context_length': 32,
        'vocab_size': 49408,
        'width': 64,
        'heads': 2,
        'layers': 2,
    },
}
"""Configuration of the model, for open_clip."""

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
    """An object and what to say about it.

    Args:
        rng: Source of the choice.
        name: Texture and shape; None takes any that is not held out.

    Returns:
        The object, and a caption with its texture and shape and, at times, its
        colour and place.
    """
    while name is None:
        texture = list(TEXTURES)[rng.integers(len(TEXTURES))]
        shape = list(SHAPES)[rng.integers(len(SHAPES))]
        name = f'{texture} {shape}' if f'{texture} {shape}' not in HELD_OUT else None
    texture, shape = name.split()
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    radius = float(SIZE * rng.uniform(0.22, 0.42))
    x, y = rng.uniform(radius, SIZE - 1 - radius, 2).tolist()
    aside, above = x - SIZE / 2, y - SIZE / 2
    if abs(aside) > abs(above):
        place = 'on the left' if aside < 0 else 'on the right'
    else:
        place = 'at the top' if above < 0 else 'at the bottom'
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


def write_pictures(
    out: str | Path, train: int = 24, val: int = 8, test: int = 60, seed: int = 0
) -> None:
    """Write the few-shot task as ``{train,val,test}/class_name/*.png``.

    Args:
        out: Folder to make; left as it is if it exists.
        train: Training pictures of each class.
        val: Validation pictures of each class.
        test: Test pictures of each class.
        seed: Seed of the pictures.
    """
    out = Path(out)
    if out.exists():
        return
    fresh = out.with_name(f'.{out.name}.{uuid4().hex[:8]}')
    try:
        for part, count in enumerate((train, val, test)):
            for label, name in enumerate(HELD_OUT):
                folder = fresh / ('train', 'val', 'test')[part] / name.replace(' ', '_')
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([seed, part, label, i])
                    obj, _ = random_scene(rng, name)
                    image, _ = draw_scene([obj], SIZE, rng)
                    Image.fromarray(image).save(folder / f'{i:03d}.png')
        fresh.rename(out)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _batches(
    steps: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Pictures (N, 3, H, W), 0 to 255, and captions, none of them twice in a batch."""
    rng = np.random.default_rng([seed, 3])
    for _ in range(steps):
        images, captions = [], {}
        while len(captions) < batch_size:
            obj, caption = random_scene(rng)
            if caption not in captions:
                captions[caption] = None
                images.append(draw_scene([obj], SIZE, rng)[0])
        yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), list(captions)


def pretrain(
    out: str | Path,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[Path, Path]:
    """Train the model contrastively, once.

    Args:
        out: Folder of ``demo_clip.json`` (its configuration) and
            ``demo_clip.safetensors``; if both exist they are taken as they are.
        steps: Optimiser steps.
        batch_size: Pairs of a step.
        lr: Highest learning rate.
        seed: Seed of weights and pairs.
        quiet: Whether to leave out the progress bar.

    Returns:
        Paths of the configuration and the weights.
    """
    import open_clip

    config, weights = Path(out) / 'demo_clip.json', Path(out) / 'demo_clip.safetensors'
    if config.is_file() and weights.is_file():
        return config, weights
    write_atomic(config, json.dumps(MODEL, indent=2))
    open_clip.add_model_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(config.stem)
    tokenizer = open_clip.get_tokenizer(config.stem)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std = (
        255 * torch.tensor(preprocess[key]).view(3, 1, 1) for key in ('mean', 'std')
    )
    optim = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, lr, steps, pct_start=0.1)
    loss_of = open_clip.ClipLoss()
    model.train()
    for images, captions in track(
        _batches(steps, batch_size, seed),
        'training a small CLIP',
        total=steps,
        disable=quiet,
    ):
        loss = loss_of(*model((images - mean) / std, tokenizer(captions)))
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
    write_atomic(weights, save(model.state_dict()))
    return config, weights

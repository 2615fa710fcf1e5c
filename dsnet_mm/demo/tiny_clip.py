"""A small CLIP trained from scratch on drawn images, in minutes on a CPU.

No download is needed. Some textures and shapes are held out: the model never sees them.
The few-shot task of tools/demo_clip.py and the examples of the page have such classes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

from .scenes import COLOURS, SHAPES, TEXTURES, SceneObject, draw_scene

SIZE = 64
"""Height and width of the images in pixels."""

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

FOLDER = Path('work_dirs/demo_clip')
"""Folder of the demo, also of the page's encoder."""

STEPS = 1000
"""Optimizer steps of the demo."""

NEW_TEXTURES, NEW_SHAPES = ('gridded', 'zigzag'), ('heart', 'diamond')
"""Textures and shapes that are in no training image and in no caption."""

HELD_OUT = tuple(
    f'{texture} {shape}'
    for texture in TEXTURES
    for shape in SHAPES
    if texture in NEW_TEXTURES or shape in NEW_SHAPES
)
"""The 24 classes of the few-shot task: with a new texture, a new shape or both."""

CAPTIONS = (
    'a photo of a {name}.',
    'a {name}.',
    'a photo of a {colour} {name}.',
    'a {colour} {name} {place}.',
    'a {name} {place}.',
)

Batch = tuple[Tensor, list[str]]
"""Images (N, 3, H, W), from 0 to 255, and their N captions."""


def random_scene(rng: Generator, name: str | None = None) -> tuple[SceneObject, str]:
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
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    radius = float(SIZE * rng.uniform(0.22, 0.42))
    x, y = rng.uniform(radius, SIZE - 1 - radius, 2).tolist()
    dx, dy = x - SIZE / 2, y - SIZE / 2
    if abs(dx) > abs(dy):
        place = 'on the left' if dx < 0 else 'on the right'
    else:
        place = 'at the top' if dy < 0 else 'at the bottom'
    angle, period = float(rng.uniform(-30, 30)), float(rng.uniform(4, 6))
    obj = SceneObject(name, COLOURS[colour], (x, y), radius, angle, period)
    caption = CAPTIONS[rng.integers(len(CAPTIONS))]
    return obj, caption.format(name=name, colour=colour, place=place)


def scene_pairs(batch_size: int = 64) -> Iterator[Batch]:
    """Draws captioned images for the pre-training, without end.

    Args:
        batch_size: Images of a batch.

    Yields:
        Batches, see ``Batch``. Nothing in them is held out.
    """
    rng = np.random.default_rng([0, 3])
    while True:
        pairs = [random_scene(rng) for _ in range(batch_size)]
        images = np.stack([draw_scene([obj], SIZE, rng)[0] for obj, _ in pairs])
        captions = [caption for _, caption in pairs]
        yield torch.from_numpy(images).permute(0, 3, 1, 2), captions


def pretrain(out: str | Path, pairs: Iterator[Batch], steps: int) -> tuple[Path, Path]:
    """Trains the model with the contrastive loss of CLIP.

    A batch of few different captions has pairs with the same caption. All of these
    count as matching, with equal targets.

    Args:
        out: Folder of ``demo_clip.json``, the configuration, and
            ``demo_clip.safetensors``, the weights. If both exist, they are kept and
            nothing is trained.
        pairs: Batches.
        steps: Number of optimizer steps.

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
        torch.manual_seed(0)
        model = open_clip.create_model(config.stem)
    tokenizer = open_clip.get_tokenizer(config.stem)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std = (
        255 * torch.tensor(preprocess[key]).view(3, 1, 1) for key in ('mean', 'std')
    )
    lr = 2e-3
    optim = torch.optim.AdamW(
        model.parameters(), lr, (0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, lr, steps, pct_start=0.1)
    model.train()
    with progress_bar(steps, 'training a small CLIP', 'steps') as bar:
        for _ in range(steps):
            images, captions = next(pairs)
            image_features, text_features, logit_scale = model(
                (images - mean) / std, tokenizer(captions)
            )
            logits = logit_scale * image_features @ text_features.t()
            same = torch.tensor([[float(a == b) for b in captions] for a in captions])
            target = same / same.sum(1, keepdim=True)
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)
            optim.zero_grad()
            (loss / 2).backward()
            optim.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            bar.update()
    write_atomic(weights, save(model.state_dict()))
    return config, weights

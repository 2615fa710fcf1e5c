"""A CLIP that trains in minutes on drawn scenes, and classes it has never seen.

No download is needed: pictures and captions come from the scene generator. Two of its
textures and two of its shapes are held out; the few-shot task is to tell apart all
that has at least one of them.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from uuid import uuid4
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.datasets.scenes import COLOURS, SHAPES, TEXTURES, SceneObject, draw_scene
from dsnet_mm.files import write_atomic

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

    def write(fresh: Path) -> None:
        for part, count in enumerate((train, val, test)):
            for label, name in enumerate(HELD_OUT):
                folder = fresh / ('train', 'val', 'test')[part] / name.replace(' ', '_')
                folder.mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([seed, part, label, i])
                    obj, _ = random_scene(rng, name)
                    image, _ = draw_scene([obj], SIZE, rng)
                    Image.fromarray(image).save(folder / f'{i:03d}.png')

    _write_once(out, write)


Batch = tuple[Tensor, list[str]]
"""Pictures (N, 3, H, W), from 0 to 255, and their captions."""


def scene_pairs(batch_size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Drawn pictures and captions without end, nothing of them held out."""
    rng = np.random.default_rng([seed, 3])
    while True:
        pairs = [random_scene(rng) for _ in range(batch_size)]
        images = np.stack([draw_scene([obj], SIZE, rng)[0] for obj, _ in pairs])
        captions = [caption for _, caption in pairs]
        yield torch.from_numpy(images).permute(0, 3, 1, 2), captions


def pretrain(
    out: str | Path,
    pairs: Iterator[Batch],
    steps: int,
    lr: float = 2e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[Path, Path]:
    """Train the model contrastively, once.

    Pictures whose captions are the same share the target, so a small vocabulary does
    no harm; with different captions this is the loss of CLIP.

    Args:
        out: Folder of ``demo_clip.json`` (its configuration) and
            ``demo_clip.safetensors``; if both exist they are taken as they are.
        pairs: Batches.
        steps: Optimiser steps.
        lr: Highest learning rate.
        seed: Seed of the weights.
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
    model.train()
    for _ in track(range(steps), 'training a small CLIP', disable=quiet):
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
    write_atomic(weights, save(model.state_dict()))
    return config, weights


# --- Real pictures ----------------------------------------------------------------

CIFAR_HELD_OUT = ('frog', 'horse', 'ship', 'truck')
"""The last four classes of CIFAR-10; the first six train the model."""


def cifar_pairs(
    archive: str | Path, batch_size: int = 64, seed: int = 0
) -> Iterator[Batch]:
    """CIFAR-10 pictures of the first six classes, shifted and flipped, without end.

    Args:
        archive: ZIP file with ``cifar10/{train,test}/class_name/*.jpg``.
        batch_size: Pictures of a batch.
        seed: Seed of order, shifts and captions.

    Yields:
        Batches, see ``Batch``.
    """
    rng = np.random.default_rng([seed, 4])
    images, names = [], []
    with ZipFile(archive) as file:
        for member in file.namelist():
            _, part, name, *rest = [*member.split('/'), '', '']
            if part == 'train' and rest[0] and name not in CIFAR_HELD_OUT:
                image = Image.open(BytesIO(file.read(member))).convert('RGB')
                images.append(np.asarray(image))
                names.append(name)
    images = np.pad(np.stack(images), ((0, 0), (4, 4), (4, 4), (0, 0)), 'reflect')
    captions = ('a photo of a {}.', 'a picture of a {}.', 'a small {}.', 'a {}.')
    while True:
        chosen = rng.integers(len(images), size=batch_size)
        batch = []
        for index in chosen:
            y, x = rng.integers(9, size=2)
            crop = images[index, y : y + 32, x : x + 32]
            batch.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        tensor = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float()
        tensor = F.interpolate(tensor, size=SIZE, mode='bicubic', antialias=True)
        yield (
            tensor.clamp(0, 255),
            [captions[rng.integers(len(captions))].format(names[i]) for i in chosen],
        )


def write_cifar(
    out: str | Path, archive: str | Path, train: int = 100, test: int = 500
) -> None:
    """Write the held-out classes as ``{train,val,test}/class_name/*.jpg``.

    Args:
        out: Folder to make; left as it is if it exists.
        archive: See :func:`cifar_pairs`.
        train: Pictures of each class from its training part; a fifth is for
            validation.
        test: Pictures of each class from its test part.
    """

    def write(fresh: Path) -> None:
        with ZipFile(archive) as file:
            names = file.namelist()
            for label in CIFAR_HELD_OUT:
                for part, count in (('train', train), ('test', test)):
                    prefix = f'cifar10/{part}/{label}/'
                    members = sorted(n for n in names if n.startswith(prefix))
                    members = [n for n in members if not n.endswith('/')][:count]
                    for i, member in enumerate(members):
                        is_val = part == 'train' and i >= count - count // 5
                        folder = fresh / ('val' if is_val else part) / label
                        folder.mkdir(parents=True, exist_ok=True)
                        (folder / Path(member).name).write_bytes(file.read(member))

    _write_once(out, write)


def _write_once(out: str | Path, write: Callable[[Path], None]) -> None:
    """Writes a folder in full or not at all; leaves it as it is if it exists."""
    out = Path(out)
    if out.exists():
        return
    fresh = out.with_name(f'.{out.name}.{uuid4().hex[:8]}')
    try:
        write(fresh)
        fresh.rename(out)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)

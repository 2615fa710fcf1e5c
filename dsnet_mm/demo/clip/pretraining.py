"""Trains a small CLIP from scratch, in minutes on a CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from dsnet_mm.files import write_atomic
from dsnet_mm.progress import progress_bar

SIZE = 64
"""Height and width of the pictures in pixels."""

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

Batch = tuple[Tensor, list[str]]
"""Pictures (N, 3, H, W), from 0 to 255, and their N captions."""


def pretrain(
    out: str | Path,
    pairs: Iterator[Batch],
    steps: int,
    lr: float = 2e-3,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[Path, Path]:
    """Trains the model with the contrastive loss of CLIP.

    A batch of few different captions has pairs with the same caption. All of these
    count as matching, with equal targets.

    Args:
        out: Folder of ``demo_clip.json``, the configuration, and
            ``demo_clip.safetensors``, the weights. If both exist, they are kept and
            nothing is trained.
        pairs: Batches.
        steps: Number of optimizer steps.
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
    optim = torch.optim.AdamW(
        model.parameters(), lr, (0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, lr, steps, pct_start=0.1)
    model.train()
    with progress_bar(steps, 'training a small CLIP', 'steps', quiet) as bar:
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

"""Writes a table of open_clip's models: which build here, which are refused, and why.

One model of each family is built with random weights, and encodes an image and a text.
Nothing is fetched. All pairs of a model and a tag of its weights are checked without
being loaded.
"""

import argparse
import gc
import time
from collections import Counter
from pathlib import Path

import open_clip
import torch

from dsnet_mm.clip.loading import check_model, fetching
from dsnet_mm.files import write_atomic
from dsnet_mm.models import OpenCLIPEncoder

FAMILIES = {
    'CLIP, ResNet': 'RN50-quickgelu',
    'CLIP, ViT; OpenCLIP, DataComp, DFN, MetaCLIP': 'ViT-B-32',
    'SigLIP': 'ViT-B-16-SigLIP',
    'SigLIP 2': 'ViT-B-32-SigLIP2-256',
    'EVA-02': 'EVA02-B-16',
    'MobileCLIP': 'MobileCLIP-S1',
    'MobileCLIP 2': 'MobileCLIP2-S0',
    'ConvNeXt': 'convnext_tiny',
    'CoCa': 'coca_ViT-B-32',
    'Perception Encoder': 'PE-Core-T-16-384',
    'ViTamin': 'ViTamin-S',
    'Swin': 'swin_base_patch4_window7_224',
    'ViT of timm': 'vit_medium_patch16_gap_256',
    'RoBERTa': 'roberta-ViT-B-32',
    'XLM-RoBERTa': 'xlm-roberta-base-ViT-B-32',
    'mT5': 'mt5-base-ViT-B-32',
    'NLLB': 'nllb-clip-base',
    'CLIPA': 'ViT-L-14-CLIPA',
    'MetaCLIP 2': 'ViT-L-14-worldwide',
}
"""A small model of each family."""


def build(name: str) -> tuple[str, str]:
    """Builds a model with random weights.

    Returns:
        What its towers do, and what the encoder does.
    """
    try:
        with fetching(False):
            model = open_clip.create_model(name, pretrained_text=False).eval()
        size = model.visual.image_size
        size = size if isinstance(size, tuple) else (size, size)
        length = getattr(model, 'context_length', None) or model.text.context_length
        with torch.no_grad():
            image = model.encode_image(torch.zeros(1, 3, *size))
            text = model.encode_text(torch.zeros(1, length, dtype=torch.long))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        towers = f'{parameters:.0f} M parameters, width {image.shape[1]}'
        if image.shape != text.shape:
            towers += f', but {text.shape[1]} of the text'
        del model
    except Exception as error:  # the libraries raise errors of many types
        towers = f'no: {shorten(error)}'
    gc.collect()
    try:
        OpenCLIPEncoder(name, download=False)
        encoder = 'yes'
    except (ValueError, FileNotFoundError, ImportError) as error:
        encoder = f'no: {shorten(error)}'
    gc.collect()
    return towers, encoder


def shorten(error: Exception) -> str:
    text = ' '.join(str(error).split())
    if 'tokenizer of' in text:
        return 'its tokenizer is a file of the hub'
    if 'huggingface.co' in text or 'not on this machine' in text:
        return 'its text tower is described by a file of the hub'
    return text.split('(')[0].split(';')[0].strip(' .')[:160]


def preprocessing(model: str, tag: str) -> str:
    found = open_clip.get_pretrained_cfg(model, tag)
    mean = 'CLIP' if abs((found.get('mean') or [0.48])[0] - 0.48) < 0.01 else ''
    mean = mean or f'{found["mean"][0]:g}'
    return f'{found.get("resize_mode")}, {found.get("interpolation")}, mean {mean}'


def table_of_families() -> list[str]:
    """Builds a model of each family. Returns the lines of a table."""
    lines = ['| family | model | towers | encoder |', '|---|---|---|---|']
    for family, name in FAMILIES.items():
        start = time.perf_counter()
        towers, encoder = build(name)
        lines.append(f'| {family} | `{name}` | {towers} | {encoder} |')
        print(f'{name}: {towers}; {encoder}; {time.perf_counter() - start:.0f} s')
    return lines


def table_of_pairs() -> list[str]:
    """Checks all pairs of a model and a tag. Returns the lines of two tables."""
    refused: dict[tuple[str, str], list[str]] = {}
    ways: Counter[str] = Counter()
    pairs = open_clip.list_pretrained()
    for model, tag in pairs:
        try:
            check_model(model, tag)
            ways[preprocessing(model, tag)] += 1
        except ValueError as error:
            advice = str(error).rsplit('; ', 1)[-1].rstrip('.')
            refused.setdefault((model, advice), []).append(f'`{tag}`')
    count = sum(map(len, refused.values()))
    return [
        f'Of the {len(pairs)} pairs of a model and a tag of weights, {count} are '
        f'refused, because the model has another kind of GELU than the weights were '
        f'trained with:',
        '',
        '| model | weights | instead |',
        '|---|---|---|',
        *(
            f'| `{m}` | {", ".join(tags)} | {why} |'
            for (m, why), tags in refused.items()
        ),
        '',
        'The others are preprocessed in these ways (resize, interpolation, mean):',
        '',
        '| preprocessing | pairs |',
        '|---|--:|',
        *(f'| {way} | {count} |' for way, count in ways.most_common()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='Markdown file to write')
    args = parser.parse_args()
    lines = [
        "# open_clip's models",
        '',
        f'Written by `python tools/analysis_tools/open_clip_models.py` with open_clip '
        f'{open_clip.__version__}, on a machine without a network. A model of each '
        f'family is built with random weights and encodes an image and a text. The '
        f'encoder also needs the tokenizer. That of some families is a file of the '
        f'Hugging Face hub, which a machine with a network fetches once.',
        '',
        *table_of_families(),
        '',
        *table_of_pairs(),
    ]
    write_atomic(args.out, '\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()

"""Prompts and class names, the input of CLIP's text tower."""

from collections.abc import Sequence
from pathlib import Path

from dsnet_mm.files import read_text

PROMPTS: dict[str, tuple[str, ...]] = {
    'photo': ('a photo of a {}.',),
    **dict.fromkeys(
        (
            'imagenet',
            'caltech101',
            'stanford_cars',
            'sun397',
            'imagenetv2',
            'imagenet_sketch',
            'imagenet_a',
            'imagenet_r',
        ),
        ('a photo of a {}.',),
    ),
    'oxford_pets': ('a photo of a {}, a type of pet.',),
    'oxford_flowers': ('a photo of a {}, a type of flower.',),
    'food101': ('a photo of {}, a type of food.',),
    'fgvc_aircraft': ('a photo of a {}, a type of aircraft.',),
    'dtd': ('{} texture.',),
    'eurosat': ('a centered satellite photo of {}.',),
    'ucf101': ('a photo of a person doing {}.',),
    'imagenet_7': (
        'itap of a {}.',
        'a bad photo of the {}.',
        'a origami {}.',
        'a photo of the large {}.',
        'a {} in a video game.',
        'art of the {}.',
        'a photo of the small {}.',
    ),
}
"""Prompts by name. ``'photo'`` is CLIP's default, ``'imagenet_7'`` is Tip-Adapter's set
for ImageNet. The names of the public data sets have the prompt of the papers."""


def check_class_names(class_names: Sequence[str]) -> None:
    """Checks that the class names differ, not only in case, and are not empty.

    Args:
        class_names: Names by label.

    Raises:
        ValueError: If there are no names, or a name is empty or occurs twice.
    """
    if not class_names:
        raise ValueError('there are no class names.')
    if any(not name.strip() for name in class_names):
        raise ValueError('a class name is empty.')
    spelt: dict[str, list[str]] = {}
    for name in class_names:  # tokenizers ignore case and the number of blanks
        spelt.setdefault(' '.join(name.replace('_', ' ').lower().split()), []).append(
            name
        )
    twice = [name for names in spelt.values() if len(names) > 1 for name in names]
    if twice:
        raise ValueError(
            f'duplicate class names {", ".join(map(repr, dict.fromkeys(twice)))}: '
            f'their prompts are the same, so no text feature can tell them apart; '
            f'rename or merge them.'
        )


def resolve_prompts(prompts: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Returns the prompts of a name, of a file or of a list.

    Args:
        prompts: One of

            - a name of ``PROMPTS``;
            - ``'imagenet_80'``, for CLIP's ensemble, taken from open_clip;
            - a text file in UTF-8 with one prompt a line;
            - one prompt;
            - a list of prompts.

    Returns:
        The prompts. Each has one ``{}`` for the class name.

    Raises:
        ValueError: If the name is unknown, the file is not in UTF-8, or a prompt does
            not have exactly one ``{}``.
    """
    if isinstance(prompts, str | Path):
        text = str(prompts)
        if text in PROMPTS:
            return PROMPTS[text]
        if text == 'imagenet_80':
            from open_clip import OPENAI_IMAGENET_TEMPLATES

            return tuple(template('{}') for template in OPENAI_IMAGENET_TEMPLATES)
        if '{' in text:
            prompts = (text,)
        elif Path(text).is_file():
            lines = map(str.strip, read_text(text).splitlines())
            prompts = [line for line in lines if line]
        else:
            names = (*PROMPTS, 'imagenet_80')
            raise ValueError(
                f'prompts {text!r} is neither a prompt (it has no {{}}), nor a file, '
                f'nor one of {", ".join(names)}.'
            )
    if not prompts:
        raise ValueError('there are no prompts.')
    for prompt in prompts:
        if prompt.count('{}') != 1:
            raise ValueError(
                f'the prompt {prompt!r} must contain {{}} once, for the class name.'
            )
    return tuple(prompts)

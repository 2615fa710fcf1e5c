"""Loading of open_clip's models, with one sentence for each thing that goes wrong."""

import logging
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn


def import_open_clip() -> ModuleType:
    """Imports open_clip.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            'OpenCLIPEncoder needs open_clip: pip install open_clip_torch.'
        ) from error
    return open_clip


def load_towers(
    name: str, pretrained: str | None, download: bool = True
) -> tuple[nn.Module, object]:
    """Builds a model of open_clip, loads its weights, and builds its tokenizer.

    The preprocessing of a file of weights is that of open_clip's tags of the model, if
    they agree.

    Args:
        name: Name by which open_clip knows the model.
        pretrained: Tag of the weights, a file, or None for random weights. The file may
            be a TorchScript archive, as OpenAI published them.
        download: Whether missing files may be fetched.

    Returns:
        The model and the tokenizer.

    Raises:
        ImportError: If a library that the model needs is missing.
        FileNotFoundError: If a file is neither on this machine nor can be fetched.
        ValueError: If the weights are damaged, incomplete, not finite, or those of
            another model.
    """
    open_clip = import_open_clip()
    if name.startswith('local-dir:'):
        config = Path(name.removeprefix('local-dir:')) / 'open_clip_config.json'
        if not config.is_file():
            raise FileNotFoundError(f'there is no {config}; it describes the model.')
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    what = f'the weights {pretrained!r} of {name!r}' if pretrained else repr(name)
    archive = file is not None and _is_torchscript(file)
    try:
        with fetching(download), _quiet(archive or not download):
            model = open_clip.create_model(
                name,
                None if archive else pretrained,
                pretrained_text=False,
                force_preprocess_cfg=_preprocessing_of_tags(name) if file else None,
            )
            if archive:
                state = torch.jit.load(str(file), map_location='cpu').state_dict()
                for key in ('input_resolution', 'context_length', 'vocab_size'):
                    state.pop(key, None)
                model.load_state_dict(state)
            what = f'the tokenizer of {name!r}'
            tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise ImportError(
            f'{name!r} needs a library that is not installed ({error}); pip install '
            f"'dsnet_mm[clip]', or timm for the towers of timm."
        ) from error
    except Exception as error:  # unpicklers and state dicts raise errors of many types
        # torch.load goes on with advice for those who trust the file.
        text = str(error).partition(' In PyTorch 2.6')[0]
        reason = ' '.join(text.split())[:300] or type(error).__name__
        if file is not None and what.startswith('the weights'):
            problem = (
                'is empty'
                if file.stat().st_size == 0
                else f'is damaged, incomplete or of another model ({reason})'
            )
            raise ValueError(
                f'{file} {problem}; it must hold the weights of {name!r}.'
            ) from error
        if isinstance(error, OSError) or 'ownload' in reason:
            why = (
                'cannot be downloaded'
                if download
                else 'is not fetched without --download (download=True)'
            )
            advice = (
                'get it elsewhere and give its file as pretrained'
                if what.startswith('the weights')
                else 'fetch it where there is a network'
            )
            raise FileNotFoundError(
                f'a file of {what} is not on this machine and {why}; {advice} '
                f'({reason}).'
            ) from error
        raise ValueError(f'{what} cannot be built ({reason}).') from error
    for key, value in model.named_parameters():
        if not value.isfinite().all():
            raise ValueError(
                f'{pretrained or name} holds values that are not finite (in {key}); '
                f'it is damaged, or the weights diverged in training.'
            )
    return model, tokenizer


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).name == 'constants.pkl' for name in archive.namelist())


def _preprocessing_of_tags(name: str) -> dict[str, object] | None:
    """Returns the preprocessing that all tags of a model share, None if they differ."""
    open_clip = import_open_clip()
    keys = ('mean', 'std', 'interpolation', 'resize_mode')
    found = [
        {key: cfg[key] for key in keys if cfg.get(key) is not None}
        for cfg in (
            open_clip.get_pretrained_cfg(name, tag)
            for tag in open_clip.list_pretrained_tags_by_model(name)
        )
    ]
    if not found or any(other != found[0] for other in found):
        if found:
            logging.getLogger(__name__).warning(
                'the weights of %s differ in their preprocessing, and a file does not '
                "name its own: CLIP's is used; to set another, put the file into a "
                'folder with an open_clip_config.json, and take local-dir:FOLDER as '
                'the model.',
                name,
            )
        return None
    return found[0]


@contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Forbids open_clip and transformers to fetch files, unless ``allowed``."""
    if allowed:
        yield
        return
    import huggingface_hub
    from open_clip import pretrained

    def refuse(url: str, *args: object, **kwargs: object) -> str:
        target = Path('~/.cache/clip').expanduser() / url.rsplit('/', 1)[-1]
        if target.is_file():
            return str(target)
        raise RuntimeError(f'download of {url} refused')

    flags = [
        (huggingface_hub.constants, 'HF_HUB_OFFLINE', True),
        (pretrained, 'download_pretrained_from_url', refuse),
    ]
    hub = sys.modules.get('transformers.utils.hub')
    if hasattr(hub, '_is_offline_mode'):  # transformers 4 has a copy of the flag
        flags.append((hub, '_is_offline_mode', True))
    # Version 0 of huggingface_hub looks at its flag when it opens a session.
    reset = getattr(huggingface_hub.utils, 'reset_sessions', lambda: None)
    before = [getattr(module, name) for module, name, _ in flags]
    for module, name, value in flags:
        setattr(module, name, value)
    reset()
    try:
        yield
    finally:
        for (module, name, _), value in zip(flags, before, strict=True):
            setattr(module, name, value)
        reset()


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Hides open_clip's messages that weights are random or cannot be downloaded."""
    level = logging.root.manager.disable
    if active:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)

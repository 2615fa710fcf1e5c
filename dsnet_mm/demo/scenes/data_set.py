"""The whole data set as one folder, with a manifest of its settings."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dsnet_mm.demo.folders import replacing

from .checks import check_int
from .contact_sheet import preview
from .writing import GENERATOR_VERSION, write_classification, write_detection

GENERATOR = 'dsnet_mm.datasets.scenes'
"""The generator's name in manifests. It stays, so that older sets are recognised."""


@dataclass(frozen=True)
class SceneSettings:
    """Settings of a data set.

    Attributes:
        train: Detection pictures for training, at least 1.
        val: Detection pictures for validation, at least 1.
        cls_train: Classification pictures of each class for training.
        cls_val: Classification pictures of each class for validation.
        size: Height and width of a detection picture in pixels, at least 64.
        cls_size: Height and width of a classification picture, at least 64. With
            half of ``size``, objects are about as large as those of the scenes.
        seed: Zero or more.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small.
    """

    train: int = 1000
    val: int = 100
    cls_train: int = 800
    cls_val: int = 50
    size: int = 128
    cls_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        least = {'train': 1, 'val': 1, 'size': 64, 'cls_size': 64}
        for what, value in asdict(self).items():
            check_int(what, value, least.get(what, 0))


def _read_manifest(out: Path) -> dict | None:
    """Returns the manifest of a set that ``make_scenes`` wrote, otherwise None."""
    try:
        manifest = json.loads((out / 'manifest.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    is_ours = (
        isinstance(manifest, dict)
        and manifest.get('generator') == GENERATOR
        and isinstance(manifest.get('settings'), dict)
    )
    return manifest if is_ours else None


def make_scenes(
    out: str | Path,
    settings: SceneSettings,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> dict | None:
    """Writes detection, classification, preview and manifest as one folder.

    The folder appears only when it is complete. ``manifest.json`` holds the settings
    and the number of annotations.

    Args:
        out: Folder to make.
        settings: Size of the set, size of the pictures and seed.
        overwrite: Whether to replace a set made with other settings, together with
            everything else in its folder. Other folders are never replaced.
        progress: Whether to show progress bars.

    Returns:
        The manifest, or None if the folder holds a set with these settings already.

    Raises:
        FileExistsError: If ``out`` holds something else.
    """
    out = Path(out).resolve()
    wanted = {
        'generator': GENERATOR,
        'version': GENERATOR_VERSION,
        'settings': asdict(settings),
    }
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found = _read_manifest(out)
        if found is None:
            raise FileExistsError(
                f'{out} exists and is no data set of this generator; choose another '
                f'folder'
            )
        if all(found.get(key) == value for key, value in wanted.items()):
            return None
        if not overwrite:
            made = {'version': found.get('version'), **found['settings']}
            asked = {'version': GENERATOR_VERSION, **wanted['settings']}
            changes = [
                f'{key} {made.get(key)}, not {value}'
                for key, value in asked.items()
                if made.get(key) != value
            ]
            raise FileExistsError(
                f'{out} holds a set made with other settings ({"; ".join(changes)}); '
                f'choose another folder or allow overwriting'
            )
    shared = {'seed': settings.seed, 'progress': progress}
    with replacing(out) as fresh:
        objects = write_detection(
            fresh,
            num_train=settings.train,
            num_val=settings.val,
            size=settings.size,
            **shared,
        )
        write_classification(
            fresh,
            num_train=settings.cls_train,
            num_val=settings.cls_val,
            size=settings.cls_size,
            **shared,
        )
        preview(fresh)
        manifest = {**wanted, 'objects': objects}
        (fresh / 'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')
    return manifest

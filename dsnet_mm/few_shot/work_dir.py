"""The folder of a run, and its description in ``run.json``."""

import json
from dataclasses import asdict
from pathlib import Path
from platform import python_version

import torch

from dsnet_mm.environment import commit, machine
from dsnet_mm.files import write_atomic
from dsnet_mm.version import __version__

from .config import FewShotConfig
from .methods import METHODS
from .sources import Source

FREE = ('device', 'workers', 'cache_dir', 'on_bad_image', 'download')
"""Options that may change when a run is continued: they change no result."""

GROWING = ('methods', 'oracle', 'shots', 'seeds')
"""Options that may have other values when a run is continued: they are added."""


def read_json(path: Path) -> dict:
    """Reads a JSON file of a run. Raises a ValueError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(
            f'{path} is damaged ({error}); choose another folder for the run.'
        ) from error


def claim_work_dir(
    work_dir: Path, config: FewShotConfig, source: Source
) -> FewShotConfig:
    """Prepares the folder of a new run, or checks that of a run to be continued.

    ``run.json`` describes the run: options, class names, prompts, recipes of the
    methods, and hashes of the data and weights. Methods, shots and seeds are added to
    those of the run. Returns the options of the whole run.

    Raises:
        FileExistsError: If the folder contains results with other options or other
            data, or other files.
    """
    wanted = json.loads(json.dumps(asdict(config)))
    about, contents = work_dir / 'run.json', None
    # A run without results, which a bad image has stopped, is begun again.
    if about.is_file() and any((work_dir / 'runs').glob('*.json')):
        found = read_json(about)
        wanted = _merge(work_dir, found, wanted, source)
        contents = found.get('data', {}).get('contents')
    elif not about.is_file() and work_dir.exists() and any(work_dir.iterdir()):
        raise FileExistsError(
            f'{work_dir} is not empty and not a few-shot run; choose another folder.'
        )
    description = {
        'config': wanted,
        # It takes long to read all images.
        'data': {**source.fingerprint, 'contents': contents or source.contents()},
        'title': source.title,
        'notes': source.notes,
        'class_names': list(source.class_names),
        'prompts': list(source.prompts),
        'recipes': _recipes(wanted),
    }
    write_atomic(about, json.dumps(description, indent=2))
    return FewShotConfig(**wanted)


def _recipes(config: dict) -> dict[str, list]:
    """Returns the hyper-parameters of the methods of a run, and what they may be."""
    methods = {name: METHODS[name] for name in (*config['methods'], *config['oracle'])}
    recipes = {name: [dict(m.defaults), dict(m.grid)] for name, m in methods.items()}
    return json.loads(json.dumps(recipes))


def _is_changed(old: list[dict], new: list[dict]) -> bool:
    """Tells whether a method has other hyper-parameters than in an earlier run.

    An older version wrote only a part of them, and two grids.
    """
    grid = {key: values for part in old[1:] for key, values in part.items()}
    known = {key: new[0][key] for key in old[0] if key in new[0]}
    return known != old[0] or grid != new[1]


def _merge(work_dir: Path, found: dict, wanted: dict, source: Source) -> dict:
    """Returns the options of the run with what is added to it."""
    known = found['config']
    other = [
        key
        for key in sorted(wanted.keys() | known.keys())
        if key not in (*FREE, *GROWING, 'overrides')
        # An older version did not have all options.
        and wanted.get(key) != known.get(key, getattr(FewShotConfig, key, None))
    ]
    named = {*wanted['methods'], *wanted['oracle'], *wanted['overrides']}
    other += [
        f'overrides of {name}'
        for name in sorted(named & {*known['methods'], *known['oracle']})
        if wanted['overrides'].get(name) != known['overrides'].get(name)
    ]
    if other:
        raise FileExistsError(
            f'{work_dir} contains another run, with other {", ".join(other)}; choose '
            f'another folder.'
        )
    old, data = found.get('data', {}), source.fingerprint
    changed = [key for key, value in data.items() if old.get(key) != value]
    # An image may have another time, if it has the same content.
    contents = old.get('contents')
    if 'pictures' in changed and contents and contents == source.contents():
        changed.remove('pictures')
    if changed:
        raise FileExistsError(
            f'{work_dir} contains a run with other data: '
            f'{", ".join(changed).replace("pictures", "images")} changed since it was '
            f'made, so its results cannot be continued; choose another folder.'
        )
    grown = {key: list(dict.fromkeys([*known[key], *wanted[key]])) for key in GROWING}
    for key in ('shots', 'seeds'):
        grown[key].sort()
    overrides = {**known['overrides'], **wanted['overrides']}
    merged = {**wanted, **grown, 'overrides': overrides}
    FewShotConfig(**merged)  # raises for methods of older versions
    recipes = _recipes(merged)
    changed = [k for k, old in found['recipes'].items() if _is_changed(old, recipes[k])]
    if changed:
        raise FileExistsError(
            f'{work_dir} contains a run of another version of this package, with other '
            f'hyper-parameters of {", ".join(changed)}; choose another folder.'
        )
    return merged


def describe_software() -> str:
    """Returns commit, versions, processor and threads, for tables of results."""
    on, with_ = machine(), f'torch {torch.__version__}, Python {python_version()}'
    threads = f'{on["threads"]} thread{"s" * (on["threads"] > 1)}'
    return (
        f'dsnet_mm {__version__} at commit {commit()}, {with_}; {on["processor"]} '
        f'({on["instructions"]}), {threads}'
    )

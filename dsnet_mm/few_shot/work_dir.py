"""The folder of a run and the description in it."""

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from dsnet_mm import __version__
from dsnet_mm.files import write_atomic
from dsnet_mm.tasks import FewShotTask

from .config import FewShotConfig


def read_json(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))


def claim_work_dir(work_dir: Path, config: FewShotConfig, task: FewShotTask) -> None:
    """Begin a run in a folder, or go on with it.

    A new folder gets ``run.json``: the options, class names, prompts and versions.

    Args:
        work_dir: Folder of the results.
        config: Options of the run.
        task: Its data set.

    Raises:
        FileExistsError: If the folder holds a run with other options, or something
            else.
    """
    wanted = json.loads(json.dumps(asdict(config)))
    about = work_dir / 'run.json'
    if about.is_file():
        found = read_json(about)['config']
        other = sorted(
            k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)
        )
        if other:
            raise FileExistsError(
                f'{work_dir} holds another run, with other {", ".join(other)}; choose '
                f'another folder.'
            )
        return
    if work_dir.exists() and any(work_dir.iterdir()):
        raise FileExistsError(
            f'{work_dir} is not empty and holds no few-shot run; choose another folder.'
        )
    description = {
        'config': wanted,
        'class_names': list(task.class_names),
        'prompts': list(task.prompts),
        'versions': {
            'dsnet_mm': __version__,
            'commit': _commit(),
            'torch': torch.__version__,
            'python': platform.python_version(),
        },
    }
    write_atomic(about, json.dumps(description, indent=2))


def _commit() -> str | None:
    """Return the commit of this source tree, None outside of one."""
    try:
        done = subprocess.run(
            ['git', 'rev-parse', 'HEAD'],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

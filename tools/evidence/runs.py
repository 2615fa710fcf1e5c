"""Runs a row with one seed and writes what was measured to a file."""

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from dsnet_mm.checkpoint import read_checkpoint
from dsnet_mm.engine.config import check_data, load_config
from dsnet_mm.engine.resume import find_checkpoint_to_resume
from dsnet_mm.environment import commit, find_installed, machine
from dsnet_mm.files import write_atomic
from dsnet_mm.version import __version__
from measure.complexity import count_complexity

from .tables import TABLES, Options, Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'results'
CONFIGS = Path('configs', 'evidence')
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain')


class Run:
    """A row with one seed.

    Args:
        table: Name of the table, a key of ``TABLES``.
        row: The row.
        seed: The seed.
        folder: Folder of checkpoints and logs.
        data_root: Folder of the data, or None for that of the configuration.
    """

    def __init__(
        self, table: str, row: Row, seed: int, folder: Path, data_root: str | None
    ) -> None:
        self.table, self.row, self.seed = table, row, seed
        self.work_dir = folder / table / f'{row.name}-seed{seed}'
        self.config = CONFIGS / f'{row.config}.py'
        self.options = {**_filled(row.options, seed=seed), 'randomness.seed': seed}
        self.data_root = {'data_root': data_root} if data_root else {}

    @property
    def file(self) -> Path:
        """The recorded result."""
        return RESULTS / self.table / f'{self.row.name}-seed{self.seed}.json'

    def record(self, result: dict[str, Any]) -> None:
        """Writes the result to its file."""
        write_atomic(self.file, json.dumps(result, indent=1, sort_keys=True) + '\n')

    @property
    def keys(self) -> set[tuple[str, ...]]:
        """The keys that this run sets, see :func:`own_keys`."""
        options = {tuple(key.split('.')) for key in self.options}
        return own_keys(ROOT / self.config) | options

    @property
    def threads(self) -> int:
        """The recorded number of threads, or PyTorch's default if there is no record.

        Another number makes another training: rounding differs, and grows.
        """
        if self.file.is_file():
            return json.loads(self.file.read_text())['machine']['threads']
        return torch.get_num_threads()

    def load_config(self) -> Config:
        """Loads the configuration of this run.

        Raises:
            FileNotFoundError: If data is missing.
        """
        cfg = load_config(str(ROOT / self.config), self.options | self.data_root)
        try:
            check_data(cfg, ('train', 'test'))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'{error}. This table needs {TABLES[self.table].data}'
            ) from error
        return cfg

    def arguments(self, tool: str, *others: str, options: Options = {}) -> list[str]:
        """Returns the arguments of a tool, relative to the root of the repository."""
        options = self.options | self.data_root | options
        return [
            f'tools/{tool}',
            str(self.config),
            *others,
            '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        ]

    def execute(self) -> dict[str, Any]:
        """Trains, or goes on where a training was killed, and evaluates.

        Returns:
            The result.

        Raises:
            FileNotFoundError: If data is missing.
            RuntimeError: If a tool fails.
        """
        cfg, started_at = self.load_config(), commit()
        work_dir = ['--work-dir', str(self.work_dir)]
        last = cfg.train_cfg.get('max_iters') or cfg.train_cfg.get('max_epochs')
        checkpoint = find_checkpoint_to_resume(str(self.work_dir))
        if not (checkpoint and Path(checkpoint).stem.endswith(f'_{last}')):
            others = [] if cfg.default_scope == 'mmpretrain' else ['--no-validate']
            training = self.arguments('train.py', *work_dir, '--resume', *others)
            _call(training, self.threads)
            checkpoint = find_checkpoint_to_resume(str(self.work_dir))
        metrics, seconds = self.test(checkpoint, self.work_dir / 'test')
        for name, options in TABLES[self.table].others.items():
            folder = self.work_dir / f'test_{name}'
            options = _filled(options, data_root=cfg.data_root)
            found, _ = self.test(checkpoint, folder, options)
            metrics |= {f'{name}/{key}': value for key, value in found.items()}
        history = read_checkpoint(checkpoint)['message_hub']['log_scalars']
        plain = load_config(str(ROOT / self.config), self.options)
        command = ['python', 'tools/reproduce.py', self.table, self.row.name]
        return dict(
            table=self.table,
            row=self.row.name,
            seed=self.seed,
            metrics=metrics,
            curve=read_log(self.work_dir),
            train_cpu_seconds=float(history['train/cpu_time'].data[0].sum()),
            test_cpu_seconds=seconds,
            model=count(cfg, TABLES[self.table].size),
            command=shlex.join([*command, '--seed', str(self.seed)]),
            config=as_json(plain),
            commit=started_at,
            versions=versions(),
            machine=machine(),
        )

    def test(
        self, checkpoint: str, folder: Path, options: Options = {}
    ) -> tuple[dict[str, float], float]:
        """Evaluates a checkpoint with ``tools/test.py``.

        Args:
            checkpoint: Checkpoint or weights.
            folder: Working directory of the test.
            options: Values of the configuration for this test.

        Returns:
            The metrics and the processor seconds.
        """
        work_dir = ['--work-dir', str(folder)]
        testing = self.arguments('test.py', checkpoint, *work_dir, options=options)
        seconds = _call(testing, self.threads)
        files = folder.glob('*/metrics.json')
        latest = max(files, key=lambda path: path.stat().st_mtime)
        return json.loads(latest.read_text()), seconds


def _filled(options: Options, **values: Any) -> dict[str, Any]:
    """Returns options with the values of ``{name}`` in their texts."""
    return {
        key: value.format(**values) if isinstance(value, str) else value
        for key, value in options.items()
    }


def runs_of(
    table: str,
    names: list[str],
    seeds: list[int] | None,
    folder: Path,
    data_root: str | None,
) -> Iterator[Run]:
    """Yields the runs of a table, the first seed of every row first.

    Args:
        table: Name of the table.
        names: Names of rows; none stands for all.
        seeds: The seeds, or None for those of each row.
        folder: Folder of checkpoints and logs.
        data_root: Folder of the data, or None for that of the configuration.
    """
    rows = [row for row in TABLES[table].rows if not names or row.name in names]
    for seed in seeds or range(max((row.seeds for row in rows), default=0)):
        for row in rows:
            if seeds or seed < row.seeds:
                yield Run(table, row, seed, folder, data_root)


def read_log(work_dir: Path) -> list[dict[str, float]]:
    """Reads what a training logged, also if it was interrupted.

    Args:
        work_dir: Working directory of the training.

    Returns:
        Loss and processor seconds of an iteration, averaged since the point before,
        or the accuracy on the images left out, each with the number of iterations
        or epochs, in order.
    """
    points: dict[tuple[int, bool], dict] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            keys = ('step', 'epoch', 'loss', 'cpu_time', 'accuracy/top1')
            point = {key: entry[key] for key in keys if key in entry}
            points[entry['step'], 'loss' in entry] = point
    return [points[key] for key in sorted(points)]


def own_keys(path: Path) -> set[tuple[str, ...]]:
    """Returns the keys that a configuration and its bases in this repository set.

    What only bases of mmdet and mmpretrain set is not among them: it differs between
    their versions.

    Args:
        path: Configuration file.
    """
    keys = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name != '_base_':
                keys |= {(name, *rest) for rest in _keys_in(node.value)}
                continue
            bases = ast.literal_eval(node.value)
            for base in [bases] if isinstance(bases, str) else bases:
                if '::' not in base:
                    keys |= own_keys(path.parent / base)
    return keys


def _keys_in(node: ast.expr) -> set[tuple[str, ...]]:
    """Returns the keys of nested ``dict(...)`` calls, () for any other value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        names = [keyword.arg for keyword in node.keywords]
        if names and None not in names and '_delete_' not in names:
            return {(k.arg, *rest) for k in node.keywords for rest in _keys_in(k.value)}
    return {()}


def differing(one: dict, other: dict, keys: set[tuple[str, ...]]) -> list[str]:
    """Returns those of the keys whose values differ between two configurations.

    Args:
        one: Configuration, as :func:`as_json` returns it.
        other: Another one.
        keys: The keys, as :func:`own_keys` returns them.
    """
    return sorted('.'.join(k) for k in keys if _value(one, k) != _value(other, k))


def _value(node: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return node


def as_json(cfg: Config) -> dict[str, Any]:
    """Returns a configuration as a result records it."""
    return json.loads(json.dumps(cfg.to_dict(), default=str))


def count(cfg: Config, size: int) -> dict[str, int]:
    """Counts the backbone and the neck of a configuration, without adapters.

    Args:
        cfg: Configuration.
        size: Side of the image.

    Returns:
        Parameters and multiply-adds of the backbone, of the neck behind it if the
        model is a detector, and the parameters of the whole model.
    """
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model.get('detector', cfg.model))
    model.eval()
    image = torch.zeros(1, 3, size, size)
    backbone = count_complexity(model.backbone, image)
    result = dict(
        params=sum(p.numel() for p in model.parameters()),
        backbone_params=backbone.params,
        backbone_multiply_adds=backbone.multiply_adds,
    )
    if cfg.default_scope == 'mmdet':
        with torch.no_grad():
            maps = model.backbone(image)
        neck = count_complexity(model.neck, maps)
        result |= dict(neck_params=neck.params, neck_multiply_adds=neck.multiply_adds)
    return result


def check_cost(table: str) -> dict[str, float]:
    """Compares the multiply-adds of a table's backbones with those of its first row.

    Returns:
        The relative difference of each row.

    Raises:
        ValueError: If one is larger than 5 %.
    """
    size = TABLES[table].size
    costs = {
        row.name: count(
            load_config(str(ROOT / CONFIGS / f'{row.config}.py'), {}), size
        )['backbone_multiply_adds']
        for row in TABLES[table].rows
    }
    first = next(iter(costs.values()))
    differences = {name: cost / first - 1 for name, cost in costs.items()}
    far = {n: f'{d:+.1%}' for n, d in differences.items() if abs(d) > 0.05}
    if far:
        raise ValueError(
            f'the backbones of {table} do not need the same multiply-adds within 5 %: '
            f'{far}; change their widths or depths'
        )
    return differences


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter."""
    found = {name: find_installed(name) for name in PACKAGES}
    return dict(
        python=python_version(),
        dsnet_mm=__version__,
        **{name: installed.version for name, installed in found.items() if installed},
    )


def _call(arguments: list[str], threads: int) -> float:
    """Runs a tool, with its output on the screen.

    Args:
        arguments: Its file and its arguments.
        threads: Number of its threads.

    Returns:
        Its processor seconds.

    Raises:
        RuntimeError: If it fails.
    """
    env = {
        # Threads that wait for others would otherwise keep their cores busy.
        'GOMP_SPINCOUNT': '10000',
        **os.environ,
        'OMP_NUM_THREADS': str(threads),
        'MKL_NUM_THREADS': str(threads),
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    }
    before = os.times()
    if subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env).returncode:
        raise RuntimeError(
            f'{shlex.join(arguments)} failed; its messages stand above this line'
        )
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # user and system, of child processes

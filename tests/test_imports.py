"""Imports of the package, from lower folders only, and the files of its wheel."""

import ast
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import setuptools
from setuptools.command.build_py import build_py

from .conftest import REPO

PACKAGE = REPO / 'dsnet_mm'

# Lowest first. A module imports from its own folder and from lower ones. The modules
# beside __init__ are lowest, and __init__ and __main__ are on top of all.
FOLDERS = (
    *('.', 'ops', 'clip', 'datasets', 'models'),
    *('engine', 'inference', 'few_shot', 'demo'),
)


def module_name(path: Path) -> str:
    """Dotted name of a file: dsnet_mm/ops/__init__.py is dsnet_mm.ops."""
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def level(module: str) -> int:
    """Place of a module in the order of the folders."""
    if module in ('dsnet_mm', 'dsnet_mm.__main__'):
        return len(FOLDERS)
    path = FILES[module].relative_to(PACKAGE)
    return FOLDERS.index(path.parts[0] if len(path.parts) > 1 else '.')


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, also inside of functions."""
    path = FILES[module]
    package = module if path.stem == '__init__' else module.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit('.', node.level - 1)[0] if node.level else ''
            base = '.'.join(filter(None, (base, node.module)))
            names = {f'{base}.{name.name}' for name in node.names}
            # A name of a package is a module, or comes from its __init__.
            found |= {name if name in FILES else base for name in names}
    return (found & FILES.keys()) - {module}


@pytest.mark.parametrize('module', FILES)
def test_no_import_from_a_higher_folder(module: str):
    higher = {name for name in imported(module) if level(name) > level(module)}
    assert not higher, f'{module} imports {higher}'


def test_no_circle():
    # static_order raises CycleError, which names the modules of the circle.
    order = TopologicalSorter({module: imported(module) for module in FILES})
    assert len(list(order.static_order())) == len(FILES)


def test_tools_are_not_imported():
    for module, path in FILES.items():
        text = path.read_text()
        assert 'import measure' not in text and 'from measure' not in text, module
        assert 'import evidence' not in text and 'from evidence' not in text, module


def test_wheel_has_no_tool_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tools that need the recorded results or the repository stay there."""
    arguments = {}
    monkeypatch.setattr(setuptools, 'setup', arguments.update)
    monkeypatch.setattr(build_py, 'run', lambda self: None)
    monkeypatch.chdir(REPO)
    monkeypatch.setenv('DSNET_MM_WITH_OPS', '0')
    runpy.run_path('setup.py')
    distribution = setuptools.Distribution(dict(ext_modules=[...]))
    command = arguments['cmdclass']['build_py'](distribution)
    command.build_lib, command.editable_mode = str(tmp_path), False
    command.run()
    mim = tmp_path / 'dsnet_mm' / '.mim'
    files = {path.relative_to(mim).as_posix() for path in mim.rglob('*')}
    assert {'tools/train.py', 'configs/dsnet/dsnet_cifar10.py'} <= files
    assert 'tools/measure/complexity.py' in files
    names = {Path(file).name for file in files}
    assert not names & {'evidence', 'reproduce.py', 'publish_weights.py'}

"""No module of the package imports from a higher layer."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'dsnet_mm'
LAYERS = ('ops', 'tasks', 'clip', 'models', 'datasets', 'few_shot')
FILES = [file for layer in LAYERS for file in (PACKAGE / layer).rglob('*.py')]


def imported_by(file: Path) -> set[str]:
    """Returns the absolute names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(PACKAGE.parent).parts[: -node.level or None]
            parts = (*(package if node.level else ()), *filter(None, [node.module]))
            names |= {'.'.join((*parts, alias.name)) for alias in node.names}
    return names


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_import_from_a_higher_layer(file):
    layer = file.relative_to(PACKAGE).parts[0]
    packages = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    above = packages - set(LAYERS[: LAYERS.index(layer) + 1])
    names = (name.split('.') for name in imported_by(file))
    assert not above & {name[1] for name in names if name[0] == 'dsnet_mm'}

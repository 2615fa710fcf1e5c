"""The site: ``make docs`` writes it into build/site.

The source folder of Sphinx is the root of the repository. Pages keep their place in it,
so relative links work on the site, in the repository and in a source distribution.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

from dsnet_mm import __version__

REPO = Path(__file__).parents[1]

project = 'dsnet_mm'
release = version = __version__
root_doc = 'README'
include_patterns = ['*.md', 'docs/*.md', 'configs/*/README.md', 'weights/*.md']
exclude_patterns = ['.*', 'build', 'data', 'work_dirs']
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'dsnet_mm {version}'
html_show_copyright = html_show_sphinx = False

myst_heading_anchors = 3
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# suppress_warnings = ['myst.xref_missing']  # TODO

# Captions of the navigation and their pages.
NAVIGATION = {
    'Using it': [
        'docs/training',
        'docs/inference',
        'docs/streams',
        'docs/clip_adapter',
        'docs/open_clip_models',
        'docs/export',
        'docs/ops',
    ],
    'Understanding it': ['docs/ds_net', 'docs/ds_fpn', 'docs/speed', 'docs/results'],
    'Reference': ['docs/configurations', 'docs/api'],
    'Development': ['docs/contributing', 'CHANGELOG'],
}


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds the navigation to the first page. README.md itself does without it."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            entries = '\n'.join(f'/{name}' for name in pages)
            source[0] += (
                f'\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n'
            )


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Copies the first page to the name that servers look for."""
    if not error:
        shutil.copy(Path(app.outdir, 'README.html'), Path(app.outdir, 'index.html'))


def setup(app: Sphinx) -> None:
    app.connect('source-read', add_navigation)
    app.connect('build-finished', add_index)

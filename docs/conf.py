"""The site: ``make docs`` writes it into build/site.

The source folder of Sphinx is the root of the repository. Pages keep their place in it,
so relative links work on the site, in the repository and in a source distribution.
"""

import re
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

# Captions of the navigation and their pages, some with a title other than their own.
NAVIGATION = {
    'Using it': [
        'docs/demo',
        'docs/page',
        'docs/tutorial_detection',
        'docs/tutorial_few_shot',
        'docs/training',
        'docs/cluster',
        'docs/analysis',
        'docs/inference',
        'Few-shot classification <docs/clip_adapter>',
        'Few-shot detection <docs/few_shot_detection>',
        'docs/export',
        'docs/ops',
    ],
    'Understanding it': [
        'docs/ds_net',
        'DS-FPN <docs/ds_fpn>',
        'docs/streams',
        'docs/speed',
        'docs/reliability',
    ],
    'Results': [
        'docs/results',
        'Few-shot results <docs/few_shot_results>',
        'Weights for nuclei <weights/mask_rcnn_dsnet_long_nuclei>',
        'Weights for nuclei, small <weights/mask_rcnn_dsnet_nuclei>',
        'Weights for CIFAR-10 <weights/dsnet_cifar10>',
    ],
    'Reference': [
        'docs/tools',
        'docs/configurations',
        'Configurations of DS-Net <configs/dsnet/README>',
        'Configurations of CLIP-Adapter <configs/clip_adapter/README>',
        'Configurations of the results <configs/evidence/README>',
        'docs/api',
    ],
    'Development': ['docs/contributing', 'SECURITY', 'CHANGELOG'],
}


def navigation() -> str:
    """Returns the navigation, which is hidden in the first page."""
    trees = (
        f':hidden:\n:caption: {caption}\n\n' + '\n'.join(pages)
        for caption, pages in NAVIGATION.items()
    )
    return ''.join(f'\n```{{toctree}}\n{tree}\n```\n' for tree in trees)


def configurations() -> str:
    """Returns a table of all configurations, from the comments at their heads."""
    lines = []
    for folder in sorted(REPO.glob('configs/*/')):
        lines += ['', f'## {folder.name}', '', '| name | what it is |', '|---|---|']
        for path in sorted(folder.glob('*.py')):
            comment = re.match(r'(# .*\n)+', path.read_text())
            if not comment:
                raise ValueError(f'{path} does not begin with a comment')
            text = ' '.join(comment[0].replace('# ', '').splitlines())
            link = f'../configs/{folder.name}/{path.name}'
            lines.append(f'| [{path.stem}]({link}) | {text.replace("*", "&ast;")} |')
    return '\n'.join(lines)


def add_generated(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds to pages what the repository does without."""
    if page == root_doc:
        source[0] += navigation()
    source[0] = source[0].replace('<!-- configurations -->', configurations())


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Copies the first page to the name that servers look for."""
    if not error:
        shutil.copy(Path(app.outdir, 'README.html'), Path(app.outdir, 'index.html'))


def shorten(app: Sphinx, *args) -> tuple[str | None, str | None]:
    """Leaves out module names where Sphinx cannot parse a signature.

    It cannot parse ``<factory>``, the default of a field of a data class.
    """
    *_, signature, returned = args
    if signature and '<' in signature:
        signature = re.sub(r'~[\w.]*\.', '', signature)
    return signature, returned


def setup(app: Sphinx) -> None:
    app.connect('autodoc-process-signature', shorten)
    app.connect('source-read', add_generated)
    app.connect('build-finished', add_index)

"""The documentation: every snippet runs, and the site builds.

docs/contributing.md describes the comments that mark snippets.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from .conftest import REPO, clear_instances, draw, write_coco

PAGES = [
    path.relative_to(REPO).as_posix()
    for pattern in ('README.md', 'docs/*.md', 'configs/*/README.md')
    for path in sorted(REPO.glob(pattern))
]
LANGUAGES = ('bash', 'python', 'text', '{eval-rst}')
FENCE = re.compile(
    r'(?:^<!-- (?P<mark>not run|run with): (?P<note>.+?) -->\n)?'
    r'^```(?P<language>.*)\n(?P<code>[\s\S]*?)^```$',
    re.M,
)
FILE = re.compile(r'# ([\w./]+\.\w+)\n')  # the first line of a block that is a file


class Block(NamedTuple):
    """A fenced block of a page, with its first line, and its mark if it has one."""

    language: str
    code: str
    line: int
    mark: str | None
    note: str | None


def blocks_of(page: str) -> list[Block]:
    """Finds the blocks of a page, in order."""
    text = (REPO / page).read_text()
    return [
        Block(
            found['language'],
            found['code'],
            text.count('\n', 0, found.start('code')) + 1,
            found['mark'],
            found['note'],
        )
        for found in FENCE.finditer(text)
    ]


def commands_of(code: str) -> list[str]:
    """Splits the code of a shell into commands, a line each if it is not continued."""
    lines = code.replace('\\\n', ' ').splitlines()
    return [line for line in lines if line.strip() and not line.startswith('#')]


# ------------------------------------------------------------------------- running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip: dict) -> Path:
    """The folder in which a page runs: links to the repository, and small data."""
    for name in ('configs', 'docs', 'tools', 'weights'):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / 'clip.json').symlink_to(tiny_clip['model'])
    (tmp_path / 'clip.pt').symlink_to(tiny_clip['pretrained'])
    nuclei = cv2.imread(str(REPO / 'docs/images/nuclei.jpg'))
    (tmp_path / 'photos').mkdir()
    for i in range(2):
        part = nuclei[128 * i : 128 * (i + 1), :128]
        cv2.imwrite(str(tmp_path / 'photos' / f'{i}.jpg'), part)
    rng = np.random.default_rng(0)
    for root, num in (('my_images', 40), ('other_images', 4)):
        for kind, name in enumerate(('square', 'disc')):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(num):
                image = draw(rng, kind)[0]
                cv2.imwrite(str(tmp_path / root / name / f'{i}.png'), image)
    cv2.imwrite(str(tmp_path / 'image.jpg'), draw(rng, 0)[0])
    for split, num in (('train', 4), ('val', 2)):
        write_coco(tmp_path / 'data' / 'coco', split, num)
    (tmp_path / 'data' / 'mine').symlink_to('coco')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    binaries = Path(sys.executable).parent
    monkeypatch.setenv('PATH', f'{binaries}{os.pathsep}{os.environ["PATH"]}')
    return tmp_path


def run_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a tool or a module in this process, which is quicker than another one."""
    clear_instances()
    module = words[0] == '-m'
    monkeypatch.setattr(sys, 'argv', words[module:])
    try:
        if module:
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(words[0], run_name='__main__')
    except SystemExit as stop:
        assert stop.code in (None, 0), stop.code


def run_shell(code: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs commands, those of Python with extra arguments."""
    for command in commands_of(code):
        variable, equals, value = command.removeprefix('export ').partition('=')
        if equals and variable.isidentifier() and ' ' not in value:
            monkeypatch.setenv(variable, value)
            continue
        words = shlex.split(os.path.expandvars(command), comments=True)
        if words[0] == 'python' and not {'|', '>', '&&'} & set(words):
            run_python(words[1:] + shlex.split(extra), monkeypatch)
        else:
            done = subprocess.run(
                ['bash', '-euo', 'pipefail', '-c', command],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f'{command}\n{done.stdout}{done.stderr}'


def run_code(block: Block, page: str, namespace: dict) -> None:
    """Runs Python, or writes the file that it is and builds the model of it."""
    file = FILE.match(block.code)
    if not file:
        code = '\n' * (block.line - 1) + block.code
        exec(compile(code, page, 'exec'), namespace)
        return
    Path(file[1]).write_text(block.code)
    if '_base_' in block.code:
        cfg = Config.fromfile(file[1])
        init_default_scope(cfg.default_scope)
        MODELS.build(cfg.model)


@pytest.mark.parametrize('page', PAGES)
def test_snippets_run(
    page: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    namespace = {'__name__': '__main__'}
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f'{page}:{block.line}: {block.language!r}'
        if block.mark == 'not run' or block.language in ('text', '{eval-rst}'):
            continue
        try:
            if block.language == 'python':
                run_code(block, page, namespace)
            else:
                run_shell(block.code, block.note or '', monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f'the snippet at {page}:{block.line}') from error


# ------------------------------------------------------------- commands that do not run


def test_commands_are_in_blocks_that_are_tested() -> None:
    command = re.compile(r'^ *(python|pip|make|bash|torchrun) \S', re.M)
    for page in PAGES:
        assert not command.search(FENCE.sub('', (REPO / page).read_text())), page
        for block in blocks_of(page):
            if block.language == 'text':
                assert not command.search(block.code), f'{page}:{block.line}'


def help_of(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """Returns the help of a tool: its path, and a command if it has some."""
    monkeypatch.setattr(sys, 'argv', [*words, '--help'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(words[0], run_name='__main__')
    assert stop.value.code == 0
    return capsys.readouterr().out


def check_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Checks what a command names: files, tools and their options, targets, extras."""
    words = shlex.split(command, comments=True)
    for word in words:
        if re.match(r'(configs|tools|weights|docs)/', word):
            assert (REPO / word).exists(), f'{command}: there is no {word}'
    if 'make' in words:
        for target in words[words.index('make') + 1 :]:
            assert re.search(rf'^{target}:', (REPO / 'Makefile').read_text(), re.M)
    for extras in re.findall(r'\[([a-z,]+)\]', command) if 'pip' in words else ():
        for extra in extras.split(','):
            text = (REPO / 'pyproject.toml').read_text()
            assert re.search(rf'^{extra} = \[', text, re.M), f'no extra {extra}'
    scripts = [
        i for i, word in enumerate(words) if re.match(r'tools/.*\.(py|sh)', word)
    ]
    if not scripts or words[0] == 'pip':
        return
    script, *arguments = words[scripts[0] :]
    # The launchers hand their options to the tool that they start.
    script = re.sub(r'/(dist|slurm)_(\w+)\.sh', r'/\2.py', script)
    if script.endswith('.py'):
        # The help of few_shot.py is that of its command.
        command = arguments[:1] if script == 'tools/few_shot.py' else []
        text = help_of([str(REPO / script), *command], monkeypatch, capsys)
        for option in re.findall(r'(?<!\S)--[a-z-]+', ' '.join(arguments)):
            assert re.search(rf'{option}\b(?!-)', text), f'{script} has no {option}'


def test_commands_that_do_not_run_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv('COLUMNS', '1000')
    for page in PAGES:
        for block in blocks_of(page):
            if block.mark == 'not run' and block.language == 'bash':
                for command in commands_of(block.code):
                    check_command(command, monkeypatch, capsys)
            elif block.mark == 'not run':
                compile(block.code, f'{page}:{block.line}', 'exec')


# ------------------------------------------------------------------------- the site


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ('furo', 'myst_parser', 'sphinx')),
    reason="Sphinx is missing: pip install '.[docs]'",
)
def test_site_builds(tmp_path: Path) -> None:
    """No broken link, no page outside the navigation, no docstring in bad form."""
    arguments = ['-W', '--keep-going', '-q', '-c', 'docs', '.', str(tmp_path / 'site')]
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'site' / 'index.html').read_text()
    assert 'href="docs/api.html"' in page
    # Nothing of a page comes from elsewhere.
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)


def test_messages_of_the_ops_guide_are_in_the_code() -> None:
    code = ''.join(
        path.read_text()
        for pattern in ('dsnet_mm/**/*.py', 'tools/**/*.py', 'tools/*.sh', 'setup.py')
        for path in sorted(REPO.glob(pattern))
    )
    # A string that goes on in the next line is one string.
    code = re.sub(r"""['"]\s*\\?\n\s*f?r?['"]""", '', code)
    page = (REPO / 'docs/ops.md').read_text()
    lines = re.findall(r'^- (`.+`):\n', page, re.M)
    assert len(lines) > 20
    for message in re.findall(r'`(.+?)`', ' '.join(lines)):
        for part in message.split('...'):
            assert part in code, f'docs/ops.md: no code says {message!r}'

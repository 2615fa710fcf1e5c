"""Interrupted runs: a short version of ``make soak``, and what it must find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, run_python

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux', reason='forks, pidfd_open and /proc'
)

# A tool that writes numbers into files, one after another, and what it does wrong.
TOOL = """
import os, subprocess, sys, time
from pathlib import Path
Path('run').mkdir(exist_ok=True)
for i in range(20):
    path = Path(f'run/{i}')
    if path.exists() and 'forgets' not in sys.argv:
        continue
    part = path if 'tears' in sys.argv else Path(f'part_{i}')
    with open(part, 'w') as file:
        for _ in range(10):
            file.write(str(i) * 100)
            file.flush()
            time.sleep(0.001)
    if 'leaves' in sys.argv and i == 0:
        subprocess.Popen(['sleep', '60'])
    os.replace(part, path)
"""
# Cases of one lane, until the time is over.
CASES = """
import sys, time
from multiprocessing import get_context
from pathlib import Path
sys.path.insert(0, 'tools')
import soak
soak.WORKERS = 0.3
def result(folder):
    return {{p.name: p.read_text() for p in folder.glob('run/*')}}
root, *words = {words}
run = soak.Run('tool', tuple(words), result, soak.files('run/*'), 0)
events = get_context('fork').SimpleQueue()
lane = soak.Soak(
    Path(root), (run,), 0, 1, time.monotonic() + 6, events,
    get_context('fork').Barrier(1),
)
figures = soak.Figures()
maker = get_context('fork').Process(target=lane.lane, args=(0,))
maker.start()
while (event := events.get()) is not None:
    figures.add(event)
print('equal', figures.equal, 'interrupts', figures.kinds.total(), figures.failures)
"""


@pytest.mark.parametrize(
    ('wrong', 'fact'),
    [
        ('', None),
        ('forgets', 'done again'),
        ('tears', 'differ'),
        ('leaves', 'outlived'),
    ],
)
def test_what_is_wrong_is_found(wrong: str, fact: str | None, tmp_path: Path) -> None:
    (tmp_path / 'tool.py').write_text(TOOL)
    words = [str(tmp_path / 'soak'), str(tmp_path / 'tool.py'), wrong]
    done = run_python(CASES.format(words=words))
    assert done.returncode == 0, done.stderr
    _, equal, _, interrupts, failures = done.stdout.split(maxsplit=4)
    if fact is None:
        assert int(equal) > 3
        assert int(interrupts) > 3
        assert failures == '[]\n'
    else:
        assert fact in failures


def test_a_minute_of_interrupts(tmp_path: Path) -> None:
    out = tmp_path / 'soak'
    command = ['tools/soak.py', '--minutes=0.9', '--lanes=1', f'--out={out}', '--only']
    done = subprocess.run(
        [sys.executable, *command, 'training', 'few-shot run', 'inference'],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / 'soak.json').read_text())
    assert figures['kills'] >= 5
    assert figures['equal'] >= 3
    assert not figures['failures']

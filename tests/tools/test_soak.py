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
import json, sys, time
from multiprocessing import get_context
from pathlib import Path
sys.path.insert(0, 'tools')
import soak
from soaking import interrupts, runs
interrupts.WORKERS = 0.3
def result(folder):
    return {{p.name: p.read_text() for p in folder.glob('run/*')}}
root, forks, found = Path({root!r}), get_context('fork'), {{}}
for wrong, seconds in dict(nothing=3, forgets=3, tears=6, leaves=0).items():
    words = (str(root / 'tool.py'), wrong)
    run = soak.Run('tool', words, result, runs.files('run/*'), 0)
    lane = soak.Soak(
        root / wrong, (run,), 0, 1, time.monotonic() + seconds,
        forks.SimpleQueue(), forks.Barrier(1),
    )
    figures = soak.Figures()
    forks.Process(target=lane.lane, args=(0,)).start()
    while (event := lane.events.get()) is not None:
        figures.add(event)
    found[wrong] = figures.equal, figures.kinds.total(), figures.failures
print(json.dumps(found))
"""


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / 'tool.py').write_text(TOOL)
    done = run_python(CASES.format(root=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    equal, interrupts, failures = found.pop('nothing')
    assert equal
    assert interrupts
    assert not failures
    facts = dict(forgets='done again', tears='differ', leaves='outlived')
    assert all(fact in str(found[wrong][2]) for wrong, fact in facts.items()), found


def test_a_minute_of_interrupts(tmp_path: Path) -> None:
    """Of a training with EMA and workers, and of inference."""
    out = tmp_path / 'soak'
    command = ['tools/soak.py', '--minutes=0.7', '--lanes=2', f'--out={out}', '--only']
    done = subprocess.run(
        [sys.executable, *command, 'training, EMA, 2 workers', 'inference'],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / 'soak.json').read_text())
    assert figures['equal'] >= 2
    assert figures['kills']
    assert not figures['failures']

"""Arguments that the tools have in common."""

import argparse
import sys
import time
from pathlib import Path

import pytest

from dsnet_mm.engine.launch import OldFlag
from tests.conftest import run_python


def test_the_old_name_of_a_flag_sets_it_and_warns(capsys: pytest.CaptureFixture):
    parser = argparse.ArgumentParser()
    parser.add_argument('--no-images', action='store_true')
    parser.add_argument('--no-pictures', action=OldFlag, new='--no-images')
    assert not parser.parse_args([]).no_images
    assert parser.parse_args(['--no-pictures']).no_images
    assert '--no-images' in capsys.readouterr().err
    assert '--no-pictures' not in parser.format_help()


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the kernel of Linux')
def test_a_process_ends_with_its_parent() -> None:
    code = """
import subprocess, sys
wait = 'import time, dsnet_mm.engine.launch as x; x.end_with_parent(); print()'
wait += '; time.sleep(30)'
quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child = subprocess.Popen([sys.executable, '-uc', wait], **quiet)
child.stdout.readline()
print(child.pid, flush=True)
__import__('os')._exit(0)
"""
    child = Path('/proc', run_python(code).stdout.strip(), 'stat')
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(')')[2].split()[0] == 'Z':
            return
        time.sleep(0.1)
    raise AssertionError('the child has outlived its parent by 10 s')

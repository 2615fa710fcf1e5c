"""The versions that tools/install.sh installs, and their hashes."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPO

tomllib = pytest.importorskip('tomllib')
LOCK = REPO / 'requirements' / 'onedl.txt'
# A pin, its marker, and its hashes.
ENTRY = re.compile(r'^([a-z0-9-]+)==(\S+)( ; [^\\\n]+)?((?: *\\\n +--hash=\S+)*)', re.M)


def test_all_requirements_are_pinned_with_hashes():
    project = tomllib.loads((REPO / 'pyproject.toml').read_text())['project']
    script = (REPO / 'tools' / 'install.sh').read_text()
    extras = re.search(r'extras=\$family,(\S+) ;;', script)[1].split(',')
    wanted = (REPO / 'requirements' / 'build.in').read_text().splitlines()[1:]
    wanted += project['dependencies'] + project['optional-dependencies']['onedl']
    wanted += [r for e in extras for r in project['optional-dependencies'][e]]
    entries = ENTRY.findall(LOCK.read_text())
    for requirement in map(Requirement, wanted):
        if requirement.name != 'dsnet_mm':
            name = canonicalize_name(requirement.name)
            versions = [version for pin, version, *_ in entries if pin == name]
            assert versions, name
            assert all(map(requirement.specifier.contains, versions)), name
    cpu = ENTRY.findall(LOCK.with_name('torch-cpu.txt').read_text())
    for pin, *_, hashes in entries + cpu:
        assert re.search('sha256:[0-9a-f]{64}', hashes), pin
    # The builds for the CPU are of the same versions.
    for pin, version, *_ in cpu:
        assert version.removesuffix('+cpu') in [v for p, v, *_ in entries if p == pin]

"""Build steps that pyproject.toml cannot express."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Adds configurations and tools to the wheel, where mim looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib) / 'dsnet_mm' / '.mim'
        for name in ('configs', 'tools'):
            shutil.copytree(
                name,
                mim / name,
                ignore=shutil.ignore_patterns('__pycache__'),
                dirs_exist_ok=True,
            )
        shutil.copy('model-index.yml', mim)


setup(cmdclass={'build_py': BuildPy})

"""The build, which starts anew each time; setup.cfg describes everything else.

setuptools packs whatever it finds in build/lib, and what an earlier build left there may have been deleted since.
"""

import shutil

from setuptools import setup
from setuptools.command.build import build


class CleanBuild(build):
    """setuptools' own, without what an earlier one left."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(cmdclass={"build": CleanBuild})

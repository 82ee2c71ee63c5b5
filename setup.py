"""What setup.cfg cannot say: the wheel holds experiments and configs, too.

They lie in `tokjax/shipped`, where only the command `tokjax` looks, so that no
packages of these names appear in site-packages. An editable install uses the
checkout itself.
"""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

SHIPPED = ("experiments", "configs")


class Build(build_py):
  """Copies `SHIPPED` next to the modules of tokjax."""

  def run(self):
    super().run()
    if self.editable_mode:
      return
    target = pathlib.Path(self.build_lib, "tokjax", "shipped")
    for name in SHIPPED:
      shutil.rmtree(target / name, ignore_errors=True)
      shutil.copytree(
        name, target / name, ignore=shutil.ignore_patterns("__pycache__")
      )


setuptools.setup(cmdclass={"build_py": Build})

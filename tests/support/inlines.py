"""Compiles ``inlines.pyx``, once a session, and with undefined behaviour as a crash."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

SETUP = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
root = sys.argv.pop(1)
sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
setup(name="inlines", ext_modules=cythonize(
    [Extension("inlines", ["inlines.pyx"], include_dirs=[root + "/include"],
               extra_compile_args=["-O1", "-Wno-sign-compare", *sanitize],
               extra_link_args=sanitize)],
    include_path=[root + "/pyx"], build_dir="build"))
"""


@functools.cache
def load() -> ModuleType:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "inlines.pyx")
        source.write_text(Path(__file__).with_suffix(".pyx").read_text())
        Path(folder, "setup.py").write_text(SETUP)
        subprocess.run(
            [sys.executable, "setup.py", ROOT, "-q", "build_ext", "--inplace"],
            cwd=folder,
            check=True,
        )
        (built,) = Path(folder).glob("inlines.*.so")
        spec = importlib.util.spec_from_file_location("inlines", built)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

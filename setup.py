"""What pyproject.toml cannot say: the Cython extensions and where their sources live.

Sources are in ``pyx/svcdp``, the package is in ``src/svcdp``. The wheel carries the
``.pxd`` files and headers beside the modules, so that others can cimport the core.

Environment: ``SVCDP_SANITIZE=1`` builds with AddressSanitizer and
UndefinedBehaviorSanitizer, ``SVCDP_SANITIZE=thread`` with ThreadSanitizer, ``SVCDP_DEBUG=1``
without optimisation.
"""

import os
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MODULES = sorted((ROOT / "pyx").glob("svcdp/*/*.pyx"))

COMPILE_ARGS = ["-std=c11", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"]
LINK_ARGS: list[str] = []
if os.environ.get("SVCDP_DEBUG"):
    COMPILE_ARGS += ["-O0", "-g"]
if kind := os.environ.get("SVCDP_SANITIZE"):
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if kind == "thread":
        SANITIZE = ["-fsanitize=thread"]
    COMPILE_ARGS += ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZE]
    LINK_ARGS += SANITIZE


def extension(source: Path) -> Extension:
    relative = source.relative_to(ROOT)
    return Extension(
        ".".join(relative.with_suffix("").parts[1:]),
        [str(relative)],
        include_dirs=["include"],
        depends=[str(path) for path in sorted(Path("include").rglob("*.h"))],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=LINK_ARGS,
    )


class BuildWithDeclarations(build_py):
    """Adds the ``.pxd`` files and C headers to the built package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for root, pattern, target in (("pyx", "*.pxd", "."), ("include", "*.h", "svcdp/include")):
            for source in sorted((ROOT / root).rglob(pattern)):
                destination = Path(self.build_lib, target, source.relative_to(ROOT / root))
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, destination)


setup(
    ext_modules=cythonize(
        [extension(source) for source in MODULES],
        include_path=["pyx"],
        compiler_directives={
            "language_level": 3,
            "binding": True,
            "embedsignature": False,
            "cdivision": True,
        },
    ),
    cmdclass={"build_py": BuildWithDeclarations},
)

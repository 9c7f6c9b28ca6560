"""Cython modules outside of svcdp can use the inline functions of an installed svcdp."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

# RFC 1071, section 3: the bytes of its numerical example, and their sum.
MODULE = """
# cython: language_level=3
from libc.stdint cimport uint8_t

from svcdp._core.checksum cimport fold, sum_bytes
from svcdp._core.packet cimport PARSED, View, parse

def folded(const uint8_t[::1] data):
    return fold(sum_bytes(&data[0], data.shape[0], 0)).to_bytes(2, "little")

def destination_offset(const uint8_t[::1] data):
    cdef View view
    if parse(&data[0], data.shape[0], &view) != PARSED:
        return None
    return view.destination - &data[0]
"""

SETUP = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
package, include = sys.argv.pop(1), sys.argv.pop(1)
setup(name="outside", ext_modules=cythonize(
    [Extension("outside", ["outside.pyx"], include_dirs=[include])], include_path=[package]))
"""

CHECK = """
import outside
rfc1071 = bytes([0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])
assert outside.folded(rfc1071) == bytes([0xdd, 0xf2]), outside.folded(rfc1071)
packet = bytes.fromhex("4500001c0001000040110000c00002040a60000a9c40003500080000")
assert outside.destination_offset(packet) == 16
assert outside.destination_offset(packet[:19]) is None
"""


def test_inline_functions_compile_outside(installed: Path, tmp_path: Path) -> None:
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = subprocess.check_output([installed, "-c", where], text=True).strip()
    (tmp_path / "outside.pyx").write_text(textwrap.dedent(MODULE))
    (tmp_path / "setup.py").write_text(SETUP)
    subprocess.run(
        [sys.executable, "setup.py", site, f"{site}/svcdp/include", "build_ext", "--inplace"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    subprocess.run([installed, "-c", CHECK], cwd=tmp_path, check=True)

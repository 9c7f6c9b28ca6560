"""What the sdist and the wheel hold, and that the wheel needs nothing else."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROUTE_ONE_PACKET = """
import sys
import svcdp
foreign = [name for name in sys.modules if "site-packages" in (getattr(
    sys.modules[name], "__file__", None) or "") and name.partition(".")[0] != "svcdp"]
assert not foreign, foreign
assert "site-packages" in svcdp.__file__, svcdp.__file__
dp = svcdp.Dataplane(max_connections=16)
with dp.transaction() as tx:
    tx.service("10.96.0.10", 53, "udp").add("10.1.1.7", 5353)
packet = bytearray.fromhex(
    "4500001c000100004011 66c2 c0000204 0a60000a 9c40 0035 0008 0000")
result = dp.process(packet)
assert result.verdict is svcdp.Verdict.FORWARD, result
assert packet[16:20] == bytes([10, 1, 1, 7]) and packet[22:24] == (5353).to_bytes(2, "big")
"""


@pytest.fixture(scope="module")
def in_sdist(distributions: Path) -> set[str]:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def in_wheel(distributions: Path) -> set[str]:
    return set(zipfile.ZipFile(next(distributions.glob("*.whl"))).namelist())


def test_the_sdist_holds_sources_and_tests(in_sdist: set[str]) -> None:
    assert {
        "pyx/svcdp/_core/engine.pyx",
        "pyx/svcdp/_core/packet.pxd",
        "include/svcdp/abi.h",
        "src/svcdp/_core/engine.pyi",
        "src/svcdp/py.typed",
        "tests/conftest.py",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "apt-packages.txt",
        ".ci/run",
    } <= in_sdist


def test_the_sdist_holds_nothing_generated(in_sdist: set[str]) -> None:
    assert not [name for name in in_sdist if name.startswith("pyx/") and name.endswith(".c")]
    assert not [name for name in in_sdist if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_modules_types_and_declarations(in_wheel: set[str]) -> None:
    assert {
        "svcdp/py.typed",
        "svcdp/__init__.pxd",
        "svcdp/_core/engine.pyi",
        "svcdp/_core/packet.pxd",
        "svcdp/_core/checksum.pxd",
        "svcdp/include/svcdp/abi.h",
    } <= in_wheel
    compiled = {Path(name).name.partition(".")[0] for name in in_wheel if name.endswith(".so")}
    assert {"engine", "batch"} <= compiled


def test_the_wheel_holds_no_sources_to_compile(in_wheel: set[str]) -> None:
    assert not [name for name in in_wheel if name.endswith((".pyx", ".c", ".cpp"))]
    assert not [name for name in in_wheel if not name.startswith(("svcdp/", "svcdp-"))]


def test_the_wheel_works_alone(installed: Path) -> None:
    """Without other packages, a compiler or C libraries of its own."""
    subprocess.run([installed, "-I", "-c", ROUTE_ONE_PACKET], check=True, env={"PATH": ""})


def test_the_command_says_what_it_needs(installed: Path) -> None:
    done = subprocess.run([installed.parent / "svcdp"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'svcdp[node]'" in done.stderr

"""abi.h is C11 and C++17, cffi can read it, and its enums are those of `svcdp.types`."""

from __future__ import annotations

import enum
import re
import subprocess
from pathlib import Path

import cffi
import pytest

from svcdp import Reason, Verdict

INCLUDE = Path(__file__).parents[2] / "include"
HEADER = INCLUDE / "svcdp" / "abi.h"


@pytest.fixture(scope="module")
def ffi() -> cffi.FFI:
    block = re.search(r"/\* <cffi> \*/(.*)/\* </cffi> \*/", HEADER.read_text(), re.S)
    assert block
    ffi = cffi.FFI()
    ffi.cdef(block[1])
    return ffi


@pytest.mark.parametrize(
    ("compiler", "language", "standard"), [("gcc", "c", "c11"), ("g++", "c++", "c++17")]
)
def test_the_header_compiles_alone(compiler: str, language: str, standard: str) -> None:
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-std={standard}", "-fsyntax-only"]
    subprocess.run([compiler, *flags, "-x", language, "-"], input=HEADER.read_bytes(), check=True)


@pytest.mark.parametrize(("name", "twin"), [("verdict", Verdict), ("reason", Reason)])
def test_enums_are_the_same_in_python(ffi: cffi.FFI, name: str, twin: type[enum.IntEnum]) -> None:
    prefix = f"SVCDP_{name.upper()}_"
    elements = ffi.typeof(f"enum svcdp_{name}").relements
    values = {key.removeprefix(prefix): value for key, value in elements.items()}
    assert values.pop("COUNT") == len(twin)
    assert values == {member.name: member.value for member in twin}


def test_a_packet_is_32_bytes(ffi: cffi.FFI) -> None:
    assert ffi.sizeof("struct svcdp_packet") == 32

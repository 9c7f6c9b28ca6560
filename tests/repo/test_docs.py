"""The Python in the documents runs: each file from top to bottom, in one namespace.

A block after ``<!-- not run: reason -->`` is compiled only.
"""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from svcdp import schedulers

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n+)?^```(python|pycon)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    line: int
    language: str
    code: str
    runs: bool


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3))
        yield Block(line, match[2], match[3], not match[1])


@pytest.fixture
def _own_schedulers() -> Iterator[None]:
    before = dict(schedulers._registered)
    yield
    schedulers._registered.clear()
    schedulers._registered.update(before)


@pytest.mark.usefixtures("_own_schedulers")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_in_documents(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for block in blocks(path):
        if block.language == "pycon":
            test = parser.get_doctest(block.code, namespace, path.name, str(path), block.line)
            report: list[str] = []
            runner.run(test, out=report.append, clear_globs=False)
            namespace = test.globs
            assert not report, "".join(report)
        else:
            code = compile("\n" * block.line + block.code, str(path), "exec")
            if block.runs:
                exec(code, namespace)


def sessions(path: Path) -> Iterator[tuple[str, str]]:
    """Commands of a document that show their output, and that output."""
    for block in re.findall(r"^```console\n(.*?)^```$", path.read_text(), re.M | re.S):
        yield from re.findall(r"^\$ (.*)\n((?:[^$#].*\n|\n)+)", block, re.M)


@pytest.mark.parametrize(
    ("command", "output"), [session for path in DOCUMENTS for session in sessions(path)]
)
def test_commands_print_what_documents_show(command: str, output: str) -> None:
    name, *arguments = shlex.split(command)
    assert name == "svcdp", "only svcdp's own output is shown"
    done = subprocess.run(
        [sys.executable, "-m", "svcdp", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout == output

"""Type checkers accept right use of the public API and find wrong use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SAMPLES = Path(__file__).parent / "samples"
ROOT = SAMPLES.parents[2]


def expected(path: Path) -> set[tuple[int, str]]:
    marks = enumerate(path.read_text().splitlines(), 1)
    return {(n, code) for n, line in marks for code in re.findall(r"# E: ([\w-]+)", line)}


def found(*paths: Path) -> dict[str, set[tuple[int, str]]]:
    """Errors by file name."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--hide-error-context", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: dict[str, set[tuple[int, str]]] = {path.name: set() for path in paths}
    for name, line, code in re.findall(r"(\w+\.py):(\d+): error: .*\[([\w-]+)\]", done.stdout):
        errors.setdefault(name, set()).add((int(line), code))
    return errors


def test_mypy_agrees_with_the_samples() -> None:
    paths = sorted(SAMPLES.glob("*.py"))
    errors = found(*paths)
    for path in paths:
        assert errors[path.name] == expected(path), path.name

"""The command itself: errors, exit status, start-up cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from svcdp import _version
from svcdp.cli.group import run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert capsys.readouterr().out == f"svcdp {_version.__version__}\n"
    assert run(["version", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == _version.__version__


@pytest.mark.parametrize(
    ("arguments", "start", "end"),
    [
        (["verson"], "error: No such command 'verson'", "(see 'svcdp --help')\n"),
        (["version", "--no"], "error: No such option", "(see 'svcdp version --help')\n"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], start: str, end: str
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(start)
    assert captured.err.endswith(end)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ("run", "check", "get", "trace", "replay", "validate", "rules", "demo"):
        assert f"\n  {verb} " in out


def test_version_loads_nothing_heavy() -> None:
    """``svcdp version`` starts fast because it imports what it needs and no more."""
    code = (
        "import sys; from svcdp.cli.group import run; run(['version']);"
        "print(*{'asyncio', 'msgspec', 'yaml', 'pyroute2', 'watchfiles'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [""]

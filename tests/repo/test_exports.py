"""The public API: what is exported exists, is documented, and is what the reference lists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Protocol

import click
import pytest

import svcdp
from svcdp.cli.group import cli
from svcdp.node.config import settings

ROOT = Path(__file__).parents[2]


def modules() -> list[str]:
    found = pkgutil.walk_packages(svcdp.__path__, "svcdp.")
    return ["svcdp", *(m.name for m in found if not re.search(r"\._|__main__", m.name))]


def is_protocol(value: type) -> bool:
    return Protocol in value.__bases__


@pytest.mark.parametrize("name", modules())
def test_exported_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    for public in exported:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public} has no docstring"
        # Protocols have the methods of others.
        if inspect.isclass(value) and value.__module__ == name and not is_protocol(value):
            for method, function in vars(value).items():  # close() says it all
                if inspect.isfunction(function) and not re.match("_|close$", method):
                    assert inspect.getdoc(getattr(value, method)), f"{public}.{method}"


def test_the_reference_lists_the_public_names() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    section = text.partition("## `svcdp`")[2].partition("\n###")[0]
    listed = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (.*?) \|", section, re.M)))
    assert sorted(listed) == sorted(set(svcdp.__all__) - {"__version__"})


def test_the_reference_lists_the_settings() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| `(--[\w-]+)` \|", text, re.M)
    assert listed == [(setting.key, setting.flag) for setting in settings()]


def test_the_reference_lists_the_reasons() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    section = text.partition("### Verdicts and reasons")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == {r.name for r in svcdp.Reason}


def test_the_reference_lists_the_commands() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^\| `svcdp ([\w-]+)", text, re.M)
    assert sorted(listed) == sorted(cli.list_commands(click.Context(cli)))

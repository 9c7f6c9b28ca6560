"""The repository itself: what its files promise each other."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import svcdp

ROOT = Path(__file__).parents[2]


def tracked(*patterns: str) -> list[Path]:
    """Files of the tree that are not ignored."""
    listing = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "--",
            *patterns,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for line in listing.splitlines() if (path := ROOT / line).is_file()]


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == svcdp.__version__


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    for path in tracked("*.py", "*.pyi", "*.pyx", "*.pxd", "*.h", "*.md", "Makefile"):
        assert not marks.search(path.read_text()), path


def test_the_licence_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for header in tracked("include/**/*.h"):
        assert "SPDX-License-Identifier: Apache-2.0" in header.read_text(), header


def test_shipped_code_imports_nothing_under_the_gpl() -> None:
    gpl = re.compile(r"^\s*(?:from|import) (?:scapy|netfilterqueue|fnfqueue)\b", re.M)
    for path in tracked("src", "pyx"):
        if path.suffix in (".py", ".pyi", ".pyx", ".pxd"):
            assert not gpl.search(path.read_text()), path


def test_system_packages_are_sorted() -> None:
    names = (ROOT / "apt-packages.txt").read_text().splitlines()
    assert names == sorted(set(names))
    assert {"build-essential", "python3-dev", "python3-venv"} <= set(names)


@pytest.mark.parametrize("path", tracked("*.md"), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            assert fragment in map(anchor, headings), f"{path.name} links to {target}"


def test_commands_in_the_documents_are_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in tracked("*.md", ".ci/run"):
        used = re.findall(
            r"^(?:\$ )?(?:sudo )?make ([a-z]+)|`make ([a-z]+)", path.read_text(), re.M
        )
        assert {a or b for a, b in used} <= targets, path


def test_every_document_is_reachable_from_the_readme() -> None:
    linked, frontier = set(), {ROOT / "README.md"}
    while frontier:
        path = frontier.pop()
        linked.add(path)
        for target in re.findall(r"\]\(([^)#\s]+\.md)", path.read_text()):
            file = (path.parent / target).resolve()
            if file.exists() and file not in linked:
                frontier.add(file)
    assert set(tracked("docs/*.md")) <= linked


def test_make_says_that_python_is_too_old(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "apt-packages.txt", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "build", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"svcdp needs Python >= 3.11 and {old} is older" in done.stderr
    assert not (tmp_path / ".venv").exists()

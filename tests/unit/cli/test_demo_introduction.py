"""The demo's introduction is the one of the examples."""

from __future__ import annotations

from pathlib import Path

import yaml

from svcdp.cli._demo.introduction import MANIFESTS

INTRODUCTION = Path(__file__).parents[3] / "examples" / "introduction"


def test_it_is_that_of_the_examples() -> None:
    written = [yaml.safe_load(path.read_text()) for path in INTRODUCTION.glob("*.yaml")]
    assert len(written) == len(MANIFESTS)
    assert all(manifest in written for manifest in MANIFESTS)

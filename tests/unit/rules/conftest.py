"""A host that is a few files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakehost import Host

from svcdp.rules import sysctl


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path)
    monkeypatch.setattr(sysctl, "CONF", host.conf)
    monkeypatch.setattr(sysctl, "TRACKED", host.tracked)
    monkeypatch.setenv("PATH", f"{host.bin}:/bin:/usr/bin")
    return host

"""``svcdp demo``: all is well, and afterwards everything is as before; also after Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

DEMO = [sys.executable, "-m", "svcdp", "demo"]


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("*")}


def folders() -> set[Path]:
    return set(Path("/tmp").glob("svcdp-demo-*"))


def test_demo() -> None:
    before = (namespaces(), folders())
    done = subprocess.run([*DEMO, "-o", "json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert len(report["paths"]) == 16
    assert report["load"]["kept"]["lost"] == 0
    assert report["left_behind"] == []
    assert (namespaces(), folders()) == before


def test_ctrl_c() -> None:
    before = (namespaces(), folders())
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "under load" in line:
                demo.send_signal(signal.SIGINT)
                break
        out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert out == ""
    assert (namespaces(), folders()) == before

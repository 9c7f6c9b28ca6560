"""``svcdp demo``: all is well, and afterwards everything is as before; also after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

DEMO = [sys.executable, "-m", "svcdp", "demo"]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*DEMO, *arguments], env=environment, text=True, **pipes)


def left_by(demo: subprocess.Popen[str], tmp_path: Path) -> list[str]:
    """Namespaces and files that the demo made and that are still there."""
    namespaces = Path("/run/netns").glob(f"svcdp-{demo.pid}-*")
    return [str(path) for path in (*namespaces, *tmp_path.iterdir())]


def test_demo(tmp_path: Path) -> None:
    with start(tmp_path, "-o", "json") as demo:
        out, err = demo.communicate(timeout=120)
    assert demo.returncode == 0, err + out
    report = json.loads(out)
    assert report["ok"] is True
    assert len(report["paths"]) == 2 * 3 + 16
    introduced = [path for path in report["paths"] if "service-python" in path["target"]]
    assert [path["served"] for path in introduced] == [{"a": 20}] * 6
    assert report["names"][-1]["answer"] == ["remote.server.url.com."]
    assert report["environment"]["SERVICE_PYTHON_SERVICE_PORT"] == "3000"
    seen = {(m["method"], m["source"], m["address"]): m["seen"] for m in report["methods"]}
    assert len(seen) == 3 * 2 * 2
    # NAT of what comes from outside hides it; nothing else does.
    for (method, source, address), clients in seen.items():
        version = ":" in address
        own = {
            "client": ("192.0.2.10", "2001:db8:1::10"),
            "server-c": ("10.1.1.13", "fd00:10:1::13"),
        }
        node = ("192.0.2.1", "2001:db8:1::1")
        hidden = method == "NAT" and source == "client"
        assert set(clients) == {(node if hidden else own[source])[version]}
    assert all(set(m["served"]) == {"a", "b"} for m in report["methods"])
    assert report["load"]["kept"]["lost"] == 0
    assert report["left_behind"] == []
    assert left_by(demo, tmp_path) == []


def test_ctrl_c(tmp_path: Path) -> None:
    with start(tmp_path) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "under load" in line:
                assert left_by(demo, tmp_path) != []
                demo.send_signal(signal.SIGINT)
                break
        out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert out == ""
    assert left_by(demo, tmp_path) == []

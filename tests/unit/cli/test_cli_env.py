"""``svcdp env``: from a folder, and from a daemon."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from svcdp.cli.group import run
from svcdp.node.admin import AdminServer

EXAMPLES = Path(__file__).parents[3] / "examples"
FOLDER = ("-f", str(EXAMPLES / "introduction"), "--service-cidrs", "10.96.0.0/16")


def environment(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["env", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_three_forms_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(environment(capsys, *FOLDER, "--format", "json"))
    assert found["SERVICE_PYTHON_SERVICE_PORT"] == "3000"
    assert "SERVICE_PYTHON_EXTERNAL_SERVICE_HOST" not in found
    lines = environment(capsys, *FOLDER).splitlines()
    assert dict(line.split("=", 1) for line in lines) == found
    text = environment(capsys, *FOLDER, "--format", "shell")
    shell = subprocess.run(
        [shutil.which("sh") or "sh", "-ec", f"{text}\nenv"],
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split("=", 1) for line in shell.stdout.splitlines())
    assert {name: told.get(name) for name in found} == found


def test_a_pod_may_not_want_to_be_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    service = {
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 1}]},
    }
    pod = {"kind": "Pod", "metadata": {"name": "p"}, "spec": {"enableServiceLinks": False}}
    for name, each in (("s", service), ("p", pod)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"apiVersion": "v1", **each}))
    folder = ("-f", str(tmp_path))
    assert "A_SERVICE_HOST=10.0.0.1\n" in environment(capsys, *folder)
    assert environment(capsys, "p", *folder) == ""
    assert environment(capsys, "-n", "other", *folder) == ""
    assert run(["env", "q", *folder]) == 1
    assert "Pod default/q: not in" in capsys.readouterr().err


def test_a_name_that_no_shell_knows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Services may begin with a digit (KEP-5311)."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "1st"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 1}]},
    }
    (tmp_path / "s.json").write_text(json.dumps(service))
    assert run(["env", "-f", str(tmp_path), "--format", "shell"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'1ST_SERVICE_HOST' is left out" in captured.err


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """An admin socket that knows one variable of each namespace, and two Pods."""

    def told(request: Mapping[str, Any]) -> list[dict[str, str]]:
        return [{"name": "NS", "value": request["namespace"]}] if request["serviceLinks"] else []

    def pods(request: Mapping[str, Any]) -> list[dict[str, Any]]:
        assert request["namespace"] == "shop"
        return [
            {"name": "web-0", "enableServiceLinks": True},
            {"name": "quiet", "enableServiceLinks": False},
        ]

    path = str(tmp_path / "admin.sock")
    loop = asyncio.new_event_loop()
    server = AdminServer(path, {"environment": told, "pods": pods})
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield path
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_of_a_daemon(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    there = ("-n", "shop", "--admin-socket", daemon)
    assert environment(capsys, *there) == "NS=shop\n"
    assert environment(capsys, "web-0", *there) == "NS=shop\n"
    assert environment(capsys, "quiet", *there) == ""
    assert run(["env", "nobody", *there]) == 1
    assert "Pod shop/nobody: the daemon knows Pods of manifests only" in capsys.readouterr().err

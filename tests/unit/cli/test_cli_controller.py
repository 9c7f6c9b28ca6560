"""`svcdp controller`: what keeps it from starting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from svcdp.cli.group import run


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    """Of a server that is nowhere."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind-address", "nowhere"], "is not an address and port"),
        (["--lease-duration", "0"], "not in the range"),
        (["--kubeconfig", "/nowhere"], "/nowhere: cannot be used to reach a cluster"),
        ([], "the Pod's service account: cannot be used to reach a cluster"),
        (["--kubeconfig", "in-cluster"], "the Pod's service account"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["controller", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], kubeconfig: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run(["controller", "--kubeconfig", kubeconfig, "--bind-address", place]) == 2
    assert "cannot listen at 127.0.0.1 port" in capsys.readouterr().err

"""What `svcdp check` finds of a host."""

from __future__ import annotations

import socket

from probing import free_port

from svcdp.node.checks import _ports
from svcdp.node.config import NodeConfig
from svcdp.node.values import Bind


def test_ports_that_kube_proxy_has() -> None:
    free = Bind(f"[::1]:{free_port('::1')}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Bind(f"127.0.0.1:{other.getsockname()[1]}")
        config = NodeConfig(healthz_bind_address=taken, metrics_bind_address=free)
        first, second = _ports(config)
    assert first.status == "warn"
    assert first.detail.startswith(f"{taken}: ")
    assert "stop kube-proxy" in first.fix
    assert (second.status, second.detail) == ("ok", f"{free} is free")
    nowhere = NodeConfig(healthz_bind_address=Bind(""), metrics_bind_address=Bind(""))
    assert list(_ports(nowhere)) == []

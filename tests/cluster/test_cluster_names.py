"""`svcdp dns` beside a real API server: every Service has its name, whoever serves its packets."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Any

import dns.message
import dns.query
from controlplane import ControlPlane

from svcdp.kube.model import HEADLESS_LABEL, PROXY_NAME_LABEL

DEADLINE = 20.0


def service(name: str, *, labels: dict[str, str], **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def endpoint_slice(name: str, address: str, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-1",
            "labels": {"kubernetes.io/service-name": name, **labels},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "hostname": f"{name}-0"}],
        "ports": [{"name": "http", "port": 8080}],
    }


def test_names_of_headless_foreign_and_external_services(plane: ControlPlane) -> None:
    ports = [{"name": "http", "port": 80}]
    hidden = {HEADLESS_LABEL: ""}
    foreign = {PROXY_NAME_LABEL: "other"}
    plane.apply(
        # What the EndpointSlice controller makes of a headless Service has the label.
        service("db", labels=hidden, clusterIP="None", ports=ports),
        endpoint_slice("db", "10.1.0.7", **hidden),
        service("mesh", labels=foreign, clusterIP="10.96.0.81", ports=ports),
        service("remote", labels={}, type="ExternalName", externalName="www.example.com"),
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "svcdp", "dns", "--kubeconfig", str(plane.kubeconfig())]
    command += ["--listen", f"127.0.0.1:{port}", "--min-sync-period", "0.02"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def ask(name: str, kind: str) -> list[str]:
        query = dns.message.make_query(f"{name}.default.svc.cluster.local.", kind)
        found = dns.query.udp(query, "127.0.0.1", port=port, timeout=DEADLINE)
        return [record.to_text() for rrset in found.answer for record in rrset]

    try:
        assert process.stderr is not None
        while "message=serving" not in (line := process.stderr.readline()):
            assert line, "it ended"
        assert ask("db", "A") == ["10.1.0.7"]
        assert ask("db-0.db", "A") == ["10.1.0.7"]
        assert ask("mesh", "A") == ["10.96.0.81"]
        assert ask("_http._tcp.mesh", "SRV") == ["0 1 80 mesh.default.svc.cluster.local."]
        assert ask("remote", "CNAME") == ["www.example.com."]
        plane.kubectl("delete", "service", "mesh")
        end = time.monotonic() + DEADLINE
        while ask("mesh", "A"):
            assert time.monotonic() < end
    finally:
        process.terminate()
        process.communicate()

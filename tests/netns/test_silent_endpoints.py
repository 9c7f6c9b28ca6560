"""Endpoints that do not answer, and clients that need not notice."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from traffic import (
    CLUSTER_IPS,
    PORT,
    PORTS,
    Start,
    ask,
    endpoint_slice,
    meets,
    write_objects,
)

from svcdp.lab import Topology

pytestmark = pytest.mark.netns

SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "annotations": {"svcdp.io/passive-health": "failures=1"}},
    "spec": {
        "clusterIP": CLUSTER_IPS[0],
        "ports": [{"name": "http", "port": PORT}],
    },
}


@pytest.mark.parametrize("answer", ["tcp-reset", "icmp-port-unreachable"])
def test_an_endpoint_that_refuses_is_passed_over(
    cluster: Topology, folder: Path, start: Start, answer: str
) -> None:
    """The client that meets it hears so; the next ones do not meet it."""
    a, b, c = cluster.servers
    command = ["iptables", "-A", "INPUT", "-p", "tcp", "--dport", str(PORTS[0])]
    c.namespace.run([*command, "-j", "REJECT", "--reject-with", answer])
    ports = [{"name": "http", "port": PORTS[0]}]
    endpoints = [{"addresses": [each.ipv4]} for each in (a, b, c)]
    slices = endpoint_slice("web", "IPv4", ports, endpoints)
    write_objects(folder / "manifests", SERVICE, slices)
    with start() as daemon:
        met = [meets(cluster.client, (CLUSTER_IPS[0], PORT)) for _ in range(9)]
        assert met.count("refused") == 1
        assert set(met) == {"a", "b", "refused"}
        (gone,) = [each for each in daemon.get("endpoints") if each["ejected"]]
        assert (gone["address"], gone["failures"]) == (c.ipv4, 1)


def test_a_silent_endpoint_is_left_and_then_passed_over(
    cluster: Topology, folder: Path, start: Start
) -> None:
    """A second SYN finds somebody else, and later clients do not even need one."""
    a, b, _ = cluster.servers
    silent = str(ipaddress.ip_address(a.ipv4) + 100)
    cluster.node.ip(f"route add {silent} via {a.ipv4}")  # who does not have it
    addresses = [a.ipv4, b.ipv4, silent]
    ports = [{"name": "http", "port": PORTS[0]}]
    endpoints = [{"addresses": [address]} for address in addresses]
    slices = endpoint_slice("web", "IPv4", ports, endpoints)
    write_objects(folder / "manifests", SERVICE, slices)
    with start() as daemon:
        served = [ask(cluster.client, (CLUSTER_IPS[0], PORT))["server"] for _ in range(9)]
        assert set(served) == {"a", "b"}
        (status,) = daemon.get("status")
        assert (status["retries"], status["ejections"]) == (1, 1)
        (gone,) = [each for each in daemon.get("endpoints") if each["ejected"]]
        assert (gone["address"], gone["failures"]) == (silent, 1)

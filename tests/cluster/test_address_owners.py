"""Load balancers' addresses on a network whose nodes know of each other by Leases alone."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane
from relay import Relay
from segment import ENDPOINT_PORT, SWITCH, TIMEOUT, Segment
from traffic import Kept

from svcdp.announce.members import LABEL
from svcdp.announce.owner import owner
from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Lab, wait_until

pytestmark = pytest.mark.netns

NODES = ("node-1", "node-2")
ADDRESSES = [f"192.0.2.{number}" for number in (132, 133)]


class Cluster:
    """Nodes on a segment, each with a way of its own to the API server."""

    def __init__(
        self, plane: ControlPlane, segment: Segment, relays: Sequence[Relay], folder: Path
    ) -> None:
        self.plane = plane
        self.segment = segment
        self.relays = relays
        self.folder = folder

    def daemon(self, number: int, *more: str) -> contextlib.AbstractContextManager[RunningDaemon]:
        url = f"https://127.0.0.1:{self.relays[number].port}"
        file = self.folder / f"kubeconfig-{number}"
        file.write_bytes(self.plane.kubeconfig(url=url).read_bytes())
        return self.segment.daemon(number, self.folder, "--kubeconfig", str(file), *more)

    def serve(self, **spec: Any) -> None:
        """Services of all `ADDRESSES`, which somebody gave them."""
        objects = self.segment.objects(len(ADDRESSES), families=["IPv4"])
        for each in objects:
            if each["kind"] == "Service":
                each["metadata"]["annotations"] = spec.get("annotations", {})
                each["spec"]["ports"][0]["port"] = spec.get("port", 80)
        self.plane.apply(*objects)
        for number, address in enumerate(ADDRESSES):
            status = {"status": {"loadBalancer": {"ingress": [{"ip": address}]}}}
            arguments = ["--subresource=status", "--type=merge", "-p", json.dumps(status)]
            self.plane.kubectl("patch", "service", f"web-{number}", *arguments)

    def known_at(self) -> list[str]:
        """Where the client finds each address, asked anew."""
        self.segment.forget()
        for address in ADDRESSES:
            self.segment.met(address)
        return [self.segment.known_at(address) for address in ADDRESSES]

    def until_known_at(self, *nodes: str) -> None:
        expected = [owner(address, nodes) or "" for address in ADDRESSES]
        wait_until(lambda: self.known_at() == expected, TIMEOUT, f"they are at {nodes}")

    def members(self) -> dict[str, str]:
        """Who holds each Lease."""
        items = self.plane.get("/apis/coordination.k8s.io/v1/namespaces/svcdp/leases")["items"]
        return {
            each["metadata"]["name"]: each["spec"]["holderIdentity"]
            for each in items
            if each["metadata"]["labels"] == {LABEL: "true"}
        }


@pytest.fixture
def cluster(plane: ControlPlane, tmp_path: Path) -> Iterator[Cluster]:
    plane.kubectl("create", "namespace", "svcdp")
    with ExitStack() as stack:
        segment = Segment(stack.enter_context(Lab()))
        relays = [
            stack.enter_context(
                Relay(plane.port, node.call(socket.create_server, ("127.0.0.1", 0)))
            )
            for node in segment.nodes
        ]
        yield Cluster(plane, segment, relays, tmp_path)


def test_one_dies_one_stops_and_both_come_back(cluster: Cluster) -> None:
    cluster.serve()
    assert len({owner(address, NODES) for address in ADDRESSES}) == 2
    with cluster.daemon(1) as second:
        with cluster.daemon(0) as first:
            cluster.until_known_at(*NODES)
            assert cluster.members() == {f"svcdp-node-{name}": name for name in NODES}
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            # What a neighbour knows already changes without its asking.
            for address in ADDRESSES:
                if owner(address, NODES) == "node-1":
                    cluster.segment.client.ip(
                        f"neigh replace {address} dev {SWITCH} nud reachable"
                        f" lladdr {cluster.segment.mac(cluster.segment.nodes[0])}"
                    )
            wait_until(
                lambda: {cluster.segment.known_at(address) for address in ADDRESSES} == {"node-2"},
                TIMEOUT,
                "the client hears of the other",
            )
            for address in ADDRESSES:
                cluster.segment.until_served(address)
        with cluster.daemon(0) as first:
            cluster.until_known_at(*NODES)
            assert second.stop() == 0
            assert cluster.members()["svcdp-node-node-2"] == ""
            cluster.until_known_at("node-1")
        events = cluster.plane.kubectl("describe", "service", "web-0")
        assert f"{ADDRESSES[0]} is announced by node node-1" in events


def test_who_does_not_reach_the_server_has_none(cluster: Cluster) -> None:
    cluster.serve()
    with cluster.daemon(0), cluster.daemon(1):
        cluster.until_known_at(*NODES)
        cluster.relays[0].pause()
        cluster.until_known_at("node-2")
        cluster.relays[1].pause()
        cluster.until_known_at()
        for relay in cluster.relays:
            relay.resume()
        cluster.until_known_at(*NODES)
        cluster.plane.restart(crash=True)
        cluster.until_known_at(*NODES)


def test_who_is_not_reached_has_none(cluster: Cluster) -> None:
    """It still reaches the API server, by another way than clients."""
    cluster.serve()
    with cluster.daemon(0), cluster.daemon(1):
        cluster.until_known_at(*NODES)
        for state, nodes in (("down", ["node-2"]), ("up", NODES)):
            cluster.segment.switch.ip(f"link set dev node-1-{SWITCH} {state}")
            cluster.until_known_at(*nodes)


def test_a_node_may_be_left_out(cluster: Cluster) -> None:
    cluster.serve()
    label = "node.kubernetes.io/exclude-from-external-load-balancers"
    cluster.plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}})
    with cluster.daemon(0), cluster.daemon(1):
        cluster.until_known_at(*NODES)
        cluster.plane.kubectl("label", "node", "node-1", f"{label}=")
        cluster.until_known_at("node-2")
        cluster.plane.kubectl("label", "node", "node-1", f"{label}-")
        cluster.until_known_at(*NODES)


def test_established_connections_outlive_the_owner(cluster: Cluster) -> None:
    """By DR, and with the nodes telling each other of connections."""
    cluster.serve(annotations={"svcdp.io/forwarding": "dr"}, port=ENDPOINT_PORT)
    cluster.segment.direct(*ADDRESSES)
    told = ("--sync-role=both", f"--sync-interface={SWITCH}", "--sync-threshold=1")
    with (
        cluster.daemon(0, *told) as first,
        cluster.daemon(1, *told) as second,
        ExitStack() as stack,
    ):
        cluster.until_known_at(*NODES)
        mine = [address for address in ADDRESSES if owner(address, NODES) == "node-1"]
        connections = [
            stack.enter_context(Kept(cluster.segment.client, (address, ENDPOINT_PORT)))
            for address in mine
            for _ in range(8)
        ]
        served = [each.ask()["server"] for each in connections]
        assert set(served) == {"p1", "p2"}
        wait_until(
            lambda: len(second.get("connections")) >= len(connections), TIMEOUT, "the other hears"
        )
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        for address in mine:
            wait_until(
                lambda address=address: cluster.segment.known_at(address) == "node-2",  # type: ignore[misc]
                TIMEOUT,
                "the client hears of the other",
            )
        assert [each.ask()["server"] for each in connections] == served

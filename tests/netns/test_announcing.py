"""Addresses of load balancers on a local network: kernels find them by ARP and NDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from segment import SWITCH, TIMEOUT, Segment, balanced

from svcdp.announce.bgp import render
from svcdp.announce.owner import owner
from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Lab, wait_until

pytestmark = pytest.mark.netns

NODES = ("node-1", "node-2")
BOTH = f"--announce-nodes={','.join(NODES)}"


@pytest.fixture
def segment(lab: Lab) -> Segment:
    return Segment(lab)


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    return folder


@contextmanager
def serving(
    segment: Segment, manifests: Path, *settings: str, nodes: tuple[int, ...] = (0, 1)
) -> Iterator[list[RunningDaemon]]:
    """A daemon on each of the nodes, on the same manifests."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(segment.daemon(number, manifests.parent, *settings))
            for number in nodes
        ]


def test_each_address_is_found_at_its_owner(segment: Segment, manifests: Path) -> None:
    segment.write(manifests, count=6)
    with serving(segment, manifests, BOTH) as daemons:
        addresses = balanced(daemons[0])
        assert addresses == balanced(daemons[1])
        owners = {address: owner(address, NODES) for address in addresses}
        assert set(owners.values()) == set(NODES)  # else one node could do all
        assert {":" in address for address in addresses} == {True, False}
        segment.forget()
        for address in addresses:
            segment.until_served(address)
            assert segment.known_at(address) == owners[address]
        [(described)] = daemons[0].get("description", namespace="default", name="web-0")
        assert described["announcedBy"] == {each: owners[each] for each in addresses[:2]}
        # What only came here by another node's MAC address is served, too.
        for address in addresses[:2]:
            other = next(node for node in segment.nodes if node.name != owners[address])
            segment.client.ip(
                f"neigh replace {address} lladdr {segment.mac(other)} dev {SWITCH} nud permanent"
            )
            segment.until_served(address)


def test_neighbours_learn_of_a_move_without_asking(segment: Segment, manifests: Path) -> None:
    """By externalTrafficPolicy Local an address is where the endpoints are. A neighbour that knows
    it elsewhere, and would not ask for long, hears that it moved.
    """
    segment.write(manifests, policy="Local", servers=[0])
    with serving(segment, manifests, BOTH) as daemons:
        addresses = balanced(daemons[0])
        for here, there, server in (("node-1", "node-2", 1), ("node-2", "node-1", 0)):
            for address in addresses:
                segment.until_served(address)
                assert segment.known_at(address) == here
                mac = segment.neighbour(address)
                segment.client.ip(
                    f"neigh replace {address} lladdr {mac} dev {SWITCH} nud reachable"
                )
            segment.write(manifests, policy="Local", servers=[server])
            wait_until(
                lambda there=there: {segment.known_at(each) for each in addresses} == {there},  # type: ignore[misc]
                TIMEOUT,
                f"the client hears of {there}",
            )


def test_without_endpoints_nobody_has_a_local_address(segment: Segment, manifests: Path) -> None:
    segment.write(manifests, policy="Local", servers=[])
    with serving(segment, manifests, BOTH) as daemons:
        for address in balanced(daemons[0]):
            assert segment.is_nowhere(address)


def test_one_node_alone_has_all_until_it_stops(segment: Segment, manifests: Path) -> None:
    segment.write(manifests, count=2)
    with serving(segment, manifests, nodes=(0,)) as (daemon,):
        addresses = balanced(daemon)
        for address in addresses:
            segment.until_served(address)
        assert daemon.stop() == 0
    segment.forget()
    for address in addresses:
        assert segment.is_nowhere(address)


def test_another_host_cannot_take_an_address(segment: Segment, manifests: Path) -> None:
    """The kernel of a host that is given an address of ours finds it a duplicate (RFC 4862)."""
    segment.write(manifests)
    with serving(segment, manifests, nodes=(0,)) as (daemon,):
        [address] = [each for each in balanced(daemon) if ":" in each]
        segment.until_served(address)
        segment.client.sysctl(f"net.ipv6.conf.{SWITCH}.accept_dad", 1)
        segment.client.sysctl("net.ipv6.conf.all.accept_dad", 1)
        segment.client.ip(f"address add {address}/128 dev {SWITCH}")
        wait_until(
            lambda: "dadfailed" in segment.client.run(["ip", "address"]).stdout,
            TIMEOUT,
            "the address is a duplicate",
        )


def test_interfaces_are_chosen_by_name(segment: Segment, manifests: Path) -> None:
    """One that comes later counts, too; without one nothing is announced."""
    segment.write(manifests)
    node = segment.nodes[0]
    with serving(segment, manifests, "--announce-interfaces=lan*", nodes=(0,)) as (daemon,):
        [address, _] = balanced(daemon)
        assert segment.is_nowhere(address)
        segment.plug(node, "lan0")
        segment.forget()
        segment.until_served(address)
        assert segment.neighbour(address) == segment.mac(node, "lan0")


def test_neighbours_are_told_of_a_new_mac_address(segment: Segment, manifests: Path) -> None:
    segment.write(manifests)
    node = segment.nodes[0]
    with serving(segment, manifests, nodes=(0,)) as (daemon,):
        [address, _] = balanced(daemon)
        segment.until_served(address)
        for mac in ("02:00:00:00:00:11", "02:00:00:00:00:12"):
            node.ip(f"link set dev {SWITCH} address {mac}")
            segment.client.ip(
                f"neigh replace {address} lladdr {segment.neighbour(address)} dev {SWITCH}"
                " nud reachable"
            )
            wait_until(lambda mac=mac: segment.neighbour(address) == mac, TIMEOUT, "it hears")  # type: ignore[misc]
            segment.until_served(address)


def test_a_node_that_is_not_reached_has_no_address(segment: Segment, manifests: Path) -> None:
    """Its cable is pulled, and plugged in again."""
    segment.write(manifests)
    with serving(segment, manifests, nodes=(0,)) as (daemon,):
        [address, _] = balanced(daemon)
        segment.until_served(address)
        segment.switch.ip(f"link set dev node-1-{SWITCH} down")
        wait_until(lambda: announced(daemon) == set(), TIMEOUT, "it has none")
        segment.switch.ip(f"link set dev node-1-{SWITCH} up")
        wait_until(lambda: announced(daemon) == {"node-1"}, TIMEOUT, "it has them again")
        segment.forget()
        segment.until_served(address)


def announced(daemon: RunningDaemon) -> set[str]:
    """Who has the addresses of web-0, as a node knows it."""
    [described] = daemon.get("description", namespace="default", name="web-0")
    return set(described["announcedBy"].values())


def test_a_speaker_is_told_while_the_node_serves(segment: Segment, manifests: Path) -> None:
    segment.write(manifests)
    file, read = manifests.parent / "bird.conf", manifests.parent / "read"
    settings = ("--bgp-file", str(file), "--bgp-reload", f"cp,{file},{read}")
    with serving(segment, manifests, *settings, nodes=(0,)) as (daemon,):
        expected = render("bird", balanced(daemon))
        wait_until(lambda: read.exists() and read.read_text() == expected, TIMEOUT, "it reads")
        assert daemon.stop() == 0
    assert read.read_text() == render("bird", [])

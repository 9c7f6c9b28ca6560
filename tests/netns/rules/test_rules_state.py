"""What is in the kernel because of svcdp: applied, changed, taken back, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from capture import CLIENT, PLAIN, TIMEOUT, send_raw, set_rp_filter, udp_packet

from svcdp import Dataplane, RulesError
from svcdp.cli._demo.stage import traces
from svcdp.lab import Lab, Namespace, Topology, wait_until
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.rules import Backend, CapturePlan
from svcdp.rules.plan import Element

pytestmark = pytest.mark.netns

FOREIGN = """\
*raw
:THEIRS - [0:0]
-A PREROUTING -s 198.51.100.1 -j THEIRS
-A OUTPUT -d 198.51.100.1 -j RETURN
COMMIT
*filter
-A FORWARD -s 198.51.100.1 -j DROP
-A INPUT -s 198.51.100.1 -j DROP
COMMIT
"""

#: How others flush the rules of a backend.
FLUSHES = {
    "iptables": ("iptables -t raw -F", "ip6tables -t raw -F OUTPUT", "iptables -F"),
    "nft": ("nft flush ruleset",),
}


@pytest.fixture
def cluster(lab: Lab) -> Topology:
    """Without servers: nobody answers here."""
    return Topology.build(lab)


@pytest.fixture
def busy_node(cluster: Topology) -> Namespace:
    """A node on which others have rules, sets and routes."""
    cluster.node.run(["iptables-restore"], input=FOREIGN)
    cluster.node.run(["ipset", "create", "THEIRS", "hash:ip,port"])
    cluster.node.ip("route add blackhole 198.51.100.0/24")
    set_rp_filter(cluster.node, 1)
    return cluster.node


def in_order(shown: str) -> list[str]:
    """Without what is random in it: the order of elements and the seed of their hash."""
    return sorted(re.sub(r"initval \S+", "", shown).replace(",", " ").split())


def test_apply_and_remove_leave_the_rest_alone(
    busy_node: Namespace, new_backend: Callable[[], Backend], plan: CapturePlan
) -> None:
    before = traces(busy_node)
    backend = new_backend()
    assert backend.show() == ""
    backend.remove()  # nothing is there, and that is fine
    assert traces(busy_node) == before
    backend.apply(plan)
    applied, shown = traces(busy_node), backend.show()
    assert {trace for trace in before - applied if "=" not in trace} == set()  # but for sysctls
    backend.apply(plan)
    assert traces(busy_node) == applied
    other = new_backend()  # after a crash
    assert in_order(other.show()) == in_order(shown)
    other.apply(replace(plan, queues=(7, 9), service_cidrs=(), items=frozenset()))
    assert re.search(r"\b7[:-]9\b", other.show())
    assert not re.search(r"\b100[:-]101\b", other.show())
    assert PLAIN[0] not in other.show()
    other.apply(plan)
    assert in_order(other.show()) == in_order(shown)
    other.remove()
    assert traces(busy_node) == before
    assert other.show() == ""


def test_a_killed_process(busy_node: Namespace, backend: Backend, tmp_path: Path) -> None:
    """What it left is taken back by the next one, sysctls included."""
    before = traces(busy_node)
    program = (
        "import os; from svcdp.rules import CapturePlan, choose\n"
        "from svcdp.rules.plan import Element, Hop, Mark\n"
        f"backend = choose({backend.name!r}, run_dir={str(tmp_path / 'run')!r})\n"
        "items = {Element('virtual', '10.96.0.1', 'tcp', 443), Element('real', '10.96.0.1')}\n"
        "items |= {Hop(0x400000, '10.1.1.11'), Hop(0x400000, 'fd00:10:1::11'), Mark(7, 4)}\n"
        "backend.apply(CapturePlan(items=frozenset(items)))\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    for _ in range(2):  # the second one finds what the first one left
        killed = busy_node.run([sys.executable, "-c", program], check=False, timeout=60)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert traces(busy_node) != before
    backend.remove()
    assert traces(busy_node) == before


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("broken", ["ip", "ipset", "iptables-restore", "ip6tables-restore", "nft"])
def test_a_failing_tool(
    busy_node: Namespace,
    backend: Backend,
    plan: CapturePlan,
    broken: str,
    applied: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names it and what it said; what it could not undo, remove() undoes later."""
    uses = {"iptables": {"ip", "ipset", "iptables-restore", "ip6tables-restore"}}
    if broken not in uses.get(backend.name, {"ip", "nft"}):
        return
    before = traces(busy_node)
    if applied:
        backend.apply(plan)
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / broken
    tool.write_text("#!/bin/sh\necho 'no room' >&2\nexit 3\n")
    tool.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(RulesError) as caught:
            backend.apply(replace(plan, queues=(1, 2)))
    assert caught.value.argv[0] == broken
    assert caught.value.stderr == "no room"
    if not applied:
        assert traces(busy_node) - before <= sets_left(busy_node)
    backend.remove()
    assert traces(busy_node) == before


def sets_left(node: Namespace) -> set[str]:
    """Sets that cannot be destroyed because the tool that does it is broken: they do nothing."""
    names = node.run(["ipset", "list", "-name"]).stdout.split()
    return {f"ipset list: {name}" for name in names}


def test_a_bad_element_changes_nothing(
    busy_node: Namespace, backend: Backend, plan: CapturePlan
) -> None:
    backend.apply(plan)
    shown = backend.show()
    bad = [Element("virtual", address, "tcp", 80) for address in ("10.96.7.7", "no address")]
    gone = [Element("virtual", PLAIN[0], "tcp", 80)]
    with pytest.raises(RulesError):
        backend.update(plan, bad, gone)
    assert in_order(backend.show()) == in_order(shown)


def test_thousands_of_elements(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    def elements(start: int, stop: int) -> frozenset[Element]:
        protocols = ("tcp", "udp", "sctp")
        addresses = {
            n: f"10.97.{n >> 8}.{n & 255}" if n % 2 else f"fd00:10:97::{n:x}"
            for n in range(start, stop)
        }
        return frozenset(Element("real", a, protocols[n % 3], 80) for n, a in addresses.items())

    def held() -> set[str]:
        return set(re.findall(r"(?:10\.97\.|fd00:10:97::)[0-9a-f.]+", backend.show()))

    def addresses(elements: frozenset[Element]) -> set[str]:
        return {element.address for element in elements}

    first, second = elements(1, 20000), elements(20000, 24000)
    backend.apply(replace(plan, items=first))
    assert held() == addresses(first)
    backend.update(plan, second, elements(1, 4000))
    assert held() == addresses(elements(4000, 24000))
    backend.apply(replace(plan, items=second))
    assert held() == addresses(second)


def test_render_is_what_apply_does(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    """The text changes nothing, and the tools take it as it is."""
    before = traces(cluster.node)
    text = backend.render(plan)
    assert text == backend.render(plan)
    assert traces(cluster.node) == before
    for element in plan.elements:
        assert re.search(rf"\b{element.address}\b.*\b{element.port}\b", text)


def test_sctp_ports_match(cluster: Topology, backend: Backend, plan: CapturePlan) -> None:
    """A port of SCTP is matched as such, and another one is not."""
    elements = frozenset({Element("virtual", PLAIN[0], "sctp", 7)})
    backend.apply(replace(plan, items=elements, bypass=False))
    node = cluster.node
    node.run(["iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "sctp"])

    def packet(port: int) -> bytes:
        udp = bytearray(udp_packet(CLIENT, PLAIN[0], port, bytes(8)))
        udp[9] = socket.IPPROTO_SCTP  # both begin with the ports
        return bytes(udp)

    # Those to port 7 wait in a queue that nobody has: they are dropped.
    cluster.client.call(send_raw, *map(packet, (7, 7, 8)))

    def seen() -> int:
        saved = node.run(["iptables-save", "-c", "-t", "mangle"]).stdout
        found = re.search(r"\[(\d+):\d+\] -A PREROUTING -p sctp", saved)
        assert found
        return int(found[1])

    assert wait_until(seen, TIMEOUT, "the packet to port 8") == 1


def test_it_needs_root(tmp_path: Path) -> None:
    program = "from svcdp.rules import choose; choose('auto')"
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "MissingCapability" in result.stderr
    assert "root" in result.stderr


def test_rules_that_others_flush(
    cluster: Topology, dataplane: Dataplane, backend: Backend, plan: CapturePlan
) -> None:
    """As a firewall does that is loaded again."""
    assert backend.fault()
    mode = NfqueueMode(dataplane, backend, plan)
    mode.install()
    try:
        before = backend.show()
        for flush in FLUSHES[backend.name]:
            assert not backend.fault()
            cluster.node.run(flush.split())
            assert backend.fault() == "somebody else removed them"
            mode.trim()
            assert in_order(backend.show()) == in_order(before)
    finally:
        backend.remove()

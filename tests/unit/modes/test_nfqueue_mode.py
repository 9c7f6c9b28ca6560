"""The NFQUEUE mode keeps capture sets a step ahead of the dataplane, and trims them behind it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping

import pytest
import wire

from svcdp.dataplane import Dataplane
from svcdp.errors import CapacityError, ConfigError, RulesError
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.rules import Backend, CapturePlan
from svcdp.rules.paths import Path
from svcdp.rules.plan import Element, Hop, Item, Mark, items_of
from svcdp.types import DestinationSpec, ServiceSpec, TunnelSpec

VIP = "10.96.0.10"
ONE, TWO = DestinationSpec("10.1.0.1", 8080), DestinationSpec("10.1.0.2", 8080)
WEB = ServiceSpec(VIP, 80, destinations=(ONE,))
WEB_TWO = ServiceSpec(VIP, 80, destinations=(TWO,))
DNS = ServiceSpec("10.96.0.20", 53, "udp", destinations=(ONE, TWO))


class Kernel(Backend):
    """Plays a rules backend: holds sets, can refuse, and writes down what is asked of it."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.dataplane = dataplane
        self.calls: list[str] = []
        self.held: frozenset[Item] | None = None
        self.served: list[int] = []
        self.refuse = False
        self.routes: dict[str, Path] = {}
        self.refreshed: list[Hop] = []
        self.lost = False  # whether routes cannot be asked for
        self.dialled: dict[str, str | None] = {}  # the source by service CIDR

    def _call(self, name: str) -> None:
        if self.refuse:
            raise RulesError("no")
        self.calls.append(name)
        self.served.append(len(self.dataplane.services()))

    def apply(self, plan: CapturePlan) -> None:
        self._call("apply")
        self.held = plan.items

    def update(self, plan: CapturePlan, added: Collection[Item], removed: Collection[Item]) -> None:
        self._call("update")
        assert self.held is not None
        assert self.held.isdisjoint(added)
        assert self.held.issuperset(removed)
        assert not any(isinstance(item, Mark) for item in (*added, *removed))
        self.held = self.held.union(added).difference(removed)

    def fault(self) -> str:
        return "" if self.held is not None else "they are gone"

    def refresh(self, plan: CapturePlan) -> None:
        self.refreshed = plan.hops

    def reroute(self, plan: CapturePlan) -> None:
        self._call("reroute")
        self.dialled = {cidr: plan.source_of(cidr) for cidr in plan.service_cidrs}

    def paths(self, addresses: Iterable[str]) -> Mapping[str, Path]:
        if self.lost:
            raise RulesError("no routes")
        return {address: self.routes[address] for address in addresses if address in self.routes}

    def remove(self) -> None:
        self._call("remove")
        self.held = None

    def render(self, plan: CapturePlan) -> str:
        raise NotImplementedError

    def show(self) -> str:
        raise NotImplementedError


class Bench:
    """A mode between a real dataplane and a kernel that is played."""

    def __init__(self) -> None:
        self.dataplane = Dataplane(1000, seed=1)
        self.kernel = Kernel(self.dataplane)
        plan = CapturePlan(addresses=("192.0.2.1",), hop_marks=0xC0000000)
        self.mode = NfqueueMode(self.dataplane, self.kernel, plan)

    @property
    def wanted(self) -> frozenset[Item]:
        return items_of(self.dataplane.captures())

    @property
    def destinations(self) -> tuple[DestinationSpec, ...]:
        """Of the one service, as the dataplane has them."""
        (service,) = self.dataplane.services()
        return service.spec.destinations

    def connect(self) -> None:
        """Open a TCP connection to the web service."""
        scapy = pytest.importorskip("scapy.layers.inet")
        syn = scapy.IP(src="192.0.2.9", dst=VIP) / scapy.TCP(sport=4000, dport=80, flags="S")
        assert self.dataplane.process(bytearray(bytes(syn))).verdict.name == "FORWARD"


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_is_captured_before_install(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    assert bench.kernel.calls == []
    bench.mode.install()
    assert bench.kernel.calls == ["apply"]
    assert bench.kernel.held == bench.wanted


def test_captures_grow_before_the_dataplane_knows(bench: Bench) -> None:
    bench.mode.install()
    bench.mode.update([WEB], [])
    assert bench.kernel.calls == ["apply", "update"]
    assert bench.kernel.served == [0, 0]
    assert bench.kernel.held == bench.wanted


def test_an_update_without_new_addresses_asks_the_kernel_nothing(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.mode.update([ServiceSpec(VIP, 80, destinations=(ONE,), scheduler="wrr")], [])
    assert bench.kernel.calls == ["apply"]


def test_what_is_removed_goes_at_the_next_trim(bench: Bench) -> None:
    bench.mode.update([WEB, DNS], [])
    bench.mode.install()
    bench.mode.update([], [WEB.key])
    assert bench.kernel.calls == ["apply"]
    bench.mode.trim()
    assert bench.kernel.held == bench.wanted
    assert Element("virtual", VIP, "tcp", 80) not in bench.kernel.held
    bench.mode.trim()
    assert bench.kernel.calls == ["apply", "update"]


def test_what_has_connections_stays_captured(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.connect()
    bench.mode.update([WEB_TWO], [])
    bench.mode.trim()
    assert bench.kernel.held == {
        Element("virtual", VIP, "tcp", 80),
        Element("real", "10.1.0.1", "tcp", 8080),
        Element("real", "10.1.0.2", "tcp", 8080),
    }
    bench.mode.update([], [WEB.key])
    bench.mode.trim()
    assert bench.kernel.held == {
        Element("virtual", VIP, "tcp", 80),
        Element("real", "10.1.0.1", "tcp", 8080),
    }


def test_a_refused_capture_changes_nothing_and_is_tried_again(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.kernel.refuse = True
    with pytest.raises(RulesError):
        bench.mode.update([DNS], [WEB.key])
    assert [status.spec.key for status in bench.dataplane.services()] == [WEB.key]
    with pytest.raises(RulesError):
        bench.mode.trim()
    bench.kernel.refuse = False
    bench.mode.update([DNS], [WEB.key])
    assert bench.kernel.calls[-1] == "apply"
    bench.mode.trim()
    assert bench.kernel.held == bench.wanted


def test_trim_mends_what_a_refused_update_left(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.kernel.refuse = True
    with pytest.raises(RulesError):
        bench.mode.update([DNS], [])
    bench.kernel.refuse = False
    bench.kernel.held = None
    bench.mode.trim()
    assert bench.kernel.held == bench.wanted


def test_trim_brings_back_what_others_removed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.mode.update([WEB], [])
    bench.mode.trim()
    assert bench.kernel.calls == [], "what was not installed is not missed"
    bench.mode.install()
    bench.kernel.held = None
    bench.kernel.refuse = True
    with pytest.raises(RulesError):
        bench.mode.trim()
    bench.kernel.refuse = False
    bench.mode.trim()
    bench.mode.trim()
    assert bench.kernel.calls == ["apply"] * 2
    assert bench.kernel.held == bench.wanted
    assert {(record.message, record.__dict__["reason"]) for record in caplog.records} == {
        ("installing the capture rules again", "they are gone")
    }


def test_routes_follow_the_addresses_of_the_node(bench: Bench) -> None:
    four, six = "10.96.0.0/16", "fd00:10:96::/112"
    plan = CapturePlan(service_cidrs=(four, six), addresses=("192.0.2.1", "2001:db8::1"))
    mode = NfqueueMode(bench.dataplane, bench.kernel, plan)
    mode.renumber(["192.0.2.1", "2001:db8::1"])
    mode.trim()
    assert bench.kernel.calls == [], "nothing is installed"
    mode.install()
    bench.kernel.refuse = True
    with pytest.raises(RulesError):
        mode.trim()
    bench.kernel.refuse = False
    mode.trim()
    mode.trim()
    assert bench.kernel.calls == ["apply", "reroute"]
    assert bench.kernel.dialled == {four: "192.0.2.1", six: "2001:db8::1"}
    mode.renumber(["192.0.2.2"])
    mode.trim()
    assert bench.kernel.dialled == {four: "192.0.2.2"}, "what has no source costs nobody else"
    mode.renumber(["192.0.2.2", "2001:db8::2"])
    mode.trim()
    assert bench.kernel.dialled == {four: "192.0.2.2", six: "2001:db8::2"}


def test_tunnels_without_a_route_follow_the_addresses_of_the_node(bench: Bench) -> None:
    bench.mode.renumber(["192.0.2.3"])
    bench.mode.update([by("tunnel", "10.1.0.1", tunnel=TunnelSpec())], [])
    assert bench.destinations[0].tunnel == TunnelSpec(source="192.0.2.3")


def test_trim_goes_on_where_routes_cannot_be_asked_for(bench: Bench) -> None:
    bench.kernel.routes = {"10.1.0.1": Path("eth0", "", "192.0.2.1", 1500)}
    bench.mode.update([by("dr", "10.1.0.1"), DNS], [])
    bench.mode.install()
    bench.mode.update([], [DNS.key])
    bench.kernel.lost = True
    with pytest.raises(RulesError, match="no routes"):
        bench.mode.trim()
    assert bench.kernel.held == bench.wanted


def test_a_refused_spec_leaves_the_services_as_they_were(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    with pytest.raises(ConfigError):
        bench.mode.update([ServiceSpec("10.96.0.30", 80, scheduler="nonsense")], [])
    bench.mode.trim()
    assert bench.kernel.held == bench.wanted


def test_close_leaves_alone_what_it_did_not_install(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.close()
    assert bench.kernel.calls == []


def test_close_removes_the_rules_and_keeps_serving(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.mode.close()
    assert bench.kernel.calls == ["apply", "remove"]
    bench.mode.update([DNS], [])
    bench.mode.trim()
    assert bench.kernel.calls == ["apply", "remove"]
    bench.connect()


def by(method: str, *addresses: str, tunnel: TunnelSpec | None = None) -> ServiceSpec:
    """The web service with these destinations."""
    servers = [DestinationSpec(a, 80, method=method, tunnel=tunnel) for a in addresses]
    return ServiceSpec(VIP, 80, destinations=tuple(servers))


def test_destinations_by_dr_have_a_mark_and_a_route(bench: Bench) -> None:
    bench.mode.install()
    bench.mode.update([by("dr", "10.1.0.1", "10.1.0.2")], [])
    marks = {each.address: each.mark for each in bench.destinations}
    assert set(marks.values()) == {0x40000000, 0x80000000}
    hops = {Hop(mark, address) for address, mark in marks.items()}
    assert bench.kernel.held is not None
    assert hops < bench.kernel.held
    bench.mode.trim()
    assert set(bench.kernel.refreshed) == hops


def test_a_mark_is_free_when_nobody_uses_it(bench: Bench) -> None:
    bench.mode.install()
    bench.mode.update([by("dr", "10.1.0.1", "10.1.0.2", "10.1.0.3")], [])
    with pytest.raises(CapacityError, match=r"10\.1\.0\.4: 3 destinations .* dr_marks"):
        bench.mode.update([by("dr", "10.1.0.1", "10.1.0.4")], [])
    assert len(bench.destinations) == 3
    bench.mode.update([by("dr", "10.1.0.1", "10.1.0.2")], [])
    bench.mode.trim()
    bench.mode.update([by("dr", "10.1.0.1", "10.1.0.4")], [])
    first, second = bench.destinations
    assert (first.mark, second.mark) == (0x40000000, 0xC0000000)


def test_marks_of_both_families_are_apart(bench: Bench) -> None:
    bench.mode.update([by("dr", "10.1.0.1")], [])
    six = DestinationSpec("fd00::1", 80, method="dr")
    bench.mode.update([ServiceSpec("fd00:96::1", 80, destinations=(six,))], [])
    services = bench.dataplane.services()
    assert {service.spec.destinations[0].mark for service in services} == {0x40000000}


def test_connections_keep_their_policy_route(bench: Bench) -> None:
    bench.mode.install()
    bench.mode.update([by("dr", "10.1.0.1")], [])
    bench.connect()
    bench.mode.update([by("dr", "10.1.0.2")], [])
    bench.mode.trim()
    assert bench.kernel.held is not None
    assert {i.address for i in bench.kernel.held if isinstance(i, Hop)} == {"10.1.0.1", "10.1.0.2"}


def test_a_tunnel_has_source_and_mtu_of_its_path(bench: Bench) -> None:
    bench.mode.install()
    bench.kernel.routes["10.1.0.1"] = Path("eth0", "", "192.0.2.7", 1450)
    bench.mode.update([by("tunnel", "10.1.0.1", "10.1.0.2", tunnel=TunnelSpec())], [])
    known, unknown = bench.destinations
    assert known.tunnel == TunnelSpec(source="192.0.2.7")
    assert known.mtu == 1450
    # There is no route; an address of the node is as good as any.
    assert unknown.tunnel == TunnelSpec(source="192.0.2.1")
    assert unknown.mtu == 0
    bench.kernel.routes["10.1.0.1"] = Path("eth0", "", "192.0.2.7", 1300)
    bench.mode.trim()
    assert [each.mtu for each in bench.destinations] == [1300, 0]


def test_what_a_spec_says_of_a_tunnel_counts(bench: Bench) -> None:
    bench.kernel.routes["10.1.0.1"] = Path("eth0", "", "192.0.2.7", 1450)
    given = TunnelSpec("gue", "192.0.2.9", 6080)
    server = DestinationSpec("10.1.0.1", 80, method="tunnel", tunnel=given, mtu=9000)
    bench.mode.update([ServiceSpec(VIP, 80, destinations=(server,))], [])
    assert bench.destinations == (server,)


def test_without_a_source_there_is_no_tunnel(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    server = DestinationSpec("fd00::1", 80, method="tunnel", tunnel=TunnelSpec())
    bench.mode.update([ServiceSpec(VIP, 80, destinations=(server,))], [])
    assert bench.destinations == ()
    assert [record.message for record in caplog.records] == ["no source address for a tunnel"]


@pytest.mark.parametrize("method", ["dr", "tunnel"])
def test_the_node_itself_is_local(bench: Bench, method: str) -> None:
    bench.kernel.routes["10.1.0.1"] = Path("lo", "", "10.1.0.1", 65536, is_local=True)
    bench.mode.update(
        [by(method, "10.1.0.1", tunnel=TunnelSpec() if method == "tunnel" else None)], []
    )
    assert bench.destinations == (DestinationSpec("10.1.0.1", 80, method="local"),)


def test_firewall_marks_are_applied_with_all_rules(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    marked = ServiceSpec("0.0.0.0", 7, "fwmark", destinations=(ONE,))
    bench.mode.update([marked], [])
    bench.mode.update([], [marked.key])
    bench.mode.trim()
    assert bench.kernel.calls == ["apply"] * 3
    assert bench.kernel.held == bench.wanted


def test_a_virtual_address_of_the_node_is_warned_of(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.kernel.routes[VIP] = Path("lo", "", VIP, 65536, is_local=True)
    bench.mode.update([by("tunnel", "10.1.0.1", tunnel=TunnelSpec())], [])
    assert caplog.records == []
    bench.mode.update([by("dr", "10.1.0.1")], [])
    (record,) = caplog.records
    assert record.message.startswith("dr needs a virtual address that this host does not have")
    assert record.address == VIP


@pytest.mark.parametrize("seed", range(8))
def test_what_is_captured_follows_any_changes(bench: Bench, seed: int) -> None:
    """Services that share destinations come, change and go, with connections to some."""
    chance = random.Random(seed)
    bench.mode.install()
    for step in range(60):
        address = f"10.96.0.{chance.randint(1, 4)}"
        servers = chance.sample(range(1, 6), chance.randint(0, 3))
        members = tuple(DestinationSpec(f"10.1.0.{i}", 8080) for i in servers)
        if chance.random() < 0.3:
            bench.mode.update([], [(address, 80, "tcp")])
        else:
            bench.mode.update([ServiceSpec(address, 80, destinations=members)], [])
        if chance.random() < 0.5:
            bench.dataplane.process(wire.packet("tcp", "192.0.2.9", step + 1, address, 80, "S"))
        if chance.random() < 0.2:
            bench.dataplane.sweep(1 << 62)
        held = bench.kernel.held
        assert held is not None
        assert held >= bench.wanted
        if chance.random() < 0.5:
            bench.mode.trim()
            assert bench.kernel.held == bench.wanted

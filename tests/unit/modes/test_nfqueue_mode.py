"""The NFQUEUE mode keeps capture sets a step ahead of the dataplane, and trims them behind it."""

from __future__ import annotations

import pytest

from svcdp.dataplane import Captures, Dataplane
from svcdp.errors import ConfigError, RulesError
from svcdp.modes.nfqueue import NfqueueMode
from svcdp.rules import Backend, CapturePlan
from svcdp.types import DestinationSpec, ServiceSpec

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
        self.held: Captures | None = None
        self.served: list[int] = []
        self.refuse = False

    def _call(self, name: str) -> None:
        if self.refuse:
            raise RulesError("no")
        self.calls.append(name)
        self.served.append(len(self.dataplane.services()))

    def apply(self, plan: CapturePlan) -> None:
        self._call("apply")
        self.held = Captures(plan.virtual, plan.real)

    def update(self, added: Captures, removed: Captures) -> None:
        self._call("update")
        assert self.held is not None
        assert not added.virtual & self.held.virtual
        assert not added.real & self.held.real
        assert removed.virtual <= self.held.virtual
        assert removed.real <= self.held.real
        self.held = Captures(
            (self.held.virtual | added.virtual) - removed.virtual,
            (self.held.real | added.real) - removed.real,
        )

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
        self.mode = NfqueueMode(self.dataplane, self.kernel, CapturePlan())

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
    assert bench.kernel.held == bench.dataplane.captures()


def test_captures_grow_before_the_dataplane_knows(bench: Bench) -> None:
    bench.mode.install()
    bench.mode.update([WEB], [])
    assert bench.kernel.calls == ["apply", "update"]
    assert bench.kernel.served == [0, 0]
    assert bench.kernel.held == bench.dataplane.captures()


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
    assert bench.kernel.held == bench.dataplane.captures()
    assert bench.kernel.held.virtual == {("udp", "10.96.0.20", 53)}
    bench.mode.trim()
    assert bench.kernel.calls == ["apply", "update"]


def test_what_has_connections_stays_captured(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.connect()
    bench.mode.update([WEB_TWO], [])
    bench.mode.trim()
    assert bench.kernel.held is not None
    assert bench.kernel.held.real == {("tcp", "10.1.0.1", 8080), ("tcp", "10.1.0.2", 8080)}
    bench.mode.update([], [WEB.key])
    bench.mode.trim()
    assert bench.kernel.held.virtual == {("tcp", VIP, 80)}
    assert ("tcp", "10.1.0.1", 8080) in bench.kernel.held.real


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
    assert bench.kernel.held == bench.dataplane.captures()


def test_trim_mends_what_a_refused_update_left(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    bench.kernel.refuse = True
    with pytest.raises(RulesError):
        bench.mode.update([DNS], [])
    bench.kernel.refuse = False
    bench.kernel.held = None
    bench.mode.trim()
    assert bench.kernel.held == bench.dataplane.captures()


def test_a_refused_spec_leaves_the_services_as_they_were(bench: Bench) -> None:
    bench.mode.update([WEB], [])
    bench.mode.install()
    with pytest.raises(ConfigError):
        bench.mode.update([ServiceSpec("10.96.0.30", 80, scheduler="nonsense")], [])
    bench.mode.trim()
    assert bench.kernel.held == bench.dataplane.captures()


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

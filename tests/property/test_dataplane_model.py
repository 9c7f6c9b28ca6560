"""A small dataplane against a plain model, step by step.

The model is a dict of connections and a dict of services. What it cannot know (which
destination a scheduler picks, which port masquerade takes) it learns from the first packet; all
else it must foretell: verdicts, reasons, where each packet goes, what is known and counted. The
table is small, so that it is full, slots wrap around, and chains of them are long.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import wire
from bench import SECOND, Bench
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from svcdp import DestinationSpec, Reason, ServiceSpec, SourceRule

LIMIT = 14
VIPS = {4: ("10.96.0.1", "10.96.0.2"), 6: ("fd96::1",)}
REALS = {4: ("10.1.0.1", "10.1.0.2", "10.1.0.3"), 6: ("fd01::1", "fd01::2")}
CLIENTS = {4: ("192.0.2.4", "192.0.2.5", "10.1.0.1"), 6: ("2001:db8::4",)}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
PORTS = (61000, 61003)
TIMEOUTS = {
    "UDP": 300, "SYN_RECV": 60, "ESTABLISHED": 900, "CLOSE": 10, "INIT1": 4, "INIT": 61,
    "COOKIE_WAIT": 61,
}  # fmt: skip
#: What a first packet makes; those of SCTP are INITs, all of them.
FIRST = {"tcp": "SYN_RECV", "udp": "UDP", "sctp": "INIT1"}

INDEX = st.integers(0, 30)
#: (which service, which client, its port, flags)
PACKETS = st.tuples(INDEX, INDEX, st.integers(1, 6), st.sampled_from("SSSAR"))

Endpoint = tuple[str, int]
Service = tuple[str, int, str]


@dataclass
class Known:
    """A connection as the model knows it."""

    protocol: str
    client: Endpoint
    virtual: Endpoint
    real: Endpoint
    source: Endpoint
    state: str
    deadline: int
    packets: int = 1

    @property
    def to(self) -> tuple[str, Endpoint, Endpoint]:
        return (self.protocol, self.client, self.virtual)

    @property
    def back(self) -> tuple[str, Endpoint, Endpoint]:
        return (self.protocol, self.real, self.source)

    @property
    def service(self) -> Service:
        return (*self.virtual, self.protocol)


class DataplaneMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(LIMIT, seed=5, masquerade_ports=PORTS)
        self.services: dict[Service, ServiceSpec] = {}
        self.known: dict[tuple[str, Endpoint, Endpoint], Known] = {}
        self.made = self.packets = 0

    # -- the model ------------------------------------------------------------------------------

    def is_orphan(self, known: Known) -> bool:
        spec = self.services.get(known.service)
        members = {(d.address, d.port) for d in spec.destinations} if spec else set()
        return known.protocol == "udp" and known.real not in members

    def is_live(self, known: Known) -> bool:
        return known.deadline > self.bench.now

    def find_back(self, protocol: str, source: Endpoint, target: Endpoint) -> Known | None:
        for known in self.known.values():
            if known.back == (protocol, source, target) and self.is_live(known):
                return known
        return None

    def used(self, known: Known, flags: str) -> None:
        """A packet of the client came along a connection."""
        known.packets += 1
        if known.protocol == "tcp":
            if flags == "R" and known.state != "SYN_RECV":
                known.state = "CLOSE"
            elif flags == "A" and known.state == "SYN_RECV":
                known.state = "ESTABLISHED"
        elif known.state == "INIT1":
            known.state = "INIT"
        self.touch(known)

    def touch(self, known: Known) -> None:
        known.deadline = self.bench.now + TIMEOUTS[known.state] * SECOND

    # -- changes --------------------------------------------------------------------------------

    @rule(
        family=st.sampled_from([4, 4, 6]),
        vip=st.integers(0, 1),
        port=st.sampled_from([80, 81]),
        protocol=st.sampled_from(["tcp", "udp", "sctp"]),
        weights=st.lists(st.integers(0, 2), max_size=3),
        scheduler=st.sampled_from(["rr", "wrr", "random"]),
        masquerade=st.booleans(),
    )
    def configure(
        self,
        family: int,
        vip: int,
        port: int,
        protocol: str,
        weights: list[int],
        scheduler: str,
        masquerade: bool,
    ) -> None:
        members = tuple(
            DestinationSpec(address, 8080, weight)
            for address, weight in zip(REALS[family], weights, strict=False)
        )
        spec = ServiceSpec(
            VIPS[family][vip % len(VIPS[family])],
            port,
            protocol,
            members,
            scheduler=scheduler,
            masquerade_address=NODE[family],
            rules=(SourceRule(masquerade=masquerade),),
        )
        self.bench.dp.update([spec])
        self.services[spec.key] = spec

    @precondition(lambda self: self.services)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.services)))
        self.bench.dp.update([], [key])
        del self.services[key]

    # -- time -----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0, 1, 4, 9, 10, 59, 60, 61, 299, 300, 900]))
    def wait(self, seconds: int) -> None:
        self.bench.now += seconds * SECOND

    @rule()
    def sweep(self) -> None:
        self.bench.dp.sweep()
        for known in [*self.known.values()]:
            if not self.is_live(known) or self.is_orphan(known):
                del self.known[known.to]
        assert self.bench.dp.stats().connections == len(self.known)

    # -- packets --------------------------------------------------------------------------------

    @precondition(lambda self: self.services)
    @rule(packets=st.lists(PACKETS, min_size=1, max_size=12))
    def send(self, packets: list[tuple[int, int, int, str]]) -> None:
        """Packets of clients to services that there are."""
        services = sorted(self.services)
        for service, client, port, flags in packets:
            address, number, protocol = services[service % len(services)]
            clients = CLIENTS[6 if ":" in address else 4]
            here = (clients[client % len(clients)], port)
            self.offer(protocol, here, (address, number), flags)

    @precondition(lambda self: self.known)
    @rule(packets=st.lists(st.tuples(INDEX, st.sampled_from("SAR")), min_size=1, max_size=8))
    def send_again(self, packets: list[tuple[int, str]]) -> None:
        """More packets of connections that are known."""
        for index, flags in packets:
            if self.known:
                known = [*self.known.values()][index % len(self.known)]
                self.offer(known.protocol, known.client, known.virtual, flags)

    def offer(self, protocol: str, client: Endpoint, virtual: Endpoint, flags: str) -> None:
        """Send a packet of a client, and compare what became of it."""
        self.packets += 1
        now = self.bench.now
        packet = wire.packet(protocol, *client, *virtual, flags)
        before = bytes(packet)
        known = self.known.get((protocol, client, virtual))
        reused = known is not None and protocol == "tcp" and flags == "S" and known.state == "CLOSE"
        if known is not None and (not self.is_live(known) or reused or self.is_orphan(known)):
            del self.known[known.to]
            known = None
        result = self.bench.dp.process(packet)
        if known is not None:
            self.used(known, flags)
            assert result.reason == Reason.ESTABLISHED
            self.check_forwarded(packet, known.source, known.real)
            return
        reply = self.find_back(protocol, client, virtual)
        if reply is not None:
            self.touch_reply(reply, flags)
            assert result.reason == Reason.REPLY
            self.check_forwarded(packet, reply.virtual, reply.client)
            return
        spec = self.services.get((*virtual, protocol))
        if result.reason != Reason.NEW:
            assert packet == before
        if spec is None:
            assert result.reason == Reason.NO_SERVICE
        elif protocol == "tcp" and flags != "S":
            assert result.reason == Reason.NO_CONNECTION
            assert result.verdict.name == ("DROP" if flags == "R" else "REJECT")
        elif not any(d.weight for d in spec.destinations):
            assert result.reason == Reason.NO_DESTINATION
        elif result.reason == Reason.TABLE_FULL:
            # Connections that are over but not yet swept may count until they are found; those
            # that live may not be more than the limit.
            live = [k for k in self.known.values() if self.is_live(k) and not self.is_orphan(k)]
            assert len(live) >= LIMIT
        elif result.reason == Reason.NO_PORT:
            self.check_no_port(protocol, client, spec)
        else:
            assert result.reason == Reason.NEW
            seen = wire.read(packet)
            real = (seen.destination, seen.destination_port)
            source = (seen.source, seen.source_port)
            self.check_choice(spec, client, real, source)
            new = Known(protocol, client, virtual, real, source, FIRST[protocol], 0)
            self.touch(new)
            clash = self.find_back(protocol, real, source)
            masqueraded = source != client
            ended = clash is not None and (
                self.is_orphan(clash) or (masqueraded and clash.state == "CLOSE")
            )
            assert clash is None or ended, "two connections have one reply"
            assert new.back != new.to
            for gone in [k for k in self.known.values() if k.back == new.back]:
                del self.known[gone.to]
            self.known[new.to] = new
            self.made += 1
            assert wire.is_intact(packet)
        assert now == self.bench.now

    def check_choice(
        self, spec: ServiceSpec, client: Endpoint, real: Endpoint, source: Endpoint
    ) -> None:
        assert real in {(d.address, d.port) for d in spec.destinations if d.weight}
        if spec.rules[0].masquerade or real[0] == client[0]:
            assert source[0] == spec.masquerade_address
            assert PORTS[0] <= source[1] <= PORTS[1]
        else:
            assert source == client

    def check_no_port(self, protocol: str, client: Endpoint, spec: ServiceSpec) -> None:
        """For some destination, every way to make the replies differ is taken."""

        def is_taken(real: Endpoint, source: Endpoint) -> bool:
            return any(
                k.back == (protocol, real, source) or k.to == (protocol, real, source)
                for k in self.known.values()
                if self.is_live(k)
            ) or any(
                k.back == (protocol, client, (spec.address, spec.port))
                for k in self.known.values()
                if self.is_live(k)
            )

        assert any(
            all(
                is_taken((d.address, d.port), source)
                for source in (
                    [(spec.masquerade_address or "", p) for p in range(PORTS[0], PORTS[1] + 1)]
                    if spec.rules[0].masquerade or d.address == client[0]
                    else [client]
                )
            )
            for d in spec.destinations
            if d.weight
        )

    def touch_reply(self, known: Known, flags: str) -> None:
        if known.protocol == "tcp":
            if flags == "R":
                known.state = "CLOSE"
            elif flags == "A" and known.state == "SYN_RECV":
                known.state = "ESTABLISHED"
        elif known.protocol == "sctp":
            known.state = "COOKIE_WAIT"
        self.touch(known)

    def check_forwarded(self, packet: bytes, source: Endpoint, target: Endpoint) -> None:
        seen = wire.read(packet)
        assert (seen.source, seen.source_port) == source
        assert (seen.destination, seen.destination_port) == target
        assert wire.is_intact(packet)

    @precondition(lambda self: self.known)
    @rule(packets=st.lists(st.tuples(INDEX, st.sampled_from("AAR")), min_size=1, max_size=8))
    def reply(self, packets: list[tuple[int, str]]) -> None:
        for index, flags in packets:
            if self.known:
                self.reply_to([*self.known.values()][index % len(self.known)], flags)

    def reply_to(self, known: Known, flags: str) -> None:
        self.packets += 1
        packet = wire.packet(known.protocol, *known.real, *known.source, flags)
        before = bytes(packet)
        result = self.bench.dp.process(packet)
        if result.reason == Reason.REPLY:
            assert self.is_live(known)
            self.touch_reply(known, flags)
            self.check_forwarded(packet, known.virtual, known.client)
        else:
            # Over, or taken by a sweep of the traffic since its destination went.
            assert not self.is_live(known) or self.is_orphan(known)
            assert packet == before
            del self.known[known.to]

    # -- what always holds ----------------------------------------------------------------------

    def shown(self, k: Known) -> tuple[object, ...]:
        left = k.deadline - self.bench.now
        return (k.protocol, k.client, k.virtual, k.real, k.source, k.packets, left)

    @invariant()
    def the_same_connections(self) -> None:
        here = {
            (
                c.protocol, (c.client, c.client_port), (c.virtual, c.virtual_port),
                (c.destination, c.destination_port), (c.source, c.source_port), c.packets,
                round(c.expires_in * SECOND),
            )
            for c in self.bench.dp.connections()
        }  # fmt: skip
        there = {self.shown(known) for known in self.known.values() if self.is_live(known)}
        gone = {self.shown(known) for known in self.known.values() if self.is_orphan(known)}
        assert here - there == set()
        assert there - here <= gone, "only UDP whose destination went may be forgotten early"
        for known in [*self.known.values()]:
            if self.shown(known) in there - here:
                del self.known[known.to]

    @invariant()
    def the_counters(self) -> None:
        stats = self.bench.dp.stats()
        assert sum(stats.packets.values()) == self.packets
        assert stats.connections_created == self.made
        assert stats.connections == stats.connections_created - stats.connections_expired
        assert stats.connections <= LIMIT
        counted = sum(
            destination.active + destination.inactive
            for service in self.bench.dp.services()
            for destination in service.destinations
        )
        assert counted <= stats.connections

    @invariant()
    def the_captures(self) -> None:
        captures = self.bench.dp.captures()
        live = [k for k in self.known.values() if self.is_live(k) and not self.is_orphan(k)]
        for address, port, protocol in self.services:
            assert (protocol, address, port) in captures.virtual
        for known in live:
            assert (known.protocol, *known.virtual) in captures.virtual
            assert (known.protocol, *known.real) in captures.real


TestDataplane = DataplaneMachine.TestCase
TestDataplane.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


@pytest.mark.parametrize("seed", range(8))
def test_a_long_walk(seed: int) -> None:
    """Hypothesis prefers short stories; a long one fills the table again and again."""
    draw = random.Random(seed)
    machine = DataplaneMachine()

    def packet() -> tuple[int, int, int, str]:
        numbers = (draw.randrange(30), draw.randrange(30), draw.randrange(1, 7))
        return (*numbers, draw.choice("SSSAR"))

    for _ in range(600):
        kind = draw.random()
        if kind < 0.12 or not machine.services:
            machine.configure(
                family=draw.choice([4, 4, 6]),
                vip=draw.randrange(2),
                port=draw.choice([80, 81]),
                protocol=draw.choice(["tcp", "udp", "sctp"]),
                weights=[draw.randrange(3) for _ in range(draw.randrange(4))],
                scheduler=draw.choice(["rr", "wrr", "random"]),
                masquerade=draw.random() < 0.5,
            )
        elif kind < 0.15:
            key = draw.choice(sorted(machine.services))
            machine.bench.dp.update([], [key])
            del machine.services[key]
        elif kind < 0.35:
            machine.wait(draw.choice([1, 1, 9, 10, 59, 60, 300]))
        elif kind < 0.4:
            machine.sweep()
        elif kind < 0.7:
            machine.send([packet() for _ in range(6)])
        elif kind < 0.85:
            machine.send_again([(draw.randrange(30), draw.choice("SAAR")) for _ in range(4)])
        else:
            machine.reply([(draw.randrange(30), draw.choice("AAR")) for _ in range(4)])
        machine.the_same_connections()
        machine.the_counters()
        machine.the_captures()

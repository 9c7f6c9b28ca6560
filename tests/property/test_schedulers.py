"""Every scheduler beside a model of IPVS's: the same edits and connections, and the same picks."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import ipvs_model
import pytest
import wire
from bench import SECOND, Bench
from hypothesis import example, given, settings
from hypothesis import strategies as st

import svcdp

SEED = 1
MARK = 7
TABLE_SIZE = 251
VIRTUAL = {4: "10.96.0.{}", 6: "fd96::{:x}"}
SERVER = {4: "10.1.0.{}", 6: "fd01::{:x}"}
UNSPECIFIED = {4: "0.0.0.0", 6: "::"}
#: What TCP takes from its close to the end of its record, and more.
CLOSED = 61 * SECOND

SCHEDULERS = [
    *((name, ()) for name in ipvs_model.SCHEDULERS),
    ("sh", ("sh-port",)),
    ("sh", ("sh-fallback",)),
    ("sh", ("sh-fallback", "sh-port")),
    ("mh", ("mh-port",)),
    ("mh", ("mh-fallback",)),
    ("mh", ("mh-fallback", "mh-port")),
]


def client_address(number: int, version: int) -> str:
    """Of many networks: schedulers hash it."""
    value = number * 0x9E3779B97F4A7C15
    if version == 4:
        return str(ipaddress.IPv4Address(0xC0000000 + value % (1 << 24)))
    return str(ipaddress.IPv6Address((0x20010DB8 << 96) + value % (1 << 90)))


@dataclass
class Pair:
    """A firewall-mark service of a dataplane and its model."""

    name: str
    flags: tuple[str, ...]
    version: int
    bench: Bench = field(default_factory=lambda: Bench(seed=SEED))
    opened: list[tuple[int, str, ipvs_model.Server]] = field(default_factory=list)
    closed: list[ipvs_model.Server] = field(default_factory=list)
    clients: int = 0

    def __post_init__(self) -> None:
        # The first worker of a dataplane has this state.
        self.model = ipvs_model.Service(
            self.name, self.flags, TABLE_SIZE, ipvs_model.splitmix64(SEED + 1)
        )
        with self.bench.dp.transaction() as tx:
            self.service(tx, scheduler=self.name, scheduler_flags=self.flags)

    def service(self, tx: svcdp.Transaction, **fields: Any) -> svcdp.VirtualService:
        return tx.service(
            UNSPECIFIED[self.version], MARK, "fwmark", mh_table_size=TABLE_SIZE, **fields
        )

    def change(self, steps: list[tuple[str, int, int, int, int]]) -> None:
        """One transaction. Steps that are not possible are left out, and so is all of a server
        that would come and go within it: it was never there."""
        before = {server.port for server in self.model.servers}
        names, done = set(before), []
        for verb, name, weight, upper, lower in steps:
            if (name in names) == (verb == "add"):
                continue
            done.append((verb, name, weight, upper, min(lower, upper)))
            if verb == "add":
                names.add(name)
            elif verb == "remove":
                names.remove(name)
        with self.bench.dp.transaction() as tx:
            service = self.service(tx)
            for verb, name, weight, upper, lower in done:
                endpoint = (SERVER[self.version].format(name), name)
                if verb == "remove":
                    service.remove(*endpoint)
                elif verb == "add":
                    service.add(*endpoint, weight, upper=upper, lower=lower)
                else:
                    service.update(*endpoint, weight=weight, upper=upper, lower=lower)
        for verb, name, weight, upper, lower in done:
            endpoint = (SERVER[self.version].format(name), name)
            if name not in before and name not in names:
                continue
            if verb == "remove":
                self.model.remove(*endpoint)
            elif verb == "add":
                self.model.add(*endpoint, weight, upper, lower)
            else:
                self.model.edit(*endpoint, weight, upper, lower)

    def send(self, number: int, to: str, flags: str) -> svcdp.Result:
        client = client_address(number, self.version)
        packet = wire.packet("tcp", client, 1 + number % 60000, to, 80, flags)
        return self.bench.dp.process(packet, mark=MARK)

    def connect(self, virtual: int) -> None:
        """Both pick; the connection gets established."""
        self.clients += 1
        number, to = self.clients, VIRTUAL[self.version].format(1 + virtual)
        client = ipvs_model.Client(
            client_address(number, self.version), 1 + number % 60000, to, self.bench.now / SECOND
        )
        wanted = self.model.pick(client)
        result = self.send(number, to, "S")
        if wanted is None:
            assert result.reason is svcdp.Reason.NO_DESTINATION
            return
        assert result.destination == (wanted.address, wanted.port)
        assert self.send(number, to, "A").reason is svcdp.Reason.ESTABLISHED
        wanted.active += 1
        wanted.reconsider()
        self.opened.append((number, to, wanted))

    def close(self, which: int) -> None:
        """The client closes one of the connections."""
        if self.opened:
            number, to, server = self.opened.pop(which % len(self.opened))
            self.send(number, to, "FA")
            server.active -= 1
            server.inactive += 1
            server.reconsider()
            self.closed.append(server)

    def expire(self) -> None:
        """Closed connections are forgotten."""
        self.bench.now += CLOSED
        self.bench.dp.sweep()
        for server in self.closed:
            server.inactive -= 1
            server.reconsider()
        self.closed.clear()

    def schedule(self, which: int) -> None:
        """Have another scheduler."""
        name, flags = SCHEDULERS[which % len(SCHEDULERS)]
        with self.bench.dp.transaction() as tx:
            self.service(tx, scheduler=name, scheduler_flags=flags)
        self.model.schedule(name, flags)

    def do(self, history: list[tuple[str, list[Any]]]) -> None:
        for action, arguments in history:
            if action == "change":
                self.change(arguments)
            elif action == "expire":
                self.expire()
            else:
                for argument in arguments:
                    getattr(self, action)(argument)


NAMES, UPPER = st.integers(1, 6), st.sampled_from((0, 0, 1, 3, 5))
WEIGHTS = st.one_of(st.integers(0, 6), st.sampled_from((4, 20, 30, 1000, 65535)))
STEP = st.tuples(
    st.sampled_from(("add", "add", "edit", "remove")), NAMES, WEIGHTS, UPPER, st.integers(0, 3)
)
CHANGE = st.tuples(st.just("change"), st.lists(STEP, min_size=1, max_size=4))
CONNECT = st.tuples(st.just("connect"), st.lists(st.integers(0, 2), min_size=1, max_size=8))
CLOSE = st.tuples(st.just("close"), st.lists(st.integers(0, 30), min_size=1, max_size=4))
EXPIRE = st.tuples(st.just("expire"), st.just([]))
SCHEDULE = st.tuples(st.just("schedule"), st.lists(st.integers(0, 50), min_size=1, max_size=1))
#: Fewer actions than it takes an open connection to expire.
HISTORY = st.lists(st.one_of(CHANGE, CONNECT, CONNECT, CLOSE, EXPIRE), max_size=14)
VERSION = st.sampled_from((4, 6))

FIVE = ("change", [("add", name, weight, 0, 0) for name, weight in enumerate((1, 3, 5, 2, 4), 1)])
BOUNDED = ("change", [("add", name, weight, 2, 1) for name, weight in enumerate((1, 3, 5), 1)])
UNEQUAL = ("change", [("add", 1, 1, 0, 0), ("add", 2, 20, 0, 0), ("add", 3, 1, 0, 0)])


@pytest.mark.parametrize(
    ("name", "flags"), SCHEDULERS, ids=["+".join((name, *flags)) for name, flags in SCHEDULERS]
)
@settings(max_examples=20, deadline=None, derandomize=True)
@example([FIVE, ("connect", [0] * 15), ("change", [("edit", 3, 0, 0, 0)]), ("connect", [1] * 9)], 4)
@example([BOUNDED, ("connect", [0] * 9), ("close", [0, 1, 2]), ("connect", [0] * 6)], 4)
@example([UNEQUAL, ("connect", [0, 1] * 20), ("close", [0] * 9), ("connect", [0, 1] * 9)], 6)
@given(HISTORY, VERSION)
def test_every_pick(
    name: str, flags: tuple[str, ...], history: list[tuple[str, list[Any]]], version: int
) -> None:
    Pair(name, flags, version).do(history)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.one_of(CHANGE, CONNECT, CLOSE, SCHEDULE), max_size=14), VERSION)
def test_the_scheduler_changes(history: list[tuple[str, list[Any]]], version: int) -> None:
    Pair("rr", (), version).do(history)

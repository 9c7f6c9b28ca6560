"""What is measured: cases that give, round by round, the ns of svcdp and of the C loop.

Rounds of the two alternate, so that both meet the same neighbours, clocks and caches. Before each
call the generator writes its packets anew (headers are in the cache, as after a receive); only
the call is timed, less what reading the clock takes. A round counts as the median of its calls.
"""

from __future__ import annotations

import ipaddress
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

from svcdp import Dataplane, DestinationSpec, ServiceSpec

from .reference import STRIDE, Loop, Packets

#: Where the generator sends packets: one address a service.
VIRTUAL, PORT = int(ipaddress.ip_address("10.96.0.1")), 80
DESTINATIONS = 10
CONNECTIONS_MAX = 1 << 20
#: Packets from the generator at a time when tables are filled.
FILL = 512
#: ns; later than every timeout.
FAR = 10**15
#: Bytes of a packet that are ever changed.
HEADERS = 40


class Case(Protocol):
    """One line of the table."""

    name: str
    #: What one measured ns is divided by: packets a call.
    per_call: int
    #: At most so many times the C loop, or None.
    ratio_max: float | None
    #: At most so many ns, or None.
    ns_max: float | None

    def svcdp(self) -> float:
        """A round of svcdp: ns a packet (a change, for updates)."""

    def c(self) -> float:
        """A round of the C loop."""


class Measured(NamedTuple):
    """Medians over the rounds of a case; the ratio is the median of the rounds' ratios."""

    svcdp: float
    c: float
    ratio: float


def measure(case: Case, rounds: int = 15) -> Measured:
    """Alternate rounds of the two sides; the first of each only warms up."""
    pairs = [(case.svcdp(), case.c()) for _ in range(rounds + 1)][1:]
    return Measured(
        statistics.median(svcdp for svcdp, _ in pairs),
        statistics.median(c for _, c in pairs),
        statistics.median(svcdp / c for svcdp, c in pairs),
    )


def virtual_address(service: int) -> str:
    return str(ipaddress.ip_address(VIRTUAL + service))


def first_destination(service: int) -> int:
    return int(ipaddress.ip_address("10.128.0.1")) + service * DESTINATIONS


def service_spec(service: int, destinations: int = DESTINATIONS) -> ServiceSpec:
    """The service that the generator calls by this number."""
    return ServiceSpec(
        virtual_address(service),
        PORT,
        destinations=tuple(
            DestinationSpec(str(ipaddress.ip_address(first_destination(service) + i)), 8080)
            for i in range(destinations)
        ),
    )


def new_dataplane(
    services: int, destinations: int = DESTINATIONS, connections: int = CONNECTIONS_MAX
) -> Dataplane:
    dp = Dataplane(connections, seed=1)
    dp.apply(service_spec(i, destinations) for i in range(services))
    return dp


def new_loop(
    entries: int, services: int, destinations: int = DESTINATIONS, *, replies: bool = False
) -> Loop:
    loop = Loop(entries, services, replies=replies)
    for i in range(services):
        loop.service(VIRTUAL + i, PORT, first_destination(i), destinations)
    return loop


def timed_calls(
    calls: int, prepare: Callable[[], object], call: Callable[[Any], object], argument: object
) -> float:
    """Median ns of `call(argument)`."""
    now = time.perf_counter_ns
    times = []
    for _ in range(calls):
        prepare()
        start = now()
        call(argument)
        times.append(now() - start)
    return statistics.median(times) - clock_cost()


@cache
def clock_cost() -> float:
    """What reading the clock adds to a measurement from Python."""
    now = time.perf_counter_ns
    times = []
    for _ in range(5000):
        start = now()
        times.append(now() - start)
    return statistics.median(times)


@cache
def c_clock_cost() -> float:
    """The same in C."""
    loop = Loop(64)
    return statistics.median(loop.time_nothing() for _ in range(5000))


def timed_loops(calls: int, prepare: Callable[[], object], loop: Loop, packets: Packets) -> float:
    """Median ns of the C loop over the packets."""
    times = []
    for _ in range(calls):
        prepare()
        times.append(loop.time(packets))
    return statistics.median(times) - c_clock_cost()


class Hit:
    """Packets of established connections, all equally likely.

    Both tables are made for `room` connections, by default just those that they hold.
    """

    ns_max: float | None = None

    def __init__(
        self,
        connections: int,
        batch: int = 64,
        ratio_max: float | None = None,
        how: str = "batch",
        room: int | None = None,
    ) -> None:
        of_room = f" of {room:,}" if room else ""
        self.name = f"hit, {connections:,}{of_room} connections, {how} of {batch}"
        room = room or connections
        self.connections = connections
        self.per_call = batch
        self.ratio_max = ratio_max
        self.calls = max(100, 64 * 1000 // batch) if batch > 1 else 2000
        self.packets = Packets(batch)
        self.buffers = [bytearray(length) for length in self.packets.lengths]
        self.dp = new_dataplane(1, connections=room)
        self.loop = new_loop(room, 1)
        fill = Packets(FILL)
        for syn in (True, False):
            for first in range(0, connections, FILL):
                fill.of_flows(min(first, max(connections - FILL, 0)), syn=syn)
                self.loop.run(fill)
                fill.of_flows(min(first, max(connections - FILL, 0)), syn=syn)
                self.dp.process_batch(fill.batch)
        calls: dict[str, tuple[Callable[[Any], object], object]] = {
            "batch": (self.dp.process_batch, self.packets.batch),
            "list": (self.dp.process_batch, self.buffers),
            "single packet": (self.dp.process, self.buffers[0]),
        }
        self.call, self.argument = calls[how]
        self.contiguous = how == "batch"

    def svcdp(self) -> float:
        prepare = self.write if self.contiguous else self.write_buffers
        return timed_calls(self.calls, prepare, self.call, self.argument) / self.per_call

    def c(self) -> float:
        return timed_loops(self.calls, self.write, self.loop, self.packets) / self.per_call

    def write(self) -> None:
        self.packets.of_any(self.connections)

    def write_buffers(self) -> None:
        self.write()
        memory = self.packets.memory
        for i, buffer in enumerate(self.buffers):
            buffer[:HEADERS] = memory[i * STRIDE : i * STRIDE + HEADERS]


class NewConnection:
    """First packets, each of a connection of its own; both directions enter the table.

    Between rounds the table is emptied, outside of the timed calls.
    """

    ns_max: float | None = None

    def __init__(self, services: int, batch: int = 64, ratio_max: float | None = None) -> None:
        self.name = f"new connection, {services:,} service{'s'[: services > 1]}, batch of {batch}"
        self.per_call = batch
        self.ratio_max = ratio_max
        self.calls = 64 * 512 // batch
        self.packets = Packets(batch, services)
        self.dp = new_dataplane(services)
        self.loop = new_loop(2 * CONNECTIONS_MAX, services, replies=True)
        self.call, self.argument = self.dp.process_batch, self.packets.batch
        self.first = [0, 0]
        # Memory that the table takes for the first time is the kernel's time, not svcdp's.
        fill = Packets(FILL, services)
        for first in range(0, CONNECTIONS_MAX // 4, FILL):
            fill.of_flows(first, syn=True)
            self.dp.process_batch(fill.batch)
        self.empty()

    def empty(self) -> None:
        self.dp.sweep(time.monotonic_ns() + FAR)
        self.loop.clear()

    def svcdp(self) -> float:
        result = timed_calls(self.calls, lambda: self.write(False), self.call, self.argument)
        self.empty()
        return result / self.per_call

    def c(self) -> float:
        result = timed_loops(self.calls, lambda: self.write(True), self.loop, self.packets)
        self.empty()
        return result / self.per_call

    def write(self, side: bool) -> None:
        self.packets.of_flows(self.first[side], syn=True)
        self.first[side] = (self.first[side] + self.per_call) % (1 << 24)


class Update:
    """One destination of one service among many is taken away and put back."""

    ratio_max: float | None = None
    per_call = 1

    def __init__(self, services: int, ns_max: float | None = None) -> None:
        self.name = f"update of one destination, {services:,} services"
        self.ns_max = ns_max
        self.dp = new_dataplane(services)
        self.loop = new_loop(64, services)
        self.number = services // 2
        self.sizes = (DESTINATIONS - 1, DESTINATIONS)
        self.specs = [[service_spec(self.number, size)] for size in self.sizes]

    def svcdp(self) -> float:
        return statistics.mean(
            timed_calls(1, lambda: None, self.dp.update, specs)
            for _ in range(20)
            for specs in self.specs
        )

    def c(self) -> float:
        address, first = VIRTUAL + self.number, first_destination(self.number)
        return statistics.mean(
            timed_calls(1, lambda: None, lambda n: self.loop.service(address, PORT, first, n), size)
            for _ in range(20)
            for size in self.sizes
        )

"""IPVS's schedulers in plain Python, from a description of what the kernel does (and with none of
its code): slow, obvious, and written without a look at svcdp's own.

A `Service` keeps servers as the kernel does: the newest first, removed ones in the trash.
Whoever uses it opens and closes the connections.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd
from typing import NamedTuple

DAY = 86400
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1


@dataclass(eq=False, slots=True)
class Server:
    address: str
    port: int
    weight: int = 1
    last_weight: int = 0  # the newest that was not 0
    upper: int = 0
    lower: int = 0
    active: int = 0
    inactive: int = 0
    overloaded: bool = False
    present: bool = True

    @property
    def ok(self) -> bool:
        return self.weight > 0 and not self.overloaded

    @property
    def overhead(self) -> int:
        return 257 * self.active + self.inactive

    def reconsider(self) -> None:
        """Whether it is overloaded."""
        total = self.active + self.inactive
        if self.upper and total >= self.upper:
            self.overloaded = True
        elif total < (self.lower or Fraction(3 * self.upper, 4)) or not self.upper:
            self.overloaded = False


class Client(NamedTuple):
    """What schedulers see of a packet. ``now`` in seconds."""

    source: str = "192.0.2.4"
    port: int = 40000
    destination: str = "10.96.0.10"
    now: float = 0


def least(servers: Iterable[Server], load: Callable[[Server], Fraction | int]) -> Server | None:
    """The first one with the least load of those that may be picked."""
    return min((server for server in servers if server.ok), key=load, default=None)


def weighted(server: Server) -> Fraction:
    return Fraction(server.overhead, server.weight)


def fold(address: str) -> int:
    packed = ipaddress.ip_address(address).packed
    result = 0
    for start in range(0, len(packed), 4):
        result ^= int.from_bytes(packed[start : start + 4], "big")
    return result


def hash8(number: int) -> int:
    return (number * 0x61C88647 & MASK32) >> 24


def siphash13(key0: int, key1: int, data: bytes) -> int:
    """SipHash with 1 and 3 rounds, of any bytes."""

    def rotated(word: int, bits: int) -> int:
        return (word << bits | word >> (64 - bits)) & MASK64

    def mix() -> None:
        nonlocal a, b, c, d
        a = (a + b) & MASK64
        b = rotated(b, 13) ^ a
        a = rotated(a, 32)
        c = (c + d) & MASK64
        d = rotated(d, 16) ^ c
        a = (a + d) & MASK64
        d = rotated(d, 21) ^ a
        c = (c + b) & MASK64
        b = rotated(b, 17) ^ c
        c = rotated(c, 32)

    a, b = key0 ^ 0x736F6D6570736575, key1 ^ 0x646F72616E646F6D
    c, d = key0 ^ 0x6C7967656E657261, key1 ^ 0x7465646279746573
    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 255])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        d ^= word
        mix()
        a ^= word
    c ^= 0xFF
    for _ in range(3):
        mix()
    return a ^ b ^ c ^ d


class Scheduler:
    """``servers``: those of the service, the newest first."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers

    def added(self) -> None:
        """A server has come to the head of the list."""

    def edited(self) -> None:
        """A server has another weight."""

    def removed(self, server: Server, index: int) -> None:
        """A server that stood there has left the list."""

    def pick(self, client: Client) -> Server | None:
        raise NotImplementedError


class RoundRobin(Scheduler):
    pointer: Server | None = None  # None: the head of the list

    def removed(self, server: Server, index: int) -> None:
        if self.pointer is server:
            self.pointer = self.servers[index - 1] if index else None

    def pick(self, client: Client) -> Server | None:
        start = 0 if self.pointer is None else self.servers.index(self.pointer) + 1
        for server in self.servers[start:] + self.servers[:start]:
            if server.ok:
                self.pointer = server
                return server
        return None


class WeightedRoundRobin(Scheduler):
    """cl: index of the last server, -1: the head. cw: level, mw: the highest one, di: the step."""

    def __init__(self, servers: list[Server]) -> None:
        super().__init__(servers)
        self.cw = 0
        self.changed()
        self.cw = self.mw

    def changed(self) -> None:
        self.cl = -1
        self.di = gcd(*(server.weight for server in self.servers)) or 1
        self.mw = max((server.weight for server in self.servers), default=0) - (self.di - 1)
        if self.cw > self.mw or self.cw == 0:
            self.cw = self.mw
        elif self.di > 1:
            self.cw = self.cw // self.di * self.di + 1

    def added(self) -> None:
        self.changed()

    def edited(self) -> None:
        self.changed()

    def removed(self, server: Server, index: int) -> None:
        self.changed()

    def pick(self, client: Client) -> Server | None:
        if self.mw == 0:
            return None
        begin = position = self.cl
        from_the_top = False
        whole_pass = begin < 0
        while True:
            position += 1
            if position < len(self.servers):
                server = self.servers[position]
                if server.weight >= self.cw and server.ok:
                    self.cl = position
                    return server
                if from_the_top and position == begin and self.cw <= self.di:
                    self.cl = position
                    return None
                continue
            # The end of the list.
            seen_all = whole_pass and self.cw <= self.di
            position = -1
            whole_pass = True
            self.cw -= self.di
            if self.cw <= 0:
                self.cw = self.mw
                if seen_all:
                    self.cl = -1
                    return None
                from_the_top = True


class LeastConnection(Scheduler):
    def pick(self, client: Client) -> Server | None:
        return least(self.servers, lambda server: server.overhead)


class WeightedLeastConnection(Scheduler):
    def pick(self, client: Client) -> Server | None:
        return least(self.servers, weighted)


class ShortestExpectedDelay(Scheduler):
    def pick(self, client: Client) -> Server | None:
        return least(self.servers, lambda server: Fraction(server.active + 1, server.weight))


class NeverQueue(ShortestExpectedDelay):
    def pick(self, client: Client) -> Server | None:
        idle = [server for server in self.servers if server.ok and not server.active]
        return idle[0] if idle else super().pick(client)


class FailOver(Scheduler):
    def pick(self, client: Client) -> Server | None:
        return least(self.servers, lambda server: -server.weight)


class Overflow(Scheduler):
    def pick(self, client: Client) -> Server | None:
        room = [server for server in self.servers if server.active <= server.weight]
        return least(room, lambda server: -server.weight)


class DestinationHash(Scheduler):
    def pick(self, client: Client) -> Server | None:
        if not self.servers:
            return None
        table = [self.servers[bucket % len(self.servers)] for bucket in range(256)]
        server = table[hash8(fold(client.destination))]
        return server if server.ok else None


class Hashing(Scheduler):
    """Of the client."""

    def __init__(self, servers: list[Server], flags: Iterable[str] = (), size: int = 256) -> None:
        super().__init__(servers)
        self.size = size
        self.table: list[Server] = []
        self.heed(flags)
        self.build()

    def heed(self, flags: Iterable[str]) -> None:
        self.port = any(flag.endswith("-port") for flag in flags)
        self.fallback = any(flag.endswith("-fallback") for flag in flags)

    def build(self) -> None:
        raise NotImplementedError

    def added(self) -> None:
        self.build()

    def edited(self) -> None:
        self.build()

    def removed(self, server: Server, index: int) -> None:
        self.build()

    def place(self, client: Client, offset: int) -> int:
        """The entry of the table that an attempt looks at."""
        raise NotImplementedError

    def pick(self, client: Client) -> Server | None:
        if not self.table:
            return None
        first = self.place(client, 0)
        offsets = [(k + first) % self.size for k in range(self.size)] if self.fallback else []
        for entry in (first, *(self.place(client, offset) for offset in offsets)):
            if self.table[entry].ok:
                return self.table[entry]
        return None


class SourceHash(Hashing):
    def build(self) -> None:
        row = [server for server in self.servers for _ in range(min(server.weight, 256) or 1)]
        self.table = [row[bucket % len(row)] for bucket in range(256)] if row else []

    def place(self, client: Client, offset: int) -> int:
        port = client.port if self.port else 0
        return (hash8(fold(client.source) + port) + offset) % 256


class Maglev(Hashing):
    @staticmethod
    def hash(number: int, key: int = 2654435761) -> int:
        return siphash13(key, key, (number & MASK32).to_bytes(4, "little")) & MASK32

    def build(self) -> None:
        self.table = []
        divisor = gcd(*(server.last_weight for server in self.servers))
        if not divisor:
            return
        heaviest = max(server.last_weight for server in self.servers) // divisor
        shift = max(0, heaviest.bit_length() - self.size.bit_length() // 2)
        lists = []
        for server in self.servers:
            turns = max(server.last_weight // divisor >> shift, min(server.last_weight, 1))
            lists.append((server, self.preferences(server), turns))
        table: dict[int, Server] = {}
        while len(table) < self.size:
            for server, preferences, turns in lists:
                for _ in range(min(turns, self.size - len(table))):
                    table[next(entry for entry in preferences if entry not in table)] = server
        self.table = [table[entry] for entry in range(self.size)]

    def preferences(self, server: Server) -> Iterator[int]:
        """The entries in the order in which a server wants them."""
        number = fold(server.address) + server.port
        offset = self.hash(number) % self.size
        skip = self.hash(number, 2654446892) % (self.size - 1) + 1
        return ((offset + j * skip) % self.size for j in range(self.size))

    def place(self, client: Client, offset: int) -> int:
        port = client.port if self.port else 0
        return self.hash(fold(client.source) + port + offset) % self.size


class Locality(Scheduler):
    """lblc and lblcr: per destination address the servers, the newest first; when it was used and
    when its servers changed.
    """

    def __init__(self, servers: list[Server]) -> None:
        super().__init__(servers)
        self.cache: dict[str, tuple[list[Server], float, float]] = {}

    def is_hot(self, server: Server) -> bool:
        return server.active > server.weight and any(
            other.active * 2 < other.weight for other in self.servers
        )

    def cached(self, client: Client) -> tuple[list[Server], float]:
        found, used, changed = self.cache.get(client.destination, ([], 0, 0))
        if client.now - used >= DAY:
            self.cache.pop(client.destination, None)
            return [], client.now
        return found, changed


class LocalityLeastConnection(Locality):
    def pick(self, client: Client) -> Server | None:
        found, _ = self.cached(client)
        if found:
            self.cache[client.destination] = (found, client.now, 0)
        for server in found:
            if server.present and server.weight and not self.is_hot(server):
                return server
        server = least(self.servers, weighted)
        if server:
            self.cache[client.destination] = ([server], client.now, 0)
        return server


class LocalityReplication(Locality):
    def pick(self, client: Client) -> Server | None:
        found, changed = self.cached(client)
        server = least((server for server in found if server.present), weighted)
        if len(found) > 1 and client.now - changed > DAY:
            most = max((s for s in found if s.weight), key=weighted, default=None)
            if most:
                found = [s for s in found if s is not most]
                changed = client.now
        if found:
            self.cache[client.destination] = (found, client.now, changed)
        if server and not self.is_hot(server):
            return server
        server = least(self.servers, weighted)
        if server and server not in found:
            self.cache[client.destination] = ([server, *found], client.now, client.now)
        return server


class Twos(Scheduler):
    """``random``: numbers of 64 bits."""

    def __init__(self, servers: list[Server], random: Callable[[], int]) -> None:
        super().__init__(servers)
        self.random = random

    def drawn(self, able: list[Server]) -> Server:
        rest = self.random() % (sum(server.weight for server in able) + 1)
        for server in able:
            rest -= server.weight
            if rest <= 0:
                return server
        raise AssertionError("more was drawn than there is")

    def pick(self, client: Client) -> Server | None:
        able = [server for server in self.servers if server.ok]
        if not able:
            return None
        one, two = self.drawn(able), self.drawn(able)
        return two if two.weight * one.overhead > one.weight * two.overhead else one


class Nobody(Scheduler):
    def pick(self, client: Client) -> Server | None:
        return None


def splitmix64(state: int) -> Callable[[], int]:
    """Steele, Lea, Flood 2014."""

    def following() -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        return z ^ z >> 31

    return following


SCHEDULERS: dict[str, type[Scheduler]] = {
    "rr": RoundRobin,
    "wrr": WeightedRoundRobin,
    "lc": LeastConnection,
    "wlc": WeightedLeastConnection,
    "sed": ShortestExpectedDelay,
    "nq": NeverQueue,
    "fo": FailOver,
    "ovf": Overflow,
    "dh": DestinationHash,
    "sh": SourceHash,
    "mh": Maglev,
    "lblc": LocalityLeastConnection,
    "lblcr": LocalityReplication,
    "twos": Twos,
    "none": Nobody,
}


@dataclass
class Service:
    name: str
    flags: tuple[str, ...] = ()
    table_size: int = 4093
    random: Callable[[], int] | None = None
    servers: list[Server] = field(default_factory=list)
    trash: dict[tuple[str, int], Server] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Make the scheduler, from the servers that are there."""
        kind = SCHEDULERS[self.name]
        if issubclass(kind, Maglev):
            self.scheduler: Scheduler = kind(self.servers, self.flags, self.table_size)
        elif issubclass(kind, Hashing):
            self.scheduler = kind(self.servers, self.flags)
        elif issubclass(kind, Twos):
            assert self.random is not None
            self.scheduler = kind(self.servers, self.random)
        else:
            self.scheduler = kind(self.servers)

    def schedule(self, name: str, flags: tuple[str, ...] = ()) -> None:
        """Have another scheduler, or the same with other flags."""
        changed = name != self.name
        self.name, self.flags = name, flags
        if changed:
            self.begin()
        elif isinstance(self.scheduler, Hashing):
            self.scheduler.heed(flags)

    def find(self, address: str, port: int) -> Server:
        return next(s for s in self.servers if (s.address, s.port) == (address, port))

    def add(self, address: str, port: int, weight: int, upper: int = 0, lower: int = 0) -> None:
        server = self.trash.pop((address, port), None) or Server(address, port)
        server.present = True
        server.weight = server.last_weight = weight
        server.upper, server.lower = upper, lower
        server.reconsider()
        self.servers.insert(0, server)
        self.scheduler.added()

    def edit(self, address: str, port: int, weight: int, upper: int = 0, lower: int = 0) -> None:
        server = self.find(address, port)
        server.weight = weight
        server.last_weight = weight or server.last_weight
        server.upper, server.lower = upper, lower
        server.reconsider()
        self.scheduler.edited()

    def remove(self, address: str, port: int) -> None:
        server = self.find(address, port)
        index = self.servers.index(server)
        del self.servers[index]
        server.present = False
        self.trash[address, port] = server
        self.scheduler.removed(server, index)

    def pick(self, client: Client) -> Server | None:
        return self.scheduler.pick(client)

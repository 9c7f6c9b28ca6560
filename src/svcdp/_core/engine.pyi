"""Types of ``svcdp._core.engine``; the docstrings are in ``engine.pyx``."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from typing_extensions import Buffer, disjoint_base

from svcdp._core.batch import PacketBatch
from svcdp.types import DestinationSpec, Reason, Settings, Verdict

# protocol, client, port, virtual, port, destination, port, source, port, state, method, fwmark,
# deadline (ns), packets, destination id
_ConnectionRow = tuple[str, str, int, str, int, str, int, str, int, str, str, int, int, int, int]

STATES: tuple[str, ...]
OUTCOMES: tuple[int, int, int, int]
PLAIN: tuple[int, int, bool, int, bytes, int, int]

# position, delta, previous delta: of the client's sequence numbers, and of the destination's
_Shifts = tuple[tuple[int, int, int], tuple[int, int, int]]
# protocol, client, port, virtual or number of the persistence group, port, real, port, source,
# port, state, timeout (ns), deadline (ns), flags, fwmark, packets, sequences
_StateRow = tuple[
    int,
    str,
    int,
    str | int,
    int,
    str | None,
    int,
    str,
    int,
    int,
    int,
    int,
    int,
    int,
    int,
    _Shifts | None,
]

def plain_members(
    members: Iterable[DestinationSpec],
) -> dict[tuple[str, int], DestinationSpec] | None: ...

@disjoint_base
class Destination:
    @property
    def address(self) -> str: ...
    @property
    def weight(self) -> int: ...
    @property
    def id(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def inactive(self) -> int: ...
    @property
    def overloaded(self) -> bool: ...
    @property
    def ejected(self) -> bool: ...
    def ejected_at(self, now: int) -> bool: ...
    @property
    def failures(self) -> int: ...
    @property
    def failed_at(self) -> int: ...
    def with_weight(self, weight: int) -> Destination: ...

@disjoint_base
class Result:
    @property
    def verdict(self) -> Verdict: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def packet(self) -> memoryview | None: ...
    @property
    def next_hop(self) -> str | None: ...
    @property
    def destination(self) -> tuple[str, int] | None: ...
    @property
    def mark(self) -> int: ...

@disjoint_base
class Core:
    def __new__(
        cls,
        max_connections: int,
        seed: int,
        clock: Callable[[], int],
        port_first: int,
        port_last: int,
        timeouts: list[int],
    ) -> Self: ...
    @property
    def clock(self) -> Callable[[], int]: ...
    @property
    def max_connections(self) -> int: ...
    def process(
        self, buffer: Buffer, now: int | None = None, *, headroom: int = 0, mark: int = 0
    ) -> Result: ...
    def process_batch(
        self, batch: PacketBatch | Sequence[Buffer], now: int | None = None
    ) -> bytes: ...
    def answer(self, packet: Buffer, kind: int = 0, mtu: int = 0) -> bytes | None: ...
    def next_hop(self, batch: PacketBatch, index: int) -> str | None: ...
    def set_timeouts(self, number: int, timeouts: list[int]) -> None: ...
    def timeouts_in_use(self) -> set[int]: ...
    def set_settings(self, settings: Settings) -> None: ...
    def populate(self) -> None: ...
    def records(self) -> int: ...
    def sweep_records(self, now: int | None, limit: int) -> None: ...
    def new_destination(self, address: str, port: int) -> Destination: ...
    def new_destinations(
        self, endpoints: Iterable[tuple[str, int]]
    ) -> dict[tuple[str, int], Destination]: ...
    def forget(self) -> None: ...
    def commit(
        self,
        services: list[
            tuple[Any, list[tuple[Any, ...]] | None, list[list[tuple[Any, ...]] | None]]
        ],
        removed: list[Any],
        left_ids: list[int],
        removed_ids: list[int],
        restored_ids: list[int],
        books: list[tuple[dict[Any, Any], Collection[Any], Mapping[Any, Any]]],
    ) -> None: ...
    def draining_ids(self) -> frozenset[int]: ...
    def traffic(self, id: int) -> tuple[int, int, int, int, int]: ...
    def counters(
        self,
    ) -> tuple[dict[tuple[Verdict, Reason], int], int, int, int, int, int, int, int]: ...
    def table_ids(self, record: Any) -> list[int]: ...
    def connection_rows(
        self, pool: Literal[0, 1], start: int, limit: int
    ) -> tuple[int, list[_ConnectionRow]]: ...
    def state_rows(
        self, pool: Literal[0, 1], start: int, limit: int
    ) -> tuple[int, list[_StateRow]]: ...
    def service_key(
        self, address: bytes, port: int, protocol: int, mark: int
    ) -> tuple[str | None, int, int] | None: ...
    def import_template(
        self,
        record: Any,
        client: bytes,
        id: int,
        deadline: int,
        assured: bool,
        synced: bool,
        now: int,
    ) -> bool: ...
    def import_record(
        self,
        record: Any,
        protocol: int,
        client: bytes,
        client_port: int,
        virtual: bytes,
        virtual_port: int,
        source: bytes,
        source_port: int,
        id: int,
        state: int,
        deadline: int,
        packets: int,
        flags: int,
        sequences: _Shifts | None,
        now: int,
    ) -> int: ...
    def watch_open(self, limit: int, threshold: int, period: int) -> None: ...
    def watch_close(self) -> None: ...
    def watch_rows(self, limit: int) -> tuple[list[_StateRow], int]: ...
    def inspect(
        self,
        protocol: int,
        source: bytes,
        source_port: int,
        destination: bytes,
        destination_port: int,
        mark: int,
        now: int,
    ) -> tuple[
        _ConnectionRow | None,
        bool,
        Verdict | None,
        tuple[str | None, int, int] | None,
        int,
        int,
        int,
    ]: ...

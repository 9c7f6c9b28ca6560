"""A dataplane on a clock that the test moves, and packets that go to and fro."""

from __future__ import annotations

from typing import Any

import wire

import svcdp
from svcdp.dataplane import Connection

SECOND = 10**9
VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
CLIENT = {4: "192.0.2.4", 6: "2001:db8::4"}


class Bench:
    """``now`` is the time in ns of all that is sent."""

    def __init__(self, max_connections: int = 4096, seed: int = 1, **fields: Any) -> None:
        self.now = 0
        self.dp = svcdp.Dataplane(max_connections, seed, clock=lambda: self.now, **fields)

    def serve(
        self,
        *destinations: svcdp.DestinationSpec | tuple[str, int] | tuple[str, int, int],
        address: str = VIRTUAL[4],
        port: int = 80,
        protocol: str = "tcp",
        **fields: Any,
    ) -> None:
        """Have a service with these destinations: specs, or (address, port[, weight])."""
        specs = tuple(
            each if isinstance(each, svcdp.DestinationSpec) else svcdp.DestinationSpec(*each)
            for each in destinations
        )
        self.dp.update([svcdp.ServiceSpec(address, port, protocol, specs, **fields)])

    def send(
        self,
        flags: str = "S",
        *,
        port: int = 40000,
        client: str = CLIENT[4],
        to: tuple[str, int] = (VIRTUAL[4], 80),
        protocol: str = "tcp",
        mark: int = 0,
    ) -> svcdp.Result:
        """A packet of a client."""
        return self.dp.process(wire.packet(protocol, client, port, *to, flags), mark=mark)

    def reply(
        self,
        flags: str = "SA",
        *,
        source: tuple[str, int],
        port: int = 40000,
        client: str = CLIENT[4],
        protocol: str = "tcp",
    ) -> svcdp.Result:
        """A packet of a destination to whom it takes for the client."""
        return self.dp.process(wire.packet(protocol, *source, client, port, flags))

    def connections(self) -> list[Connection]:
        return list(self.dp.connections())

    def connection(self) -> Connection:
        (connection,) = self.dp.connections()
        return connection

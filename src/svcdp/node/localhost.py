"""Node ports at the loopback addresses, by relaying (KEP-6032).

The kernel drops what was rewritten for 127.0.0.1 as martian, unless the node opens its loopback
network to others (route_localnet). So programs on the node are relayed in user space, TCP only.
"""

from __future__ import annotations

import ipaddress
import logging
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from svcdp.abc import Sink
from svcdp.dataplane import Dataplane
from svcdp.io.relay import Place, TcpRelay
from svcdp.kube.events import Event, Recorder
from svcdp.kube.model import ObjectKey
from svcdp.records import Key
from svcdp.schedulers import BUILTIN
from svcdp.types import Flow, ServiceSpec, SourceRule, Verdict

__all__ = ["LocalhostNodePorts"]

log = logging.getLogger(__name__)

FAILED = "FailedToListenAtLocalhost"
MAX_CONNECTIONS = 1024
#: Seconds. The relay says when a connection is over: then it is forgotten at once, and not before.
TIMEOUTS = {"established": 1 << 30, "close": 1e-9}
#: Records looked at with each end: those that are over never fill the table.
SWEEP = 16
#: Of a client that nobody is: to ask whether one would be served.
ANY_PORT = 1

SYN, RST, ACK = 2, 4, 16


class LocalhostNodePorts:
    """A sink around a mode: relays what is for services at loopback addresses, and gives the mode
    the others.

    Who serves is decided by a dataplane of its own, which is told of connections by packets that
    nobody sends: so schedulers, weights and affinity are those of the service. Ports are listened
    at while somebody would serve.
    """

    def __init__(self, mode: Sink, record: Recorder) -> None:
        self._mode = mode
        self._record = record
        # Affinity may take half of it, and some wait to be forgotten.
        self._dataplane = Dataplane(4 * MAX_CONNECTIONS, timeouts=TIMEOUTS)
        self._relay = TcpRelay(self._pick, limit=MAX_CONNECTIONS)
        self._served: dict[Place, ServiceSpec] = {}
        self._failed: dict[Key, str] = {}

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key]) -> None:
        """As :meth:`svcdp.abc.Sink.update`. Ports follow by :meth:`listen`."""
        specs, removed = tuple(specs), tuple(removed)
        own = [_relayed(spec) for spec in specs if _is_own(spec.key) and spec.protocol == "tcp"]
        self._mode.update(
            [spec for spec in specs if not _is_own(spec.key)],
            [key for key in removed if not _is_own(key)],
        )
        gone = [key for key in removed if _is_own(key) and key[2] == "tcp"]
        self._dataplane.update(own, gone)
        for key in gone:
            self._served.pop(key[:2], None)
        for spec in own:
            if self._is_served(spec):
                self._served[spec.key[:2]] = spec
            else:
                self._served.pop(spec.key[:2], None)

    def listen(self) -> None:
        """Listen where somebody would serve, and nowhere else. A port that cannot be opened is an
        event, once, and tried again by the next call. For the event loop's thread.
        """
        wanted = self._served.copy()  # update() is another thread's
        for place in self._relay.places - wanted.keys():
            self._relay.leave(place)
        failed: dict[Key, str] = {}
        for place in wanted.keys() - self._relay.places:
            spec = wanted[place]
            try:
                self._relay.listen(place)
            except OSError as error:
                failed[spec.key] = f"port {place[1]} of {place[0]}: {error.strerror or error}"
                if self._failed.get(spec.key) != failed[spec.key]:
                    self._record(Event(_service(spec), FAILED, failed[spec.key]))
        self._failed = failed
        self._dataplane.sweep()

    async def close(self) -> None:
        """Relay no more."""
        await self._relay.close()

    def _is_served(self, spec: ServiceSpec) -> bool:
        if _serves_all(spec):
            return True  # as nearly always: asking costs as much as the destinations are many
        address, port, protocol = spec.key
        flow = Flow(protocol, address, ANY_PORT, address, port)
        return self._dataplane.explain(flow).action == "forward"

    @contextmanager
    def _pick(self, place: Place, client: Place) -> Iterator[list[Place]]:
        """The one who is to serve, then the others."""
        possible = self._dataplane.explain(Flow("tcp", *client, *place)).destinations
        picked = self._dataplane.process(_segment(client, place, SYN))
        if picked.verdict != Verdict.FORWARD or picked.destination is None:
            yield []
            return
        self._dataplane.process(_segment(client, place, ACK))
        try:
            places = [picked.destination, *((each.address, each.port) for each in possible)]
            yield list(dict.fromkeys(places))
        finally:
            self._dataplane.process(_segment(client, place, RST))
            self._dataplane.sweep(SWEEP)


def _is_own(key: Key) -> bool:
    return key[2] in ("tcp", "udp", "sctp") and ipaddress.ip_address(key[0]).is_loopback


def _relayed(spec: ServiceSpec) -> ServiceSpec:
    """The kernel gives connections their source, and nobody sees the servers' packets."""
    rules = tuple(replace(rule, masquerade=False) for rule in spec.rules)
    return replace(
        spec,
        rules=rules,
        masquerade_address=None,
        passive_health=None,
        helper="",
        last_port=0,
        timeouts=(),
    )


def _serves_all(spec: ServiceSpec) -> bool:
    """Whether nobody can be turned away, whatever there is: else it is not known."""
    return (
        spec.rules[:1] == (SourceRule(),)
        and spec.scheduler in BUILTIN.keys() - {"none"}
        and bool(spec.destinations)
        and all(each.weight and not each.upper for each in spec.destinations)
    )


def _service(spec: ServiceSpec) -> ObjectKey:
    """That of ``namespace/name:port``."""
    namespace, _, name = spec.name.partition("/")
    return ObjectKey("Service", namespace, name.partition(":")[0])


def _segment(client: Place, place: Place, flags: int) -> bytearray:
    """A TCP packet without payload. Nobody looks at its checksums."""
    source, target = (ipaddress.ip_address(address).packed for address, _ in (client, place))
    tcp = struct.pack("!HHIIBBHHH", client[1], place[1], 0, 0, 5 << 4, flags, 0, 0, 0)
    if len(source) == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, 20, 6, 64)
    return bytearray(head + source + target + tcp)

"""The dataplane: live services loaded from specs, and what they are doing."""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from svcdp import schedulers
from svcdp._core.engine import STATES, Core
from svcdp._core.engine import Destination as Handle
from svcdp.abc import Scheduler
from svcdp.errors import CapacityError, ConfigError, ConflictError, NotFoundError
from svcdp.types import (
    DestinationSpec,
    Flow,
    Protocol,
    Reason,
    ServiceSpec,
    SourceRule,
    Verdict,
)

__all__ = [
    "Captures",
    "Connection",
    "Dataplane",
    "DestinationStatus",
    "Explanation",
    "PossibleDestination",
    "ServiceStatus",
    "Stats",
    "Transaction",
    "VirtualService",
]

logger = logging.getLogger(__name__)

Key = tuple[str, int, str]
Endpoint = tuple[str, int]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

CONNECTIONS_MAX = 1 << 28
WEIGHT_MAX = (1 << 31) - 1
#: Records that one step of `connections()` or `sweep()` looks at while it holds the GIL.
STEP = 4096

#: Seconds without a packet after which a connection in this state is forgotten (ip_vs_proto_*.c).
TIMEOUTS: Mapping[str, float] = {
    "none": 2,
    "established": 900,
    "syn_sent": 120,
    "syn_recv": 60,
    "fin_wait": 120,
    "time_wait": 120,
    "close": 10,
    "close_wait": 60,
    "last_ack": 30,
    "listen": 120,
    "synack": 120,
    "udp": 300,
    "sctp": 900,
}

_FLOW = re.compile(
    r"\s*(?P<protocol>\w+)\s+(?P<source>\S+):(?P<source_port>\d+)"
    r"\s*->\s*(?P<destination>\S+):(?P<destination_port>\d+)\s*"
)


# -- what the dataplane tells ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection. ``source`` is what the destination sees as client (masquerade)."""

    protocol: str
    client: str
    client_port: int
    virtual: str
    virtual_port: int
    destination: str
    destination_port: int
    source: str
    source_port: int
    state: str
    expires_in: float  #: seconds
    packets: int  #: from the client


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """A destination of a service, and its counters since it was added."""

    address: str
    port: int
    weight: int
    method: str
    active: int
    inactive: int
    connections_total: int
    packets_in: int  #: from clients
    bytes_in: int  #: IP lengths
    packets_out: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """A service as it is in force."""

    spec: ServiceSpec
    destinations: list[DestinationStatus]


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the dataplane was made, and what its table holds now."""

    packets: dict[tuple[Verdict, Reason], int]
    connections: int
    connections_max: int
    connections_created: int
    connections_expired: int
    persistence_templates: int
    scheduler_errors: int


@dataclass(frozen=True, slots=True)
class Captures:
    """(protocol, address, port) of whose packets must reach the dataplane."""

    virtual: frozenset[tuple[str, str, int]] = frozenset()
    real: frozenset[tuple[str, str, int]] = frozenset()

    def __or__(self, other: Captures) -> Captures:
        return Captures(self.virtual | other.virtual, self.real | other.real)


@dataclass(frozen=True, slots=True)
class PossibleDestination:
    """Where a flow could be sent now, and whether it would be masqueraded."""

    address: str
    port: int
    weight: int
    method: str
    masquerade: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen to a flow, and each rule that led there.

    ``action`` is forward, pass, drop or reject. ``destinations`` are all that could be picked.
    """

    flow: Flow
    action: str
    service: ServiceSpec | None
    destinations: tuple[PossibleDestination, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.flow}: {self.action}"]
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [
            f"  -> {d.address} port {d.port} weight {d.weight} {d.method}"
            + (" masquerade" if d.masquerade else "")
            for d in self.destinations
        ]
        return "\n".join(lines)


# -- from specs to what the core takes -----------------------------------------------------------


@dataclass(slots=True)
class _Record:
    """A service as `Core.commit` takes it: addresses as bytes, times in ns, members by id with
    the newest first.
    """

    address: bytes
    port: int
    protocol: int
    scheduler: int
    chooser: Callable[..., int | None] | None
    candidates: tuple[Handle, ...] | None
    persistence: int
    affinity: int
    masquerade: bytes | None
    members: list[tuple[int, int]]
    rules: tuple[tuple[tuple[tuple[bytes, bytes], ...] | None, bool, int], ...]


@dataclass(slots=True)
class _Installed:
    """A service in force. ``handles`` in the order in which destinations were added."""

    spec: ServiceSpec
    handles: dict[Endpoint, Handle]
    scheduler: Scheduler | None
    record: _Record


def _address(text: str, what: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise ConfigError(f"{what}: {text!r} is no IP address") from None


def _port(port: int, what: str) -> int:
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"{what}: port {port!r} is not between 1 and 65535")
    return port


def _key(address: str, port: int, protocol: str) -> Key:
    """A service key with the address as ipaddress prints it. ConfigError."""
    what = f"service {address!r}"
    if protocol not in ("tcp", "udp", "sctp"):
        raise ConfigError(f"{what}: protocol {protocol!r} is none of tcp, udp, sctp")
    return (str(_address(address, what)), _port(port, what), protocol)


def _destination(spec: DestinationSpec, service: ServiceSpec) -> DestinationSpec:
    """The spec with its address normalised. ConfigError."""
    what = f"{service}: destination {spec.address!r}"
    address = _address(spec.address, what)
    if address.version != ipaddress.ip_address(service.address).version:
        raise ConfigError(f"{what} is of the other IP family; masq needs one family")
    if not isinstance(spec.weight, int) or not 0 <= spec.weight <= WEIGHT_MAX:
        raise ConfigError(f"{what}: weight {spec.weight!r} is not between 0 and {WEIGHT_MAX}")
    if spec.method != "masq":
        raise ConfigError(f"{what}: forwarding method {spec.method!r} is not available; use masq")
    return replace(spec, address=str(address), port=_port(spec.port, what))


def _rules(
    rules: tuple[SourceRule, ...], service: ServiceSpec
) -> tuple[tuple[tuple[tuple[bytes, bytes], ...] | None, bool, int], ...]:
    version = ipaddress.ip_address(service.address).version
    compiled = []
    for rule in rules:
        try:
            networks = [ipaddress.ip_network(source) for source in rule.sources]
        except ValueError as error:
            raise ConfigError(f"{service}: source rule: {error}") from None
        if rule.on_empty not in ("reject", "drop"):
            raise ConfigError(f"{service}: on_empty {rule.on_empty!r} is neither reject nor drop")
        compiled.append(
            (
                # Networks of the other family admit nobody; that is not "any".
                tuple(
                    (network.network_address.packed, network.netmask.packed)
                    for network in networks
                    if network.version == version
                )
                if rule.sources
                else None,
                rule.masquerade,
                int(Verdict.REJECT if rule.on_empty == "reject" else Verdict.DROP),
            )
        )
    return tuple(compiled)


def _persistence_group(spec: ServiceSpec) -> str:
    return spec.persistence_group or f"{spec.address} {spec.port} {spec.protocol}"


def parse_flow(text: str) -> Flow:
    """A flow from ``"tcp 192.0.2.4:40000 -> 10.96.0.10:80"`` (IPv6 in brackets). ConfigError."""
    match = _FLOW.fullmatch(text)
    if not match:
        raise ConfigError(
            f"flow {text!r}: write it like 'tcp 192.0.2.4:40000 -> 10.96.0.10:80', IPv6"
            " addresses in brackets"
        )
    return _normal_flow(
        Flow(
            match["protocol"].lower(),
            match["source"].removeprefix("[").removesuffix("]"),
            int(match["source_port"]),
            match["destination"].removeprefix("[").removesuffix("]"),
            int(match["destination_port"]),
        )
    )


def _normal_flow(flow: Flow) -> Flow:
    destination, destination_port, protocol = _key(
        flow.destination, flow.destination_port, flow.protocol
    )
    source = _address(flow.source, "flow")
    if source.version != ipaddress.ip_address(destination).version:
        raise ConfigError(f"flow {flow}: source and destination are of different IP families")
    return Flow(
        protocol, str(source), _port(flow.source_port, "flow"), destination, destination_port
    )


# -- transactions --------------------------------------------------------------------------------


class VirtualService:
    """A service inside a transaction. What is done to it takes effect at the commit."""

    def __init__(self, spec: ServiceSpec, base: _Installed | None) -> None:
        self._base = base
        self._spec = spec
        self._members: dict[Endpoint, DestinationSpec] = {}
        self._edits: list[tuple[str, Endpoint, int]] = []
        if base is not None:
            for member in base.spec.destinations:
                self._members[member.address, member.port] = member

    @property
    def spec(self) -> ServiceSpec:
        """The service as it will be."""
        return replace(self._spec, destinations=tuple(self._members.values()))

    def add(self, address: str, port: int, weight: int = 1, method: str = "masq") -> None:
        """Add a destination. ConflictError when the service has it already."""
        member = _destination(DestinationSpec(address, port, weight, method), self._spec)
        endpoint = (member.address, member.port)
        if endpoint in self._members:
            raise ConflictError(f"{self._spec} already has a destination {address}:{port}")
        self._members[endpoint] = member
        self._edits.append(("add", endpoint, member.weight))

    def update(self, address: str, port: int, *, weight: int) -> None:
        """Change a destination's weight; 0 gives it no new connections. NotFoundError."""
        endpoint = self._endpoint(address, port)
        changed = replace(self._members[endpoint], weight=weight)
        self._members[endpoint] = _destination(changed, self._spec)
        self._edits.append(("edit", endpoint, weight))

    def remove(self, address: str, port: int) -> None:
        """Remove a destination. Its TCP connections go on until they end. NotFoundError."""
        endpoint = self._endpoint(address, port)
        del self._members[endpoint]
        self._edits.append(("remove", endpoint, 0))

    def _endpoint(self, address: str, port: int) -> Endpoint:
        endpoint = (str(_address(address, f"{self._spec}: destination")), port)
        if endpoint not in self._members:
            raise NotFoundError(f"{self._spec} has no destination {address}:{port}")
        return endpoint

    def _become(self, members: Iterable[DestinationSpec]) -> None:
        """Have exactly these destinations, and keep what is there."""
        wanted: dict[Endpoint, DestinationSpec] = {}
        for member in members:
            member = _destination(member, self._spec)
            endpoint = (member.address, member.port)
            if endpoint in wanted:
                raise ConflictError(f"{self._spec} names {member.address}:{member.port} twice")
            wanted[endpoint] = member
        for endpoint in [*self._members]:
            if endpoint not in wanted:
                self.remove(*endpoint)
        for endpoint, member in wanted.items():
            have = self._members.get(endpoint)
            if have is None:
                self.add(member.address, member.port, member.weight, member.method)
            elif have != member:
                self.update(*endpoint, weight=member.weight)


class Transaction:
    """Changes that take effect together at the end of the ``with`` block, or not at all."""

    def __init__(self, dataplane: Dataplane) -> None:
        self._dataplane = dataplane
        self._services: dict[Key, VirtualService | None] = {}
        self._bases: dict[Key, _Installed | None] = {}

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._dataplane._commit(self._services, self._bases)

    def service(
        self, address: str, port: int, protocol: str = "tcp", **fields: Any
    ) -> VirtualService:
        """Create a service, or edit the one that is there: it keeps what is not named.

        ``fields`` are those of :class:`svcdp.ServiceSpec`, for example ``scheduler`` or
        ``persistence``. ConfigError.
        """
        key = _key(address, port, protocol)
        staged = self._stage(key)
        try:
            spec = (
                replace(staged._spec, **fields)
                if staged is not None
                else ServiceSpec(*key, **fields)
            )
        except TypeError as error:
            raise ConfigError(f"service {address}: {error}") from None
        if staged is None:
            # Removed earlier in this transaction or never there: it starts without destinations.
            staged = VirtualService(spec, self._bases[key])
            for endpoint in [*staged._members]:
                staged.remove(*endpoint)
            self._services[key] = staged
        staged._spec = spec
        if "destinations" in fields:
            staged._become(spec.destinations)
        return staged

    def remove_service(self, address: str, port: int, protocol: str = "tcp") -> None:
        """Remove a service. Its TCP connections go on until they end. NotFoundError."""
        key = _key(address, port, protocol)
        if self._stage(key) is None:
            raise NotFoundError(f"no service {address}:{port}/{protocol}")
        self._services[key] = None

    def _stage(self, key: Key) -> VirtualService | None:
        if key not in self._services:
            base = self._dataplane._installed.get(key)
            self._bases[key] = base
            self._services[key] = None if base is None else VirtualService(base.spec, base)
        return self._services[key]


class Dataplane(Core):
    """Routes packets to the destinations of virtual services.

    ``max_connections`` bounds the connection table (96 bytes an IPv4 connection, taken as they
    come). ``seed`` makes every choice repeatable: same packets, same times, same seed, same
    bytes out; None draws a secret one. ``clock`` gives ns, monotonic. ``masquerade_ports`` are
    the first and last source port of masqueraded connections. ``timeouts`` in seconds by state
    replace some of IPVS's (`TIMEOUTS`).

    Thread safe: several threads may process packets while another changes services.
    """

    def __new__(
        cls,
        max_connections: int = 1 << 20,
        seed: int | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        masquerade_ports: tuple[int, int] = (61000, 65535),
        timeouts: Mapping[str, float] | None = None,
    ) -> Dataplane:
        first, last = masquerade_ports
        if not 1 <= max_connections <= CONNECTIONS_MAX:
            raise ConfigError(
                f"max_connections {max_connections} is not between 1 and {CONNECTIONS_MAX}"
            )
        if not 1 <= first <= last <= 65535:
            raise ConfigError(f"masquerade_ports {first}-{last} is no range of ports")
        unknown = sorted(set(timeouts or ()) - set(TIMEOUTS))
        if unknown:
            raise ConfigError(
                f"timeouts: {', '.join(unknown)} unknown; there are {', '.join(TIMEOUTS)}"
            )
        chosen = {**TIMEOUTS, **(timeouts or {})}
        if any(not 0 < seconds < 1 << 31 for seconds in chosen.values()):
            raise ConfigError("timeouts must be above 0 and below 2^31 seconds")
        return super().__new__(
            cls,
            max_connections,
            secrets.randbits(64) if seed is None else seed & (1 << 64) - 1,
            clock,
            first,
            last,
            [int(chosen[state.lower()] * 1e9) for state in STATES],
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The arguments are __new__'s.
        self._lock = threading.Lock()
        self._installed: dict[Key, _Installed] = {}
        #: Removed destinations that connections still use, by id.
        self._drained: dict[int, tuple[Key, Endpoint, Handle]] = {}
        self._affinities: dict[str, int] = {}
        self._affinity_last = 0

    # -- changes ---------------------------------------------------------------------------------

    def transaction(self) -> Transaction:
        """Start a change. ConflictError at its end when another one got there first."""
        return Transaction(self)

    def apply(self, specs: Iterable[ServiceSpec]) -> None:
        """Have exactly these services; touch only what differs. All or nothing.

        ConfigError names the spec that is wrong, ConflictError the key that two specs have.
        """
        wanted = self._by_key(specs)
        self._change(wanted, [key for key in self._installed if key not in wanted])

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key] = ()) -> None:
        """Have these services as they are here, and not those whose keys are ``removed`` (which
        may be unknown); leave all others alone. All or nothing.
        """
        wanted = self._by_key(specs)
        keys = {_key(*key) for key in removed}
        self._change(wanted, [key for key in keys if key in self._installed and key not in wanted])

    def _by_key(self, specs: Iterable[ServiceSpec]) -> dict[Key, ServiceSpec]:
        wanted: dict[Key, ServiceSpec] = {}
        for spec in specs:
            key = _key(*spec.key)
            if key in wanted:
                raise ConflictError(f"{spec} has the address of {wanted[key].name or 'another'}")
            wanted[key] = replace(spec, address=key[0]) if spec.address != key[0] else spec
        return wanted

    def _change(self, wanted: dict[Key, ServiceSpec], removed: list[Key]) -> None:
        services: dict[Key, VirtualService | None] = dict.fromkeys(removed)
        bases = {key: self._installed.get(key) for key in [*removed, *wanted]}
        for key, spec in wanted.items():
            base = bases[key]
            if base is not None and base.spec == spec:
                del bases[key]
                continue
            staged = VirtualService(spec, base)
            staged._become(spec.destinations)
            if base is not None and not staged._edits and staged.spec == base.spec:
                del bases[key]
                continue
            services[key] = staged
        self._commit(services, bases)

    def _commit(
        self, services: dict[Key, VirtualService | None], bases: dict[Key, _Installed | None]
    ) -> None:
        with self._lock:
            for key, base in bases.items():
                if self._installed.get(key) is not base:
                    raise ConflictError(
                        f"service {key[0]}:{key[1]}/{key[2]} was changed by another transaction;"
                        " start this one again"
                    )
            self._collect_drained()
            returning = {(key, endpoint): h for key, endpoint, h in self._drained.values()}
            fresh: list[Handle] = []
            restored: list[int] = []
            try:
                installed = {
                    key: self._build(key, staged, returning, fresh, restored)
                    for key, staged in services.items()
                    if staged is not None
                }
                gone = [
                    (key, endpoint, handle)
                    for key, base in bases.items()
                    if base is not None and key in services
                    for endpoint, handle in base.handles.items()
                    if key not in installed or endpoint not in installed[key].handles
                ]
                self.commit(
                    [
                        (state.record, self._edits(state, services[key], bases[key]))
                        for key, state in installed.items()
                    ],
                    [
                        base.record
                        for key, base in bases.items()
                        if base is not None and key in services and key not in installed
                    ],
                    [handle.id for _, _, handle in gone],
                    restored,
                )
            except (MemoryError, OverflowError) as error:
                self.forget([handle.id for handle in fresh])
                raise CapacityError(str(error)) from error
            except BaseException:
                self.forget([handle.id for handle in fresh])
                raise
            for key in bases:
                if key in services and key not in installed:
                    self._installed.pop(key, None)
            self._installed.update(installed)
            for id in restored:
                del self._drained[id]
            for entry in gone:
                self._drained[entry[2].id] = entry
            if any(base is not None and base.record.affinity for base in bases.values()):
                self._collect_affinities()

    def _edits(
        self, state: _Installed, staged: VirtualService | None, base: _Installed | None
    ) -> list[tuple[str, int, int]]:
        """The steps of an edit, by id. A destination that came and went in between has none."""
        assert staged is not None
        ids = {endpoint: handle.id for endpoint, handle in state.handles.items()}
        if base is not None:
            ids |= {endpoint: handle.id for endpoint, handle in base.handles.items()}
        return [
            (verb, ids[endpoint], weight)
            for verb, endpoint, weight in staged._edits
            if endpoint in ids
        ]

    def _build(
        self,
        key: Key,
        staged: VirtualService,
        returning: dict[tuple[Key, Endpoint], Handle],
        fresh: list[Handle],
        restored: list[int],
    ) -> _Installed:
        """What a staged service will be, with destinations found again or made."""
        spec = staged.spec
        base = staged._base
        handles: dict[Endpoint, Handle] = {}
        for endpoint in staged._members:
            handle = base.handles.get(endpoint) if base is not None else None
            if handle is None:
                handle = returning.get((key, endpoint))
                if handle is not None:
                    restored.append(handle.id)
                else:
                    address = ipaddress.ip_address(endpoint[0]).packed
                    handle = self.new_destination(address, endpoint[1])
                    fresh.append(handle)
            handles[endpoint] = handle
        scheduler = self._scheduler(spec, base)
        return _Installed(spec, handles, scheduler, self._compile(spec, handles, scheduler))

    def _scheduler(self, spec: ServiceSpec, base: _Installed | None) -> Scheduler | None:
        if spec.scheduler in schedulers.BUILTIN:
            return None
        if base is not None and base.scheduler is not None and base.spec.scheduler == spec.scheduler:
            return base.scheduler
        try:
            return schedulers.new_scheduler(spec.scheduler)
        except NotFoundError as error:
            raise ConfigError(f"{spec}: {error}") from None

    def _compile(
        self,
        spec: ServiceSpec,
        handles: dict[Endpoint, Handle],
        scheduler: Scheduler | None,
    ) -> _Record:
        address = ipaddress.ip_address(spec.address)
        masquerade = None
        if spec.masquerade_address is not None:
            source = _address(spec.masquerade_address, f"{spec}: masquerade_address")
            if source.version != address.version:
                raise ConfigError(f"{spec}: masquerade_address is of the other IP family")
            masquerade = source.packed
        if spec.persistence is not None and not 1 <= spec.persistence < 1 << 31:
            raise ConfigError(f"{spec}: persistence {spec.persistence!r} is not in 1..2^31-1 seconds")
        weights = {(m.address, m.port): m.weight for m in spec.destinations}
        members = [
            (handle.id, weights[endpoint]) for endpoint, handle in reversed(handles.items())
        ]
        return _Record(
            address=address.packed,
            port=spec.port,
            protocol=Protocol[spec.protocol.upper()],
            scheduler=schedulers.BUILTIN.get(spec.scheduler, schedulers.PYTHON),
            chooser=None if scheduler is None else _Chooser(spec, scheduler),
            candidates=None
            if scheduler is None
            else tuple(
                self.with_weight(handle, weights[endpoint])
                for endpoint, handle in reversed(handles.items())
                if weights[endpoint]
            ),
            persistence=(spec.persistence or 0) * 10**9,
            affinity=self._affinity(spec),
            masquerade=masquerade,
            members=members,
            rules=_rules(spec.rules, spec),
        )

    def _affinity(self, spec: ServiceSpec) -> int:
        """The number of a persistence group. Numbers are not given twice."""
        if spec.persistence is None:
            return 0
        group = _persistence_group(spec)
        if group not in self._affinities:
            self._affinity_last += 1
            self._affinities[group] = self._affinity_last
        return self._affinities[group]

    def _collect_affinities(self) -> None:
        """Forget the groups that no service has any more."""
        used = {_persistence_group(state.spec) for state in self._installed.values()}
        self._affinities = {g: n for g, n in self._affinities.items() if g in used}

    def _collect_drained(self) -> None:
        """Forget removed destinations that the core has let go of."""
        if self._drained:
            draining = self.draining_ids()
            self._drained = {id: e for id, e in self._drained.items() if id in draining}

    # -- observation -----------------------------------------------------------------------------

    def services(self) -> list[ServiceStatus]:
        """All services in force, ordered by address, port and protocol."""
        with self._lock:
            installed = sorted(self._installed.items())
        return [
            ServiceStatus(
                state.spec,
                [
                    DestinationStatus(
                        member.address,
                        member.port,
                        member.weight,
                        member.method,
                        handle.active,
                        handle.inactive,
                        *self.traffic(handle.id),
                    )
                    for member in state.spec.destinations
                    for handle in [state.handles[member.address, member.port]]
                ],
            )
            for _, state in installed
        ]

    def connections(self) -> Iterator[Connection]:
        """All live connections, a step at a time: not a snapshot of one moment."""
        for family in (0, 1):
            start = 1
            while start:
                start, rows = self.connection_rows(family, start, STEP)
                now = self.clock()
                for row in rows:
                    if row[10] > now:
                        yield _connection(row, now)

    def stats(self) -> Stats:
        """Counters of all workers together."""
        packets, created, expired, errors, connections, templates = self.counters()
        return Stats(
            packets, connections, self.max_connections, created, expired, templates, errors
        )

    def captures(self) -> Captures:
        """Whose packets must come here now: of all services, and of what was removed but still
        has connections.
        """
        with self._lock:
            virtual = {(p, a, n) for a, n, p in self._installed}
            real = {
                (key[2], *endpoint)
                for key, state in self._installed.items()
                for endpoint in state.handles
            }
        return Captures(frozenset(virtual), frozenset(real)) | self.draining()

    def draining(self) -> Captures:
        """The part of `captures()` that is there for the sake of old connections only, or of
        services that share it. Cost follows the number of removed destinations.
        """
        with self._lock:
            self._collect_drained()
            entries = [*self._drained.values()]
        return Captures(
            frozenset((key[2], key[0], key[1]) for key, _, _ in entries),
            frozenset((key[2], *endpoint) for key, endpoint, _ in entries),
        )

    def sweep(self, now: int | None = None, limit: int | None = None) -> None:
        """Drop expired connections among the next ``limit`` (default: all) of each family."""
        left = self.records() if limit is None else min(limit, self.records())
        while left > 0:
            self.sweep_records(self.clock() if now is None else now, min(left, STEP))
            left -= STEP

    def explain(self, flow: str | Flow) -> Explanation:
        """What would happen to the first packet of a flow (TCP: a SYN). Nothing changes."""
        flow = parse_flow(flow) if isinstance(flow, str) else _normal_flow(flow)
        now = self.clock()
        with self._lock:
            row, is_reply, rule_index, member = self.inspect(
                Protocol[flow.protocol.upper()],
                ipaddress.ip_address(flow.source).packed,
                flow.source_port,
                ipaddress.ip_address(flow.destination).packed,
                flow.destination_port,
                now,
            )
            state = self._installed.get((flow.destination, flow.destination_port, flow.protocol))
        spec = None if state is None else state.spec
        if row is not None:
            return _explain_known(flow, spec, _connection(row, now), is_reply)
        if state is None or spec is None:
            return Explanation(flow, "pass", None, (), ("no service has this address and port",))
        return _explain_new(flow, spec, [*reversed(state.handles)], rule_index, member)


class _Chooser:
    """Asks a scheduler; its first error since the service was configured is logged."""

    def __init__(self, spec: ServiceSpec, scheduler: Scheduler) -> None:
        self._spec = spec
        self._scheduler = scheduler
        self._failed = False

    def __call__(self, flow: Flow, destinations: tuple[Handle, ...]) -> int | None:
        try:
            return self._scheduler.pick(flow, destinations)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("scheduler failed service=%s; round robin serves", self._spec)
            raise


def _connection(row: tuple[Any, ...], now: int) -> Connection:
    return Connection(*row[:10], expires_in=max(row[10] - now, 0) / 1e9, packets=row[11])


def _explain_known(
    flow: Flow, spec: ServiceSpec | None, connection: Connection, is_reply: bool
) -> Explanation:
    masquerade = (connection.source, connection.source_port) != (
        connection.client,
        connection.client_port,
    )
    direction = "a reply of" if is_reply else "a packet of"
    return Explanation(
        flow,
        "forward",
        spec,
        (
            PossibleDestination(
                connection.destination, connection.destination_port, 0, "masq", masquerade
            ),
        ),
        (f"{direction} a known connection in state {connection.state}: it stays where it is",),
    )


def _explain_new(
    flow: Flow, spec: ServiceSpec, order: list[Endpoint], rule_index: int, member: int
) -> Explanation:
    reasons = [f"service {spec}: {len(spec.destinations)} destinations"]
    if rule_index < 0:
        reasons.append(f"no source rule of the service admits {flow.source}")
        return Explanation(flow, "drop", spec, (), tuple(reasons))
    rule = spec.rules[rule_index]
    admitted = f"in {', '.join(rule.sources)}" if rule.sources else "any source"
    reasons.append(
        f"source rule {rule_index + 1} ({admitted}): "
        + ("masquerade" if rule.masquerade else "the client's address is kept")
    )
    candidates = [m for m in spec.destinations if m.weight > 0]
    if member >= 0:
        bound = order[member]
        candidates = [m for m in spec.destinations if (m.address, m.port) == bound]
        reasons.append(f"the client is persistent to {bound[0]} port {bound[1]}")
    if not candidates:
        reasons.append(f"nobody to serve: no destination with a weight; {rule.on_empty}")
        return Explanation(flow, rule.on_empty, spec, (), tuple(reasons))
    if member < 0:
        reasons.append(f"scheduler {spec.scheduler} picks among {len(candidates)}")
    hairpin = spec.masquerade_address is not None
    possible = tuple(
        PossibleDestination(
            m.address,
            m.port,
            m.weight,
            m.method,
            rule.masquerade or (hairpin and m.address == flow.source),
        )
        for m in candidates
    )
    if rule.masquerade and not hairpin:
        reasons.append("masquerade is asked for, and the service has no address for it")
        return Explanation(flow, "drop", spec, (), tuple(reasons))
    if any(p.masquerade for p in possible) and not rule.masquerade:
        reasons.append("a client that reaches itself is masqueraded (hairpin)")
    return Explanation(flow, "forward", spec, possible, tuple(reasons))

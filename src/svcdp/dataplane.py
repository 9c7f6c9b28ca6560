"""The dataplane: live services loaded from specs, and what they are doing."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Self

from svcdp import schedulers
from svcdp._core.engine import Core
from svcdp._core.engine import Destination as Handle
from svcdp.abc import Scheduler
from svcdp.errors import CapacityError, ConfigError, ConflictError, NotFoundError
from svcdp.explain import (
    Explanation,
    PossibleDestination,
    explain_known,
    explain_new,
    normal_flow,
    parse_flow,
)
from svcdp.handover import (
    ConnectionWatch,
    Imported,
    can_import,
    export_connections,
    import_connection,
)
from svcdp.records import (
    Endpoint,
    Key,
    check_key,
    check_service,
    check_settings,
    compile_service,
    is_ftp,
    order_subsets,
    parse_address,
    ports_of,
)
from svcdp.status import (
    Captures,
    Connection,
    ConnectionState,
    DestinationStatus,
    ServiceStatus,
    Stats,
)
from svcdp.timeouts import TIMEOUTS, TimeoutClasses, check_timeouts, timeout_list
from svcdp.transaction import Installed, Transaction, VirtualService, subset_edits
from svcdp.types import DestinationSpec, Flow, Protocol, ServiceSpec, Settings, fwmark_key

__all__ = [
    "TIMEOUTS",
    "Captures",
    "Connection",
    "ConnectionState",
    "ConnectionWatch",
    "Dataplane",
    "DestinationStatus",
    "Explanation",
    "PossibleDestination",
    "ServiceStatus",
    "Stats",
    "Transaction",
    "VirtualService",
    "captures_of",
]

CONNECTIONS_MAX = 1 << 28
#: Records that one step of `connections()` or `sweep()` looks at while it holds the GIL.
STEP = 4096


class Dataplane(Core):
    """Routes packets to the destinations of virtual services.

    ``max_connections`` bounds the connection table: 96 bytes an IPv4 connection, 160 an IPv6 one;
    a third of that is an index that takes its memory at once where the kernel has huge pages.
    ``seed`` makes every choice repeatable: same packets, same times, same seed, same bytes out;
    None draws a secret one. ``clock`` gives ns, monotonic. ``masquerade_ports`` are the first and
    last source port of masqueraded connections; the default keeps clear of Linux's ephemeral
    ports and of node ports. ``timeouts`` in seconds by state replace some of IPVS's (`TIMEOUTS`).

    Thread safe: several threads may process packets while another changes services.
    """

    _lock: threading.RLock
    _committing: bool
    _installed: dict[Key, Installed]
    #: Removed destinations that connections still use, by id, with the service they served.
    _drained: dict[int, tuple[ServiceSpec, DestinationSpec, Handle]]
    #: What was captured for destinations before they were edited, for their connections of then.
    _former: dict[tuple[int, Captures], Handle]
    #: Numbers of persistence groups, and how many services have each.
    _affinities: dict[str, int]
    _affinity_users: dict[str, int]
    _affinity_last: int
    #: (address, protocol) that have, or had, a range of ports.
    _ranged: set[tuple[str, str]]
    _settings: Settings
    _timeout_classes: TimeoutClasses

    def __new__(
        cls,
        max_connections: int = 1 << 20,
        seed: int | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        masquerade_ports: tuple[int, int] = (1024, 29999),
        timeouts: Mapping[str, float] | None = None,
        settings: Settings | None = None,
    ) -> Self:
        first, last = masquerade_ports
        if not 1 <= max_connections <= CONNECTIONS_MAX:
            raise ConfigError(
                f"max_connections {max_connections} is not between 1 and {CONNECTIONS_MAX}"
            )
        if not 1 <= first <= last <= 65535:
            raise ConfigError(f"masquerade_ports {first}-{last} is no range of ports")
        chosen = {**TIMEOUTS, **check_timeouts(timeouts or {})}
        self = super().__new__(
            cls,
            max_connections,
            secrets.randbits(64) if seed is None else seed & (1 << 64) - 1,
            clock,
            first,
            last,
            timeout_list(chosen),
        )
        # Reentrant: a scheduler's finalizer may run, and look at its dataplane, at any time.
        self._lock = threading.RLock()
        self._committing = False
        self._installed = {}
        self._drained = {}
        self._former = {}
        self._affinities = {}
        self._affinity_users = {}
        self._affinity_last = 0
        self._ranged = set()
        self._timeout_classes = TimeoutClasses(chosen)
        self.configure(settings or Settings())
        return self

    # -- settings --------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """How packets are treated now."""
        return self._settings

    def configure(self, settings: Settings) -> None:
        """Treat packets in another way from now on. ConfigError."""
        check_settings(settings)
        with self._lock:
            # Nothing comes between the two: a signal handler may raise when the call returns.
            self._settings = settings
            self.set_settings(settings)

    @property
    def timeouts(self) -> dict[str, float]:
        """Seconds without a packet by state, of all services that have none of their own."""
        with self._lock:
            return self._timeout_classes.timeouts

    def configure_timeouts(self, timeouts: Mapping[str, float]) -> None:
        """Replace some of the timeouts (seconds by state). A connection takes the new one up
        with its next packet. ConfigError.
        """
        checked = check_timeouts(timeouts)
        with self._lock:
            self._timeout_classes.configure(self, checked)

    # -- changes ---------------------------------------------------------------------------------

    def transaction(self) -> Transaction:
        """Start a change. ConflictError at its end when another one got there first."""
        return Transaction(self)

    def apply(self, specs: Iterable[ServiceSpec]) -> None:
        """Have exactly these services; touch only what differs. All or nothing.

        ConfigError names the spec that is wrong, ConflictError the key that two specs have.
        """
        wanted = self._by_key(specs)
        self._change(wanted, [key for key in list(self._installed) if key not in wanted])

    def update(self, specs: Iterable[ServiceSpec], removed: Iterable[Key] = ()) -> None:
        """Have these services as they are here, and not those whose keys are ``removed`` (which
        may be unknown); leave all others alone. All or nothing.
        """
        wanted = self._by_key(specs)
        keys = {check_key(*key) for key in removed}
        self._change(wanted, [key for key in keys if key in self._installed and key not in wanted])

    def _by_key(self, specs: Iterable[ServiceSpec]) -> dict[Key, ServiceSpec]:
        wanted: dict[Key, ServiceSpec] = {}
        for spec in specs:
            spec = check_service(spec)
            key = spec.key
            if key in wanted:
                raise ConflictError(f"{spec} has the address of {wanted[key].name or 'another'}")
            wanted[key] = spec
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
        self, services: dict[Key, VirtualService | None], bases: dict[Key, Installed | None]
    ) -> None:
        # Made before the lock is taken, and before anything changes: their code is not ours.
        made = {
            key: self._scheduler(staged.spec, bases[key])
            for key, staged in services.items()
            if staged is not None
        }
        with self._lock:
            if self._committing:
                raise ConflictError("a scheduler changed the dataplane in the middle of a change")
            self._committing = True
            try:
                self._commit_locked(services, bases, made)
            finally:
                self._committing = False

    def _commit_locked(
        self,
        services: dict[Key, VirtualService | None],
        bases: dict[Key, Installed | None],
        made: dict[Key, Scheduler | None],
    ) -> None:
        for key, base in bases.items():
            if self._installed.get(key) is not base:
                raise ConflictError(
                    f"service {key[0]}:{key[1]}/{key[2]} was changed by another transaction;"
                    " start this one again"
                )
        self._check_overlaps(services)
        self._collect_drained()
        self.forget()  # what a change left that failed
        if len(self._affinities) > len(self._affinity_users):
            self._affinities = {g: self._affinities[g] for g in self._affinity_users}
        returning = {(s.key, (m.address, m.port)): h for s, m, h in self._drained.values()}
        restored: list[int] = []
        try:
            kept = {key: staged for key, staged in services.items() if staged is not None}
            timeouts = self._timeout_classes.numbers_of(
                self, (staged._spec for staged in kept.values())
            )
            installed = {
                key: self._build(key, staged, made[key], number, returning, restored)
                for (key, staged), number in zip(kept.items(), timeouts, strict=True)
            }
            outgoing = {
                key: base for key, base in bases.items() if base is not None and key in services
            }
            gone = [
                (base.spec, member, base.handles[member.address, member.port])
                for key, base in outgoing.items()
                for member in base.spec.destinations
                if key not in installed
                or (member.address, member.port) not in installed[key].handles
            ]
            given_up = self._given_up(gone, outgoing, installed)
            removed = [base.record for key, base in outgoing.items() if key not in installed]
            former = self._formers(outgoing, installed)
            users, unused = self._count_groups(outgoing, installed)
            self.commit(
                [
                    (
                        state.record,
                        self._edits(state, services[key], bases[key]),
                        subset_edits(state, bases[key]),
                    )
                    for key, state in installed.items()
                ],
                removed,
                [handle.id for *_, handle in gone],
                given_up,
                restored,
                # Here, not after it: a signal handler may raise as soon as the call returns.
                [
                    (self._installed, outgoing, installed),
                    (self._drained, restored, {entry[2].id: entry for entry in gone}),
                    (self._former, (), former),
                    (self._affinities, unused, {}),
                    (self._affinity_users, unused, users),
                ],
            )
        except (MemoryError, OverflowError) as error:
            raise CapacityError(str(error)) from error
        for state in installed.values():
            state.record.strip()
        if former:
            self._collect_former()

    def _given_up(
        self,
        gone: list[tuple[ServiceSpec, DestinationSpec, Handle]],
        outgoing: dict[Key, Installed],
        installed: dict[Key, Installed],
    ) -> list[int]:
        """Of destinations that leave, and of those that left and were kept so far: the ids of those
        that are not kept.
        """
        kept = {key: frozenset(state.spec.kept) for key, state in installed.items()}
        former = {key: frozenset(state.spec.kept) for key, state in outgoing.items()}
        left = [
            entry
            for entry in (self._drained.values() if any(former.values()) else ())
            if (entry[1].address, entry[1].port) in former.get(entry[0].key, ())
        ]
        return [
            handle.id
            for spec, member, handle in [*gone, *left]
            if (member.address, member.port) not in kept.get(spec.key, ())
        ]

    def _formers(
        self, outgoing: dict[Key, Installed], installed: dict[Key, Installed]
    ) -> dict[tuple[int, Captures], Handle]:
        """What is captured now of destinations that are edited, where that changes: known
        connections go on as they began, so their packets must come as before.
        """
        formers = {}
        for key, base in outgoing.items():
            if key not in installed:
                continue
            before, after = base.spec, installed[key].spec
            same_ports = _ports_captured(before) == _ports_captured(after)
            members = {(m.address, m.port): m for m in after.destinations}
            for member in before.destinations:
                now = members.get((member.address, member.port))
                if now is None or (same_ports and now is member):
                    continue
                former = _captures([(before, (member,))])
                if former != _captures([(after, (now,))]):
                    handle = base.handles[member.address, member.port]
                    formers[handle.id, former] = handle
        return formers

    def _collect_former(self) -> None:
        """Forget what was captured for destinations whose connections are gone."""
        self._former = {k: h for k, h in self._former.items() if h.active or h.inactive}

    def _check_overlaps(self, services: dict[Key, VirtualService | None]) -> None:
        """ConflictError when a port would belong to two ranges of one address. Every port (0) is
        no range: it gives way.
        """
        staged = {key: staged._spec for key, staged in services.items() if staged is not None}
        ranged = {(s.address, s.protocol) for s in staged.values() if s.last_port}
        if self._ranged:
            ranged |= self._ranged & {(key[0], key[2]) for key in staged}
        if not ranged:
            return
        specs = {key: state.spec for key, state in self._installed.items()}
        specs |= staged
        ranges = sorted(
            (key[0], key[2], *ports_of(spec), str(spec))
            for key, spec in specs.items()
            if (key[0], key[2]) in ranged and key[1] and services.get(key, key) is not None
        )
        for one, other in pairwise(ranges):
            if one[:2] == other[:2] and other[2] <= one[3]:
                raise ConflictError(f"{one[4]} and {other[4]} have ports in common")
        self._ranged |= ranged

    def _edits(
        self, state: Installed, staged: VirtualService | None, base: Installed | None
    ) -> list[tuple[str, int, int]] | None:
        """The steps of an edit, by id. A destination that came and went in between has none. None
        for a service that is new, and to which destinations were only added.
        """
        assert staged is not None
        if base is None and len(staged._edits) == len(state.handles):
            return None
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
        scheduler: Scheduler | None,
        timeouts: int,
        returning: dict[tuple[Key, Endpoint], Handle],
        restored: list[int],
    ) -> Installed:
        """What a staged service will be, with destinations found again or made."""
        spec = staged.spec
        base = staged._base
        known = {} if base is None else base.handles
        if not known and not returning:
            handles = self.new_destinations(staged._members)
        else:
            handles = {}
            for endpoint in staged._members:
                handle = known.get(endpoint)
                if handle is None and returning:
                    handle = returning.get((key, endpoint))
                    if handle is not None:
                        restored.append(handle.id)
                handles[endpoint] = handle or self.new_destination(*endpoint)
        subsets = order_subsets(spec, () if base is None else base.subsets)
        affinity = self._affinity(spec)
        record = compile_service(
            spec, staged._members, handles, subsets, scheduler, affinity, timeouts
        )
        return Installed(spec, handles, subsets, scheduler, record)

    def _scheduler(self, spec: ServiceSpec, base: Installed | None) -> Scheduler | None:
        if spec.scheduler in schedulers.BUILTIN:
            return None
        if (
            base is not None
            and base.scheduler is not None
            and base.spec.scheduler == spec.scheduler
        ):
            return base.scheduler
        try:
            return schedulers.new_scheduler(spec.scheduler)
        except NotFoundError as error:
            raise ConfigError(f"{spec}: {error}") from None

    def _affinity(self, spec: ServiceSpec) -> int:
        """The number of a persistence group. Numbers are not given twice."""
        if spec.persistence is None:
            return 0
        group = _persistence_group(spec)
        if group not in self._affinities:
            self._affinity_last += 1
            self._affinities[group] = self._affinity_last
        return self._affinities[group]

    def _count_groups(
        self, outgoing: dict[Key, Installed], installed: dict[Key, Installed]
    ) -> tuple[dict[str, int], set[str]]:
        """How many services will have each persistence group that some come to or leave, and the
        groups that none will have any more.
        """
        counts: Counter[str] = Counter()
        for states, change in ((outgoing, -1), (installed, 1)):
            for state in states.values():
                if state.record.affinity:
                    counts[_persistence_group(state.spec)] += change
        for group in counts:
            counts[group] += self._affinity_users.get(group, 0)
        return +counts, {group for group, users in counts.items() if not users}

    def _collect_drained(self) -> None:
        """Forget removed destinations that the core has let go of."""
        if self._drained:
            draining = self.draining_ids()
            gone = self._drained.keys() - draining
            self._drained = {id: e for id, e in self._drained.items() if id not in gone}
            self._former = {k: h for k, h in self._former.items() if k[0] not in gone}

    # -- observation -----------------------------------------------------------------------------

    def services(self) -> list[ServiceStatus]:
        """All services in force, ordered by address, port and protocol."""
        now = self.clock()
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
                        handle.ejected_at(now),
                        handle.failures,
                        max(0, now - handle.failed_at) / 1e9 if handle.failures else None,
                    )
                    for member in state.spec.destinations
                    for handle in [state.handles[member.address, member.port]]
                ],
            )
            for _, state in installed
        ]

    def hash_table(self, address: str, port: int, protocol: str = "tcp") -> list[Endpoint]:
        """Who has each entry of the table by which a service hashes its clients (sh, mh). Empty
        with other schedulers, and when nobody has a share. NotFoundError.
        """
        key = check_key(address, port, protocol)
        with self._lock:
            if key not in self._installed:
                raise NotFoundError(f"no service {address}:{port}/{protocol}")
            state = self._installed[key]
            endpoints = {handle.id: endpoint for endpoint, handle in state.handles.items()}
            return [endpoints[id] for id in self.table_ids(state.record)]

    def connections(self) -> Iterator[Connection]:
        """All live connections, a step at a time: not a snapshot of one moment."""
        for family in (0, 1):
            start = 1
            while start:
                start, rows = self.connection_rows(family, start, STEP)
                now = self.clock()
                for row in rows:
                    if row[12] > now:
                        yield Connection.from_row(row, now)

    def export_connections(self, now: int | None = None) -> Iterator[ConnectionState]:
        """All live connections and persistence templates, for `import_connection` elsewhere.
        Not a snapshot of one moment.
        """
        return export_connections(self, self.clock() if now is None else now)

    def import_connection(self, state: ConnectionState, now: int | None = None) -> Imported:
        """Go on with a connection of another dataplane, if its service and destination are here
        too. ConfigError when the state contradicts itself.
        """
        return import_connection(self, state, self.clock() if now is None else now)

    def can_import(self, state: ConnectionState) -> bool:
        """Whether the service and the destination of a connection are here: what
        `import_connection` needs. ConfigError when the state contradicts itself.
        """
        return can_import(self, state)

    def watch_connections(
        self, limit: int = 1 << 16, *, threshold: int = 3, period: int = 50
    ) -> ConnectionWatch:
        """Be told of connections as they change; ``limit`` of them wait to be read. One watch
        at a time: ConfigError.
        """
        return ConnectionWatch(self, limit, threshold, period)

    def _services_by_affinity(self) -> dict[int, ServiceSpec]:
        """A service of each persistence group that binds clients, by the group's number."""
        with self._lock:
            return {
                state.record.affinity: state.spec
                for state in self._installed.values()
                if state.record.affinity and not state.spec.persistence_engine
            }

    @staticmethod
    def _key_of(found: tuple[str | None, int, int], version: int) -> Key:
        """The key of a service as the core names it; a fwmark service has no address there."""
        address, port, protocol = found
        if address is None:
            return fwmark_key(port, 6 if version == 6 else 4)
        return (address, port, Protocol(protocol).name.lower())

    def stats(self) -> Stats:
        """Counters of all workers together."""
        packets, created, expired, errors, ejections, retries, connections, templates = (
            self.counters()
        )
        return Stats(
            packets,
            connections,
            self.max_connections,
            created,
            expired,
            templates,
            errors,
            ejections,
            retries,
        )

    def captures(self) -> Captures:
        """Whose packets must come here now: of all services, and of what was removed but still
        has connections.
        """
        with self._lock:
            specs = [state.spec for state in self._installed.values()]
            draining = self.draining()
        return captures_of(specs) | draining

    def draining(self) -> Captures:
        """The part of `captures()` that is there for the sake of old connections only, or of
        services that share it. Cost follows the number of removed destinations.
        """
        with self._lock:
            if not self._committing:  # else a scheduler's finalizer asks, in the middle of it
                self._collect_drained()
                self._collect_former()
            drained = _captures((spec, (member,)) for spec, member, _ in self._drained.values())
            return reduce(or_, (former for _, former in self._former), drained)

    def sweep(self, now: int | None = None, limit: int | None = None) -> None:
        """Drop expired connections among the next ``limit`` (default: all) of each family."""
        left = self.records() if limit is None else min(limit, self.records())
        while True:
            self.sweep_records(now, min(left, STEP))
            left -= STEP
            if left <= 0:
                break

    def explain(self, flow: str | Flow, mark: int = 0) -> Explanation:
        """What would happen to the first packet of a flow (TCP: a SYN) with a firewall mark.
        Nothing changes.
        """
        flow = parse_flow(flow) if isinstance(flow, str) else normal_flow(flow)
        now = self.clock()
        with self._lock:
            row, is_reply, gone, found, rule_index, member, choice = self.inspect(
                Protocol[flow.protocol.upper()],
                parse_address(flow.source).packed,
                flow.source_port,
                parse_address(flow.destination).packed,
                flow.destination_port,
                mark,
                now,
            )
            version = parse_address(flow.source).version
            state = None if found is None else self._installed.get(self._key_of(found, version))
        spec = None if state is None else state.spec
        if row is not None:
            return explain_known(flow, spec, Connection.from_row(row, now), is_reply, gone)
        if state is None or spec is None:
            return Explanation(flow, "pass", None, (), ("no service has this address and port",))
        subset = None if rule_index < 0 else state.subsets[rule_index]
        return explain_new(
            flow,
            spec,
            [*reversed(state.handles if subset is None else subset)],
            [endpoint for endpoint, handle in state.handles.items() if handle.overloaded],
            [endpoint for endpoint, handle in state.handles.items() if handle.ejected_at(now)],
            rule_index,
            member,
            choice,
            self._settings.cache_bypass,
        )


def captures_of(specs: Iterable[ServiceSpec]) -> Captures:
    """Whose packets must reach a dataplane with these services and no others."""
    return _captures((spec, spec.destinations) for spec in specs)


def _captures(entries: Iterable[tuple[ServiceSpec, Iterable[DestinationSpec]]]) -> Captures:
    virtual = set()
    real: set[tuple[str, str, int]] = set()
    ranges = set()
    marks = set()
    tunnels = set()
    hops = set()
    for spec, members in entries:
        address, port, protocol = spec.key
        has_data_ports = _has_data_ports(spec)
        if protocol == "fwmark":
            marks.add((port, 6 if ":" in address else 4))
        elif has_data_ports:
            virtual.add((protocol, address, 0))
        elif port and spec.last_port not in (0, port):
            ranges.add((protocol, address, port, spec.last_port))
        else:
            virtual.add((protocol, address, port))
        for member in members:
            if member.method == "masq" and protocol != "fwmark":
                real.add((protocol, member.address, 0 if has_data_ports else member.port))
                continue
            real.update(_replies(spec, member))
            if member.method == "tunnel":
                tunnels.add(spec.key)
            if member.method == "dr" and member.mark:
                hops.add((member.mark, member.address))
    return Captures(
        frozenset(virtual),
        frozenset(real),
        frozenset(ranges),
        frozenset(marks),
        frozenset(tunnels),
        frozenset(hops),
    )


def _has_data_ports(spec: ServiceSpec) -> bool:
    """Whether other connections belong to those of the service: FTP's, which the helper knows of
    or which follow the client.
    """
    return bool(spec.helper) or (is_ftp(spec) and spec.persistence is not None)


def _ports_captured(spec: ServiceSpec) -> tuple[int, bool]:
    """What of a service, beside its key, decides about the ports to capture."""
    return spec.last_port, _has_data_ports(spec)


def _replies(spec: ServiceSpec, member: DestinationSpec) -> Iterator[tuple[str, str, int]]:
    """What replies of a destination come from; by masq, of a firewall mark."""
    if member.method == "masq":
        for protocol in ("tcp", "udp", "sctp"):
            yield protocol, member.address, 0 if _has_data_ports(spec) else member.port
    elif spec.protocol != "fwmark":  # else the address that clients dial is not known
        any_port = spec.last_port or _has_data_ports(spec)
        yield spec.protocol, spec.address, 0 if any_port else spec.port


def _persistence_group(spec: ServiceSpec) -> str:
    return spec.persistence_group or f"{spec.address} {spec.port} {spec.protocol}"

"""Connections that go from one dataplane to another: to a standby, or to who comes after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from svcdp._core.engine import OUTCOMES, STATES
from svcdp.errors import ClosedError, ConfigError
from svcdp.records import (
    FTP_PORT,
    Endpoint,
    Key,
    check_address,
    check_key,
    check_number,
    check_port,
    is_ftp,
    parse_address,
)
from svcdp.status import METHOD, NO_CPORT, ONE_PACKET, SYNC, ConnectionState, SequenceShift
from svcdp.transaction import Installed
from svcdp.types import DestinationSpec, Protocol, ServiceSpec, fwmark_key

if TYPE_CHECKING:
    from svcdp._core.engine import Destination as Handle
    from svcdp.dataplane import Dataplane

__all__ = ["ConnectionWatch", "Imported", "can_import", "export_connections", "import_connection"]

Missing = Literal["no_service", "no_destination"]
#: What became of an imported connection.
Imported = Literal["created", "updated", Missing, "full", "refused"]

#: Records that one step looks at while it holds the GIL.
STEP = 4096
WATCH_MAX = 1 << 22
ASSURED = "ASSURED"

_OUTCOMES: dict[int, Imported] = dict(
    zip(OUTCOMES, ("created", "full", "updated", "refused"), strict=True)
)
#: Fields that are strings.
_STRINGS = tuple(field.name for field in fields(ConnectionState) if field.type == "str")
#: Protocol number of templates in rows of the core.
_TEMPLATE = 255


def export_connections(dataplane: Dataplane, now: int) -> Iterator[ConnectionState]:
    """All live connections and templates, a step at a time: not a snapshot of one moment."""
    services = dataplane._services_by_affinity()
    for pool in (0, 1):
        start = 1
        while start:
            start, rows = dataplane.state_rows(pool, start, STEP)
            for row in rows:
                state = state_of(row, now, services)
                if state is not None and state.expires_in > 0:
                    yield state


def state_of(
    row: tuple[Any, ...], now: int, services: dict[int, ServiceSpec]
) -> ConnectionState | None:
    """From a row of the core. None for what means nothing elsewhere: connections without a
    destination, one-packet ones, those that a helper waits for, templates whose service is gone
    or that bind calls.
    """
    (number, client, client_port, virtual, virtual_port, real, real_port, source, source_port,
     state, timeout, deadline, flags, fwmark, packets, shifts) = row  # fmt: skip
    expires_in = (deadline - now) / 1e9
    if number == _TEMPLATE:
        spec = services.get(virtual)
        if spec is None or real is None:
            return None
        address, port, protocol = spec.key
        mark = port if protocol == "fwmark" else 0
        if is_ftp(spec):
            # Its data connections are bound too: ip_vs_core.c, ip_vs_sched_persist.
            port = real_port = 0
        return ConnectionState(
            protocol, client, 0, address, 0 if mark else port, real, real_port, client, 0,
            ASSURED if state else "NONE", spec.persistence or 0, expires_in, flags, mark,
        )  # fmt: skip
    if real is None or flags & (ONE_PACKET | NO_CPORT):
        return None
    sequences = None if shifts is None else (SequenceShift(*shifts[0]), SequenceShift(*shifts[1]))
    return ConnectionState(
        Protocol(number).name.lower(), client, client_port, virtual, virtual_port, real, real_port,
        source, source_port, STATES[state], timeout / 1e9, expires_in, flags,
        fwmark, packets, sequences,
    )  # fmt: skip


def import_connection(dataplane: Dataplane, state: ConnectionState, now: int) -> Imported:
    """Go on with a connection, if its service and destination are here too. ConfigError when
    the state contradicts itself; then nothing has changed.
    """
    check_state(state)
    with dataplane._lock:
        place = _place_of(dataplane, state)
        if isinstance(place, str):
            return place
        installed, found = place
        if not isinstance(found, tuple):
            return _go_on(dataplane, state, installed, found, now)
        # A kept server to which nothing was sent here: a destination, until it has a connection.
        spec = installed.spec
        member = DestinationSpec(*found, weight=0)
        dataplane.update([replace(spec, destinations=(*spec.destinations, member))])
        try:
            installed = dataplane._installed[spec.key]
            return _go_on(dataplane, state, installed, installed.handles[found], now)
        finally:
            dataplane.update([spec])


def _go_on(
    dataplane: Dataplane, state: ConnectionState, installed: Installed, handle: Handle, now: int
) -> Imported:
    deadline = now + int(state.expires_in * 1e9)
    client = parse_address(state.client).packed
    if state.is_template:
        made = dataplane.import_template(
            installed.record,
            client,
            handle.id,
            deadline,
            state.state == ASSURED,
            bool(state.flags & SYNC),
            now,
        )
        return "created" if made else "refused"
    return _OUTCOMES[
        dataplane.import_record(
            installed.record,
            Protocol[state.protocol.upper()],
            client,
            state.client_port,
            parse_address(state.virtual).packed,
            state.virtual_port,
            parse_address(state.source).packed,
            state.source_port,
            handle.id,
            STATES.index(state.state),
            deadline,
            state.packets,
            state.flags,
            state.sequences,
            now,
        )
    ]


def can_import(dataplane: Dataplane, state: ConnectionState) -> bool:
    """Whether its service and destination are here. ConfigError as `import_connection`."""
    check_state(state)
    with dataplane._lock:
        return not isinstance(_place_of(dataplane, state), str)


def _place_of(
    dataplane: Dataplane, state: ConnectionState
) -> tuple[Installed, Handle | Endpoint] | Missing:
    """The service and destination of a connection, or what is missing. The address and port of a
    kept server that has no connections.
    """
    key = _service_key(dataplane, state)
    installed = None if key is None else dataplane._installed.get(key)
    if installed is None:
        return "no_service"
    destination = parse_address(state.destination).text
    handle = installed.handles.get((destination, state.destination_port))
    if handle is None:
        handle = installed.handles.get((destination, 0))
    if handle is None and is_ftp(installed.spec) and state.is_template:
        handles = installed.handles.items()
        handle = next((handle for key, handle in handles if key[0] == destination), None)
    if handle is not None:
        return installed, handle
    # By other methods than masq it takes more to reach one than is known of it.
    if not installed.spec.kept or state.is_template or state.flags & METHOD:
        return "no_destination"
    for endpoint in ((destination, state.destination_port), (destination, 0)):
        if endpoint in installed.spec.kept:
            dataplane._collect_drained()
            for spec, member, handle in dataplane._drained.values():
                if spec.key == key and (member.address, member.port) == endpoint:
                    return installed, handle
            return installed, endpoint
    return "no_destination"


def _service_key(dataplane: Dataplane, state: ConnectionState) -> Key | None:
    address = parse_address(state.virtual)
    if state.is_template and not state.fwmark:
        key = (address.text, state.virtual_port, state.protocol)
        ftp = (address.text, FTP_PORT, state.protocol)
        return ftp if state.virtual_port == 0 and key not in dataplane._installed else key
    if state.is_template:
        return fwmark_key(state.fwmark, 6 if address.version == 6 else 4)
    found = dataplane.service_key(
        address.packed, state.virtual_port, Protocol[state.protocol.upper()], state.fwmark
    )
    return None if found is None else dataplane._key_of(found, address.version)


def check_state(state: ConnectionState) -> None:
    """ConfigError."""
    if not isinstance(state, ConnectionState):
        raise ConfigError(f"{state!r} is no ConnectionState")
    what = f"connection {state.client!r} -> {state.virtual!r}"
    for name in _STRINGS:
        value = getattr(state, name)
        if not isinstance(value, str):
            raise ConfigError(f"{what}: {name} {value!r} is no string")
    for name, high in (("flags", 1 << 32), ("fwmark", 1 << 32), ("packets", 1 << 32)):
        check_number(getattr(state, name), 0, high - 1, f"{what}: {name}")
    if state.sequences is not None:
        _check_sequences(state.sequences, what)
    if not isinstance(state.expires_in, int | float) or not 0 < state.expires_in < 1 << 31:
        raise ConfigError(f"{what}: expires_in {state.expires_in!r} is not above 0 and below 2^31")
    version = check_address(state.client, what).version
    for address in (state.virtual, state.source):
        if check_address(address, what).version != version:
            raise ConfigError(f"{what}: {address} is of the other IP family")
    check_address(state.destination, what)
    for port in (state.virtual_port, state.destination_port):
        check_port(port, what, 0)
    if state.is_template:
        if not state.fwmark:
            check_key(state.virtual, state.virtual_port, state.protocol)
        if state.state not in ("NONE", ASSURED):
            raise ConfigError(f"{what}: a template's state is not {state.state}")
        return
    for port in (state.client_port, state.source_port):
        check_port(port, what, 0)
    if state.protocol not in ("tcp", "udp", "sctp"):
        raise ConfigError(f"{what}: protocol {state.protocol!r} is none of tcp, udp, sctp")
    if state.state not in STATES or _protocol_of(state.state) != state.protocol:
        raise ConfigError(f"{what}: {state.state!r} is no state of {state.protocol}")


def _check_sequences(sequences: tuple[SequenceShift, SequenceShift], what: str) -> None:
    if not isinstance(sequences, tuple) or len(sequences) != 2:
        raise ConfigError(f"{what}: sequences {sequences!r} are not those of both ends")
    for shift in sequences:
        if not isinstance(shift, tuple) or len(shift) != 3:
            raise ConfigError(f"{what}: {shift!r} is no SequenceShift")
        check_number(shift[0], 0, (1 << 32) - 1, f"{what}: position")
        for delta in shift[1:]:
            check_number(delta, -(1 << 31), (1 << 31) - 1, f"{what}: delta")


def _protocol_of(state: str) -> str:
    if state == "UDP":
        return "udp"
    return "sctp" if state.startswith("SCTP_") else "tcp"


class ConnectionWatch:
    """Connections as they change, by the rules of the IPVS sync protocol: each after
    ``threshold`` packets of its client and again after each ``period``, and TCP ones when their
    state changes. Close it when nobody reads it any more.
    """

    def __init__(self, dataplane: Dataplane, limit: int, threshold: int, period: int) -> None:
        check_number(limit, 1, WATCH_MAX, "limit")
        check_number(threshold, 1, (1 << 31) - 1, "threshold")
        check_number(period, 0, (1 << 31) - 1, "period")
        try:
            dataplane.watch_open(limit, threshold, period)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
        self._dataplane: Dataplane | None = dataplane
        self._lost = 0

    @property
    def lost(self) -> int:
        """Changes that nobody read in time."""
        return self._lost

    def read(self, limit: int = STEP) -> list[ConnectionState]:
        """What has changed since the last call, ``limit`` at most. ClosedError."""
        dataplane = self._dataplane
        if dataplane is None:
            raise ClosedError("the watch is closed")
        rows, self._lost = dataplane.watch_rows(limit)
        now = dataplane.clock()
        services = dataplane._services_by_affinity()
        states = (state_of(row, now, services) for row in rows)
        return [state for state in states if state is not None]

    def close(self) -> None:
        """Watch no more."""
        if self._dataplane is not None:
            self._dataplane.watch_close()
            self._dataplane = None

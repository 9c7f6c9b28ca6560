"""What a director does with what it is told: connections made or brought up to date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from svcdp.dataplane import TIMEOUTS, Dataplane
from svcdp.errors import ConfigError, StateError
from svcdp.ipvs.states import protocol_name, state_name
from svcdp.ipvs.sync import SyncEntry, decode
from svcdp.status import (
    INACTIVE,
    NO_CPORT,
    NOOUTPUT,
    SYNC,
    TEMPLATE,
    ConnectionState,
    SequenceShift,
)

__all__ = ["Receiver", "ReceiverStats", "state_of"]

METHOD = 0x0007
TEMPLATE_TIMEOUT = 180  # seconds, as in ip_vs_sync.c
TIMEOUT_MAX = 31 * 86400  # seconds, the longest that ipvsadm takes
#: Destinations that are not served here, of which to remember that they were told of.
LEFT_OUT_MAX = 4096
#: Flags that a peer may set.
FLAGS = METHOD | NOOUTPUT | INACTIVE | NO_CPORT | TEMPLATE


@dataclass(slots=True)
class ReceiverStats:
    """Counters since the start."""

    messages: int = 0  #: that were read
    foreign: int = 0  #: of another syncid
    malformed: int = 0  #: messages that are none
    malformed_entries: int = 0
    requests: int = 0  #: for the whole table
    #: Entries, by what became of them: as `Dataplane.import_connection` says.
    outcomes: dict[str, int] = field(default_factory=dict)


class Receiver:
    """Puts what messages tell into a dataplane. What is wrong is counted, never raised.

    ``syncid`` 0 hears all. ``dp`` None hears requests only. ``packets`` is what a connection
    that is heard of counts as packets: one less and it would be told back at its first packet.
    """

    def __init__(
        self,
        dp: Dataplane | None,
        syncid: int,
        *,
        packets: int = 3,
        on_request: Callable[[], None] = lambda: None,
    ) -> None:
        self._dp = dp
        self._syncid = syncid
        self._packets = packets
        self._on_request = on_request
        #: A connection of each destination that is not served here.
        self._left_out: dict[tuple[str | int, ...], ConnectionState] = {}
        self.stats = ReceiverStats()

    def lacks_something(self) -> bool:
        """Whether to ask for the whole table: nothing was taken of it yet, or something of it
        was left out and is served now.
        """
        dp = self._dp
        if dp is None:
            return False
        served = [key for key, state in self._left_out.items() if dp.can_import(state)]
        for key in served:
            del self._left_out[key]
        return bool(served) or not self.stats.outcomes.keys() & {"created", "updated"}

    def receive(self, data: bytes) -> None:
        """Take a datagram."""
        try:
            message = decode(data)
        except StateError:
            self.stats.malformed += 1
            return
        if self._syncid not in (0, message.syncid):
            self.stats.foreign += 1
            return
        self.stats.messages += 1
        self.stats.malformed_entries += message.malformed
        if message.is_request:
            self.stats.requests += 1
            self._on_request()
        if self._dp is not None:
            for entry in message.entries:
                self._take(self._dp, entry)

    def _take(self, dp: Dataplane, entry: SyncEntry) -> None:
        try:
            state = state_of(entry, self._packets)
            outcome = dp.import_connection(state)
        except (ConfigError, StateError):
            self.stats.malformed_entries += 1
            return
        outcomes = self.stats.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome in ("no_service", "no_destination") and len(self._left_out) < LEFT_OUT_MAX:
            self._left_out[_place(state)] = state


def _place(state: ConnectionState) -> tuple[str | int, ...]:
    """What connections of one service and destination have in common."""
    return (
        state.is_template,
        state.protocol,
        state.virtual,
        state.virtual_port,
        state.fwmark,
        state.destination,
        state.destination_port,
    )


def state_of(entry: SyncEntry, packets: int) -> ConnectionState:
    """The connection that an entry tells of. StateError when there can be none like it, or none
    here: persistence engines.
    """
    if entry.engine:
        raise StateError("what persistence engines know cannot be taken over")
    flags = entry.flags & FLAGS | SYNC
    protocol = protocol_name(entry.protocol)
    state = state_name(protocol, flags, entry.state)
    virtual = entry.virtual
    if protocol == "fwmark":
        virtual = "::" if ":" in virtual else "0.0.0.0"
    # Version 0 does not tell it.
    timeout = entry.timeout or (TEMPLATE_TIMEOUT if flags & TEMPLATE else TIMEOUTS[state.lower()])
    source, source_port = entry.source or (entry.client, entry.client_port)
    return ConnectionState(
        protocol=protocol,
        client=entry.client,
        client_port=entry.client_port,
        virtual=virtual,
        virtual_port=entry.virtual_port,
        destination=entry.destination,
        destination_port=entry.destination_port,
        source=source,
        source_port=source_port,
        state=state,
        timeout=timeout,
        expires_in=min(timeout, TIMEOUT_MAX),
        flags=flags,
        fwmark=entry.fwmark,
        packets=packets,
        sequences=_sequences(entry),
    )


def _sequences(entry: SyncEntry) -> tuple[SequenceShift, SequenceShift] | None:
    if entry.sequences is None:
        return None
    one, other = (
        SequenceShift(each.initial, _signed(each.delta), _signed(each.previous_delta))
        for each in entry.sequences
    )
    return one, other


def _signed(number: int) -> int:
    return number - (1 << 32) if number >> 31 else number

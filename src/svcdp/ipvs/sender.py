"""What a director tells the others: which connections, when, in which messages."""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError
from svcdp.ipvs.states import family_of, is_synchronised, protocol_number, state_number
from svcdp.ipvs.sync import MESSAGE_MAX, MessageBuilder, Sequence, SyncEntry
from svcdp.status import IN_SEQ, INACTIVE, OUT_SEQ, SYNC, ConnectionState

__all__ = ["Sender", "SenderStats", "entry_of"]

log = logging.getLogger(__name__)

AGE_MAX = 2.0  # seconds that a connection waits for its message to become full
FULL_PAUSE = 5.0  # seconds between two starts of the whole table, at least
FULL_STEP = 8192  # connections of the whole table that go out at once, so that none gets lost


@dataclass(frozen=True, slots=True)
class SenderStats:
    """Counters since the start."""

    entries: int = 0  #: connections and templates put into messages
    skipped: int = 0  #: that the protocol cannot express: two IP families in one
    refused: int = 0  #: that do not fit into a message: a bug
    lost: int = 0  #: changes that came too fast; the whole table was sent for them
    tables: int = 0  #: times that sending the whole table began


class Sender:
    """Turns what changes in a dataplane into messages.

    The whole table is sent first, then every ``full_interval`` seconds (0: never) and when changes
    were lost: all but what others told of and only they have seen packets of, for they know
    better. After a `request` that is sent too.
    A connection is told of at packet number ``threshold`` and then every ``period`` packets, and
    at changes of its state; ``watch_limit`` of them wait to be sent.
    Not thread safe.
    """

    def __init__(
        self,
        dp: Dataplane,
        syncid: int,
        *,
        length_max: int = MESSAGE_MAX,
        version: Literal[0, 1] = 1,
        full_interval: float = 0,
        threshold: int = 3,
        period: int = 50,
        watch_limit: int = 1 << 16,
    ) -> None:
        self._dp = dp
        self._builder = MessageBuilder(syncid, length_max, version)
        self._version = version
        self._interval = full_interval or math.inf
        self._threshold = threshold
        self._watch = dp.watch_connections(watch_limit, threshold=threshold, period=period)
        self._rest: Iterator[ConnectionState] = iter(())
        self._full_due = -math.inf
        self._full_began = -math.inf
        self._asked = False
        self._oldest = math.inf
        self.stats = SenderStats()

    def close(self) -> None:
        self._watch.close()

    def request(self) -> None:
        """Have the whole table sent soon, to somebody who knows nothing."""
        self._asked = True
        self._hasten()

    def messages(self, now: float) -> Iterator[bytes]:
        """Those to send now (s, monotonic): call it several times a second."""
        if self._watch.lost > self.stats.lost:
            self.stats = replace(self.stats, lost=self._watch.lost)
            self._hasten()
        if now >= self._full_due:
            self._full_began = now
            self._full_due = now + self._interval
            states = filter(is_synchronised, self._dp.export_connections())
            self._rest = states if self._asked else filter(self._is_ours, states)
            self._asked = False
            self.stats = replace(self.stats, tables=self.stats.tables + 1)
        changed = self._watch.read(FULL_STEP)
        for state in chain(changed, islice(self._rest, FULL_STEP)):
            yield from self._add(state, now)
        if now - self._oldest >= AGE_MAX:
            yield from self.flush()

    def flush(self) -> Iterator[bytes]:
        """What waits for its message to become full."""
        message = self._builder.flush()
        self._oldest = math.inf
        if message:
            yield message

    def _hasten(self) -> None:
        self._full_due = min(self._full_due, self._full_began + FULL_PAUSE)

    def _is_ours(self, state: ConnectionState) -> bool:
        return not state.flags & SYNC or state.packets > self._threshold

    def _add(self, state: ConnectionState, now: float) -> Iterator[bytes]:
        try:
            entry = entry_of(state)
            if entry is None or (self._version == 0 and family_of(state) != 4):
                self.stats = replace(self.stats, skipped=self.stats.skipped + 1)
                return
            message = self._builder.add(entry)
        except ConfigError as error:  # it must not keep others from being told of
            if not self.stats.refused:
                log.error("a connection that others cannot be told of: %s", error)
            self.stats = replace(self.stats, refused=self.stats.refused + 1)
            return
        self.stats = replace(self.stats, entries=self.stats.entries + 1)
        if message:
            yield message
            self._oldest = now
        self._oldest = min(self._oldest, now)


def entry_of(state: ConnectionState) -> SyncEntry | None:
    """The entry that tells of a connection; None when the protocol has no way to: tunnels
    between the IP families.
    """
    if (":" in state.destination) != (family_of(state) == 6):
        return None
    is_masqueraded = (state.source, state.source_port) != (state.client, state.client_port)
    return SyncEntry(
        protocol_number(state.protocol),
        state.flags & ~SYNC | (INACTIVE if state.is_template else 0) | _shifted(state),
        state_number(state),
        state.client,
        state.client_port,
        _mark_address(state) if state.protocol == "fwmark" else state.virtual,
        state.virtual_port,
        state.destination,
        state.destination_port,
        state.fwmark,
        # What is left of it: in the table of one who only hears of it, time goes on too.
        max(math.ceil(state.expires_in), 1),
        sequences=_sequences(state),
        source=(state.source, state.source_port) if is_masqueraded else None,
    )


def _sequences(state: ConnectionState) -> tuple[Sequence, Sequence] | None:
    if state.sequences is None:
        return None
    # The wire has no signs.
    one, other = (Sequence(*(n & 0xFFFFFFFF for n in shift)) for shift in state.sequences)
    return one, other


def _shifted(state: ConnectionState) -> int:
    """Flags for each direction whose sequence numbers are shifted."""
    if state.sequences is None:
        return 0
    return sum(
        flag
        for flag, shift in zip((IN_SEQ, OUT_SEQ), state.sequences, strict=True)
        if shift.delta or shift.previous_delta
    )


def _mark_address(state: ConnectionState) -> str:
    """A template of a fwmark service has the mark where others have the virtual address."""
    packed = state.fwmark.to_bytes(4, "big")
    if family_of(state) == 4:
        return str(ipaddress.IPv4Address(packed))
    return str(ipaddress.IPv6Address(packed + bytes(12)))

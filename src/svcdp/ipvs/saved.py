"""Connections in a file, so that they outlive the process.

The file is a header, then the records; numbers are big-endian, times in ms::

    header   magic | version (32) | records (64) | bytes of records (64)
             | when it was saved, ms since 1970 (64) | SHA-256 of the records and of this
    record   IP version: of client, of destination | protocol, state as in the sync protocol
             | flags, fwmark, packets (32) | timeout, time left (64)
             | ports, then addresses: client, virtual, destination, source
             | if IN_SEQ or OUT_SEQ of the flags: positions and deltas of both ends (6 x 32)

A file is read whole and checked before anything of it is believed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from svcdp._files import replacing
from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError, PlatformError, StateError
from svcdp.ipvs.addresses import from_wire, to_wire
from svcdp.ipvs.states import (
    protocol_name,
    protocol_number,
    state_name,
    state_number,
)
from svcdp.status import SHIFTED, ConnectionState, SequenceShift

__all__ = ["VERSION", "Saved", "SavedConnections", "load", "restore", "save"]

log = logging.getLogger(__name__)

MAGIC = b"svcdp-cx"
VERSION = 2

START = struct.Struct("!8sI")
HEADER = struct.Struct("!8sIQQQ")
DIGEST_SIZE = hashlib.sha256().digest_size
RECORD = struct.Struct("!BBBBIIIQQHHHH")
SEQUENCES = struct.Struct("!IiiIii")

ADDRESS_SIZES = {4: 4, 6: 16}

Clock = Callable[[], float]


class Saved(NamedTuple):
    """How many connections were put into a file, and how many could not be."""

    written: int
    refused: int


@dataclass(frozen=True)
class SavedConnections:
    """What is in a file that is in order. Iterating gives the connections as they were."""

    saved_at: float  #: s since 1970
    count: int
    records: bytes

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[ConnectionState]:
        position = 0
        for _ in range(self.count):
            state, position = _unpack(self.records, position)
            yield state
        if position != len(self.records):
            raise StateError(f"{len(self.records) - position} bytes behind the last record")


def save(
    path: str | os.PathLike[str], states: Iterable[ConnectionState], *, clock: Clock = time.time
) -> Saved:
    """Put connections into a file, in place of what it has. One that cannot be written keeps no
    other from it.

    A crash at any moment leaves the old file or the new one. PlatformError.
    """
    path = Path(path)
    saved_at = round(clock() * 1000)
    digest = hashlib.sha256()
    count = refused = length = 0
    try:
        with replacing(path) as file:
            file.write(bytes(HEADER.size + DIGEST_SIZE))
            for state in states:
                try:
                    record = _pack(state)
                except ConfigError as error:
                    refused += 1
                    log.debug("%s", error)
                    continue
                file.write(record)
                digest.update(record)
                count += 1
                length += len(record)
            header = HEADER.pack(MAGIC, VERSION, count, length, saved_at)
            digest.update(header)
            file.seek(0)
            file.write(header + digest.digest())
    except OSError as error:
        raise PlatformError(
            error.errno, f"cannot save connections to {path}: {error.strerror}"
        ) from None
    return Saved(count, refused)


def load(path: str | os.PathLike[str]) -> SavedConnections:
    """Read a file. PlatformError when that cannot be done; StateError when it is not in order."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PlatformError(
            error.errno, f"cannot read connections from {path}: {error.strerror}"
        ) from None
    try:
        saved = _parse(data)
        for _ in saved:
            pass
    except StateError as error:
        raise StateError(f"{path}: {error}; remove it to start without old connections") from None
    return saved


def _parse(data: bytes) -> SavedConnections:
    if len(data) < START.size or not data.startswith(MAGIC):
        raise StateError("this file has no connections of svcdp")
    _, version = START.unpack_from(data)
    if version != VERSION:
        raise StateError(f"format {version} of saved connections; this svcdp has {VERSION}")
    start = HEADER.size + DIGEST_SIZE
    if len(data) < start:
        raise StateError("saved connections are cut off")
    header = data[: HEADER.size]
    _, _, count, length, saved_at = HEADER.unpack(header)
    records = data[start:]
    if len(records) != length:
        raise StateError(f"saved connections have {len(records)} bytes instead of {length}")
    digest = hashlib.sha256(records)
    digest.update(header)
    if digest.digest() != data[HEADER.size : start]:
        raise StateError("saved connections are damaged: their SHA-256 is another")
    return SavedConnections(saved_at / 1000, count, records)


def restore(
    dp: Dataplane, path: str | os.PathLike[str], *, clock: Clock = time.time
) -> Counter[str]:
    """Go on with the connections of a file: those that did not time out since it was saved.

    Returns how many had which outcome: those of `Dataplane.import_connection`, and "expired".
    Nothing is taken from a file that is not in order: as `load`.
    """
    saved = load(path)
    # A clock that was set back in between says nothing.
    elapsed = max(clock() - saved.saved_at, 0)
    outcomes: Counter[str] = Counter()
    for state in saved:
        left = state.expires_in - elapsed
        if left <= 0:
            outcomes["expired"] += 1
            continue
        try:
            outcomes[dp.import_connection(replace(state, expires_in=left))] += 1
        except ConfigError:
            outcomes["refused"] += 1
    return outcomes


def _pack(state: ConnectionState) -> bytes:
    flags, sequences = state.flags & ~SHIFTED, b""
    try:
        if state.sequences is not None:
            flags |= SHIFTED
            sequences = SEQUENCES.pack(*(n for shift in state.sequences for n in shift))
        addresses = (state.client, state.virtual, state.destination, state.source)
        record = RECORD.pack(
            6 if ":" in state.client else 4,
            6 if ":" in state.destination else 4,
            protocol_number(state.protocol),
            state_number(state),
            flags,
            state.fwmark,
            state.packets,
            round(state.timeout * 1000),
            round(state.expires_in * 1000),
            state.client_port,
            state.virtual_port,
            state.destination_port,
            state.source_port,
        )
        return record + b"".join(map(to_wire, addresses)) + sequences
    except (struct.error, OSError) as error:
        raise ConfigError(f"{state} cannot be saved: {error}") from None


def _unpack(data: bytes, position: int) -> tuple[ConnectionState, int]:
    """The connection whose record begins there, and where the next does. StateError."""
    if position + RECORD.size > len(data):
        raise StateError("a record of saved connections is cut off")
    version, other, number, state, flags, fwmark, packets, timeout, left, *ports = (
        RECORD.unpack_from(data, position)
    )
    position += RECORD.size
    if version not in ADDRESS_SIZES or other not in ADDRESS_SIZES:
        raise StateError("a record of saved connections is of no IP version")
    addresses = []
    for each in (version, version, other, version):
        size = ADDRESS_SIZES[each]
        if position + size > len(data):
            raise StateError("a record of saved connections is cut off")
        addresses.append(from_wire(data[position : position + size]))
        position += size
    sequences = None
    if flags & SHIFTED:
        if position + SEQUENCES.size > len(data):
            raise StateError("a record of saved connections is cut off")
        numbers = SEQUENCES.unpack_from(data, position)
        sequences = SequenceShift(*numbers[:3]), SequenceShift(*numbers[3:])
        position += SEQUENCES.size
    protocol = protocol_name(number)
    return (
        ConnectionState(
            protocol=protocol,
            client=addresses[0],
            client_port=ports[0],
            virtual=addresses[1],
            virtual_port=ports[1],
            destination=addresses[2],
            destination_port=ports[2],
            source=addresses[3],
            source_port=ports[3],
            state=state_name(protocol, flags, state),
            timeout=timeout / 1000,
            expires_in=left / 1000,
            flags=flags & ~SHIFTED,
            fwmark=fwmark,
            packets=packets,
            sequences=sequences,
        ),
        position,
    )

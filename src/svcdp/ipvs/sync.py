"""Messages of the IPVS sync protocol: how one director tells others of its connections.

All numbers are big-endian. Version 1 (Linux 2.6.39 and later)::

    message  0 | syncid | length (16) | entries (8) | version 1 | 0 (16)
    entry    type: 1 IPv6 | protocol | version 0 (4), length (12) | flags (32) | state (16)
             | ports of client, virtual service, destination | fwmark (32) | timeout, s (32)
             | addresses of the same | options
    option   kind | length of the data | data

Entries start at multiples of 4; their length is without that padding. Version 0 (IPv4 only)::

    message  entries (8) | syncid | length (16)
    entry    0 | protocol | ports (3 x 16) | addresses (3 x 32) | flags (16) | state (16)
             | sequences when the flags say so

Source: net/netfilter/ipvs/ip_vs_sync.c; what a kernel sends is in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from svcdp.errors import ConfigError, StateError
from svcdp.ipvs.addresses import from_wire, to_wire
from svcdp.status import SHIFTED

__all__ = [
    "LENGTH_MAX",
    "MESSAGE_MAX",
    "MESSAGE_MIN",
    "MessageBuilder",
    "Sequence",
    "SyncEntry",
    "SyncMessage",
    "decode",
    "encode",
    "encode_request",
]

#: What fits into an Ethernet frame, and what IPVS uses.
MESSAGE_MAX = 1472

#: Room for any entry.
MESSAGE_MIN = 512
#: Of a UDP payload.
LENGTH_MAX = 65507

ENTRIES_MAX = 255

HEADER_V0 = struct.Struct("!BBH")
HEADER_V1 = struct.Struct("!BBHBBH")
ENTRY_V0 = struct.Struct("!BBHHH12sHH")
ENTRY_V1 = struct.Struct("!BBHIHHHHII")
SEQUENCES = struct.Struct("!6I")

IPV6 = 1
LENGTH_BITS = 0x0FFF
FLAGS_V0 = 0xFFFF

OPTION_SEQUENCES = 1
OPTION_ENGINE_DATA = 2
OPTION_ENGINE_NAME = 3
#: Whoever does not know the option may ignore it.
OPTION_OPTIONAL = 0x40
#: svcdp's own: address and port that a masqueraded connection has as source.
OPTION_SOURCE = OPTION_OPTIONAL | 4
ENGINE_NAME_MAX = 15  # bytes


@dataclass(frozen=True, slots=True)
class Sequence:
    """How TCP sequence numbers of one direction are shifted (`struct ip_vs_seq`)."""

    initial: int
    delta: int
    previous_delta: int


@dataclass(frozen=True, slots=True)
class SyncEntry:
    """One connection or persistence template as it is in a message: numbers of the kernel."""

    protocol: int
    flags: int  #: IP_VS_CONN_F_*
    state: int
    client: str
    client_port: int
    virtual: str
    virtual_port: int
    destination: str
    destination_port: int
    fwmark: int = 0
    timeout: int = 0  #: seconds of its state, 0: not said
    sequences: tuple[Sequence, Sequence] | None = None  #: from the client, from the destination
    engine: str = ""  #: persistence engine of a template
    engine_data: bytes = b""
    source: tuple[str, int] | None = None  #: what the destination sees as client, if another


@dataclass(frozen=True, slots=True)
class SyncMessage:
    """A message. Without entries it asks those who hear it to send all they have."""

    syncid: int
    entries: tuple[SyncEntry, ...] = ()
    malformed: int = 0  #: entries that could not be read

    @property
    def is_request(self) -> bool:
        return not self.entries and not self.malformed


# -- reading -------------------------------------------------------------------------------------


def decode(data: bytes) -> SyncMessage:
    """Read a message of either version.

    StateError when it is none. Entries that make no sense are counted and left out; when one
    does not say where the next begins, that and all behind it.
    """
    if len(data) < HEADER_V0.size:
        raise StateError(f"a sync message of {len(data)} bytes has no header")
    count, syncid, length = HEADER_V0.unpack_from(data)
    if length != len(data):
        raise StateError(f"a sync message of {len(data)} bytes says it has {length}")
    if len(data) >= HEADER_V1.size:
        reserved, _, _, entries, version, spare = HEADER_V1.unpack_from(data)
        if (reserved, version, spare) == (0, 1, 0):
            return _decode_v1(data, syncid, entries)
    return _decode_v0(data, syncid, count)


def _decode_v1(data: bytes, syncid: int, count: int) -> SyncMessage:
    entries = []
    malformed = 0
    position = HEADER_V1.size
    for left in range(count, 0, -1):
        length = _entry_length(data, position)
        if not length:
            malformed += left
            break
        try:
            entries.append(_entry_v1(data[position : position + length]))
        except StateError:
            malformed += 1
        position += _aligned(length)
    return SyncMessage(syncid, tuple(entries), malformed)


def _entry_length(data: bytes, position: int) -> int:
    """Of the entry that begins there; 0 when it cannot be one."""
    if position + ENTRY_V1.size > len(data):
        return 0
    length = int.from_bytes(data[position + 2 : position + 4], "big") & LENGTH_BITS
    least = ENTRY_V1.size + 3 * _address_size(data[position])
    return length if least <= length <= len(data) - position else 0


def _entry_v1(data: bytes) -> SyncEntry:
    kind, protocol, version, flags, state, *ports, fwmark, timeout = ENTRY_V1.unpack_from(data)
    if kind & ~IPV6 or version & ~LENGTH_BITS:
        raise StateError(f"a sync entry of unknown type {kind} or version {version >> 12}")
    size = _address_size(kind)
    start = ENTRY_V1.size
    client, virtual, destination = _addresses(data[start : start + 3 * size])
    options = _options(data[start + 3 * size :])
    return SyncEntry(
        protocol,
        flags,
        state,
        client,
        ports[0],
        virtual,
        ports[1],
        destination,
        ports[2],
        fwmark,
        timeout,
        _sequences(options.get(OPTION_SEQUENCES)),
        _engine_name(options.get(OPTION_ENGINE_NAME, b"")),
        options.get(OPTION_ENGINE_DATA, b""),
        _source(options.get(OPTION_SOURCE), size),
    )


def _options(data: bytes) -> dict[int, bytes]:
    """StateError when they do not fill the data, one comes twice, or one must be understood and
    is not.
    """
    known = (OPTION_SEQUENCES, OPTION_ENGINE_DATA, OPTION_ENGINE_NAME)
    options: dict[int, bytes] = {}
    while data:
        length = data[1] if len(data) > 1 else 0
        if not length or len(data) < 2 + length:
            raise StateError("an option of a sync entry is cut off")
        kind = data[0]
        # Options that everybody knows mean the same with and without the bit.
        bare = kind & ~OPTION_OPTIONAL
        kind = bare if bare in known else kind
        if kind in options:
            raise StateError(f"option {kind} of a sync entry comes twice")
        if kind not in known and not kind & OPTION_OPTIONAL:
            raise StateError(f"option {kind} of a sync entry is not known")
        options[kind] = data[2 : 2 + length]
        data = data[2 + length :]
    return options


def _sequences(data: bytes | None) -> tuple[Sequence, Sequence] | None:
    if data is None:
        return None
    if len(data) != SEQUENCES.size:
        raise StateError(f"sequences of {len(data)} bytes in a sync entry")
    numbers = SEQUENCES.unpack(data)
    return Sequence(*numbers[:3]), Sequence(*numbers[3:])


def _engine_name(data: bytes) -> str:
    name = data.rstrip(b"\0")
    if len(name) > ENGINE_NAME_MAX or not name.isascii():
        raise StateError("a sync entry names no persistence engine")
    return name.decode("ascii")


def _source(data: bytes | None, size: int) -> tuple[str, int] | None:
    if data is None:
        return None
    if len(data) != size + 2:
        raise StateError(f"a source of {len(data)} bytes in a sync entry")
    return from_wire(data[:size]), int.from_bytes(data[size:], "big")


def _decode_v0(data: bytes, syncid: int, count: int) -> SyncMessage:
    entries: list[SyncEntry] = []
    position = HEADER_V0.size
    while len(entries) < count and position + ENTRY_V0.size <= len(data):
        _, protocol, *ports, addresses, flags, state = ENTRY_V0.unpack_from(data, position)
        position += ENTRY_V0.size
        sequences = None
        if flags & SHIFTED:
            if position + SEQUENCES.size > len(data):
                break
            sequences = _sequences(data[position : position + SEQUENCES.size])
            position += SEQUENCES.size
        client, virtual, destination = zip(_addresses(addresses), ports, strict=True)
        entries.append(
            SyncEntry(protocol, flags, state, *client, *virtual, *destination, sequences=sequences)
        )
    return SyncMessage(syncid, tuple(entries), count - len(entries))


def _addresses(data: bytes) -> list[str]:
    """Of client, virtual service and destination."""
    size = len(data) // 3
    return [from_wire(data[start : start + size]) for start in (0, size, 2 * size)]


# -- writing -------------------------------------------------------------------------------------


@dataclass(slots=True)
class MessageBuilder:
    """Packs entries into messages of ``length_max`` bytes at most. ConfigError."""

    syncid: int
    length_max: int = MESSAGE_MAX
    version: Literal[0, 1] = 1
    _entries: list[bytes] = field(default_factory=list)
    _length: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.syncid <= 255:
            raise ConfigError(f"syncid {self.syncid} is not a number from 0 to 255")
        if not MESSAGE_MIN <= self.length_max <= LENGTH_MAX:
            raise ConfigError(
                f"sync messages of {self.length_max} bytes: {MESSAGE_MIN} to {LENGTH_MAX}"
            )
        if self.version not in (0, 1):
            raise ConfigError(f"sync protocol version {self.version} is neither 0 nor 1")

    def add(self, entry: SyncEntry) -> bytes | None:
        """Put an entry into the message; return the one before when it was full.

        ConfigError when an entry cannot be written in this version.
        """
        data = _pack(entry, self.version)
        room = self.length_max - self._header_size
        full = self._length + len(data) > room or len(self._entries) == ENTRIES_MAX
        message = self.flush() if full else None
        self._entries.append(data)
        self._length += _aligned(len(data))
        return message

    def flush(self) -> bytes | None:
        """The message so far; None when it is empty."""
        if not self._entries:
            return None
        *padded, last = self._entries
        body = b"".join(entry.ljust(_aligned(len(entry)), b"\0") for entry in padded) + last
        message = self._header(self._header_size + len(body)) + body
        self._entries.clear()
        self._length = 0
        return message

    @property
    def _header_size(self) -> int:
        return HEADER_V1.size if self.version else HEADER_V0.size

    def _header(self, length: int) -> bytes:
        count = len(self._entries)
        if self.version:
            return HEADER_V1.pack(0, self.syncid, length, count, 1, 0)
        return HEADER_V0.pack(count, self.syncid, length)


def encode(
    entries: Iterable[SyncEntry],
    syncid: int,
    *,
    length_max: int = MESSAGE_MAX,
    version: Literal[0, 1] = 1,
) -> Iterator[bytes]:
    """The messages that hold these entries. ConfigError when one cannot be written."""
    builder = MessageBuilder(syncid, length_max, version)
    for entry in entries:
        if message := builder.add(entry):
            yield message
    if message := builder.flush():
        yield message


def encode_request(syncid: int) -> bytes:
    """A message that asks for everything. Linux's IPVS finds nothing in it."""
    return HEADER_V1.pack(0, syncid, HEADER_V1.size, 0, 1, 0)


def _pack(entry: SyncEntry, version: int) -> bytes:
    try:
        return _pack_v1(entry) if version else _pack_v0(entry)
    except (struct.error, OSError, UnicodeEncodeError, OverflowError) as error:
        raise ConfigError(f"{entry} does not fit into a sync message: {error}") from None


def _pack_v1(entry: SyncEntry) -> bytes:
    addresses = _pack_addresses(entry)
    options = b"".join(
        bytes((kind, len(data))) + data for kind, data in _pack_options(entry, len(addresses) // 3)
    )
    return (
        ENTRY_V1.pack(
            IPV6 if ":" in entry.client else 0,
            entry.protocol,
            ENTRY_V1.size + len(addresses) + len(options),
            entry.flags,
            entry.state,
            entry.client_port,
            entry.virtual_port,
            entry.destination_port,
            entry.fwmark,
            entry.timeout,
        )
        + addresses
        + options
    )


def _pack_addresses(entry: SyncEntry) -> bytes:
    addresses = [to_wire(text) for text in (entry.client, entry.virtual, entry.destination)]
    if len({len(address) for address in addresses}) > 1:
        raise OverflowError("it has addresses of both IP families")
    return b"".join(addresses)


def _pack_options(entry: SyncEntry, size: int) -> Iterator[tuple[int, bytes]]:
    if entry.sequences is not None:
        yield OPTION_SEQUENCES, _pack_sequences(entry.sequences)
    name = entry.engine.encode("ascii")
    if len(entry.engine_data) > 255 or len(name) > ENGINE_NAME_MAX:
        raise OverflowError("too much data of a persistence engine")
    if entry.engine_data:
        yield OPTION_ENGINE_DATA, entry.engine_data
    if name:
        yield OPTION_ENGINE_NAME, name
    if entry.source is not None:
        address, port = entry.source
        source = to_wire(address)
        if len(source) != size:
            raise OverflowError("its source is of the other IP family")
        yield OPTION_SOURCE, source + struct.pack("!H", port)


def _pack_sequences(sequences: tuple[Sequence, Sequence]) -> bytes:
    return SEQUENCES.pack(*(n for s in sequences for n in (s.initial, s.delta, s.previous_delta)))


def _pack_v0(entry: SyncEntry) -> bytes:
    addresses = _pack_addresses(entry)
    if len(addresses) != 12:
        raise OverflowError("version 0 is for IPv4")
    data = ENTRY_V0.pack(
        0,
        entry.protocol,
        entry.client_port,
        entry.virtual_port,
        entry.destination_port,
        addresses,
        entry.flags & FLAGS_V0,
        entry.state,
    )
    return data + _pack_sequences(entry.sequences) if entry.sequences else data


# -- both ----------------------------------------------------------------------------------------


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _address_size(kind: int) -> int:
    return 16 if kind & IPV6 else 4

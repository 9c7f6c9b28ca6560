"""Capture files: read, written, and replayed through a dataplane.

The classic pcap format (draft-ietf-opsawg-pcap), both byte orders, micro- and nanoseconds.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from svcdp.dataplane import Dataplane
from svcdp.errors import ConfigError
from svcdp.types import Reason, Verdict

__all__ = ["Reader", "Record", "Replay", "Writer", "replay"]

#: Bytes of link-layer header before the IP packet, by link type
#: (https://www.tcpdump.org/linktypes.html), and where the EtherType is in them.
LINK_TYPES = {
    0: (4, None),  # NULL
    1: (14, 12),  # EN10MB
    101: (0, None),  # RAW
    113: (16, 14),  # LINUX_SLL
    228: (0, None),  # IPV4
    229: (0, None),  # IPV6
    276: (20, 0),  # LINUX_SLL2
}
RAW = 101
ETHERTYPES = (0x0800, 0x86DD)
VLAN_TAGS = (0x8100, 0x88A8)

MAGICS = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
PCAPNG = b"\x0a\x0d\x0d\x0a"

#: Nothing longer is read: libpcap's own bound (MAXIMUM_SNAPLEN).
RECORD_MAX = 262144


@dataclass(frozen=True, slots=True)
class Record:
    """One captured frame. ``offset`` is where its IP packet starts; None: it has none."""

    time: int  #: ns since 1970
    data: bytes
    offset: int | None
    length: int  #: on the wire


class Reader:
    """Iterates over the records of a capture. ConfigError when the file is none or is damaged."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        header = file.read(24)
        if header[:4] == PCAPNG:
            raise ConfigError("a pcapng file; convert it: `editcap -F pcap in.pcapng out.pcap`")
        if len(header) < 24 or header[:4] not in MAGICS:
            raise ConfigError("not a pcap file")
        self._order, self._tick = MAGICS[header[:4]]
        self.snapshot, network = struct.unpack(self._order + "II", header[16:])
        self.link_type = network & 0xFFFF
        if self.link_type not in LINK_TYPES:
            raise ConfigError(f"pcap link type {self.link_type} is not one of {sorted(LINK_TYPES)}")

    def __iter__(self) -> Iterator[Record]:
        number = 0
        while header := self._file.read(16):
            number += 1
            if len(header) < 16:
                raise ConfigError(f"pcap record {number}: its header is cut short")
            seconds, fraction, captured, length = struct.unpack(self._order + "IIII", header)
            if captured > RECORD_MAX:
                raise ConfigError(f"pcap record {number}: {captured} bytes are more than a packet")
            data = self._file.read(captured)
            if len(data) < captured:
                raise ConfigError(f"pcap record {number}: cut short")
            time = seconds * 10**9 + fraction * self._tick
            yield Record(time, data, self._ip_offset(data), length)

    def _ip_offset(self, data: bytes) -> int | None:
        size, type_at = LINK_TYPES[self.link_type]
        if type_at is not None:
            ethertype = int.from_bytes(data[type_at : type_at + 2], "big")
            while self.link_type == 1 and ethertype in VLAN_TAGS:
                ethertype = int.from_bytes(data[size + 2 : size + 4], "big")
                size += 4
            if ethertype not in ETHERTYPES:
                return None
        return size if size < len(data) else None


class Writer:
    """Writes a capture of one link type, with ns timestamps."""

    def __init__(self, file: BinaryIO, link_type: int = RAW) -> None:
        self._file = file
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, RECORD_MAX, link_type))

    def write(self, time: int, data: bytes, length: int | None = None) -> None:
        """A frame of this writer's link type; ``length`` as on the wire, if more."""
        seconds, fraction = divmod(time, 10**9)
        size = max(length or 0, len(data))
        self._file.write(struct.pack("<IIII", seconds & 0xFFFFFFFF, fraction, len(data), size))
        self._file.write(data)


@dataclass(slots=True)
class Replay:
    """What a replay did, by verdict and reason; ``not_ip`` frames were copied."""

    packets: Counter[tuple[Verdict, Reason]] = field(default_factory=Counter)
    not_ip: int = 0


def replay(dp: Dataplane, reader: Reader, writer: Writer | None = None) -> Replay:
    """Send the packets of a capture through a dataplane.

    Each packet's timestamp is the time it is processed at, so that a replay of one capture with
    one seed always gives the same bytes. Passed and forwarded packets are written, with their
    link-layer headers as they were, and so are the answers to rejected ones. Records must not go
    back in time by much: a connection's timer would.
    """
    done = Replay()
    for record in reader:
        if record.offset is None:
            done.not_ip += 1
            if writer is not None:
                writer.write(record.time, record.data, record.length)
            continue
        packet = bytearray(record.data[record.offset :])
        result = dp.process(packet, record.time)
        done.packets[result.verdict, result.reason] += 1
        if writer is not None and result.packet is not None:
            link = record.data[: record.offset]
            length = record.length if result.verdict is not Verdict.REJECT else None
            writer.write(record.time, link + bytes(result.packet), length)
    return done

"""Capture files: what scapy writes is read, what is written scapy reads, and damage is named."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import PcapReader, PcapWriter

from svcdp import ConfigError, Dataplane, Reason, Verdict
from svcdp.io.pcap import Reader, Writer, replay


def capture(packets, **options) -> io.BytesIO:
    class Kept(io.BytesIO):
        def close(self):
            pass

    file = Kept()
    writer = PcapWriter(file, **options)
    for number, packet in enumerate(packets):
        packet.time = 1000 + number
        writer.write(packet)
    writer.flush()
    file.seek(0)
    return file


SYN = IP(src="192.0.2.4", dst="10.96.0.10") / TCP(sport=1024, dport=80, flags="S")


@pytest.fixture
def dataplane() -> Dataplane:
    dp = Dataplane(seed=1)
    with dp.transaction() as tx:
        tx.service("10.96.0.10", 80).add("10.1.1.7", 8080)
        tx.service("10.96.0.11", 80)
    return dp


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_reads_what_scapy_writes(endianness, nano):
    file = capture([Ether() / SYN, Ether() / SYN], endianness=endianness, nano=nano)
    records = list(Reader(file))
    assert [record.time for record in records] == [1000 * 10**9, 1001 * 10**9]
    assert all(record.data[record.offset :] == bytes(SYN) for record in records)


def test_finds_the_packet_behind_vlan_tags():
    file = capture([Ether() / Dot1Q(vlan=5) / Dot1Q(vlan=6) / SYN])
    (record,) = Reader(file)
    assert record.data[record.offset :] == bytes(SYN)


def test_replay_rewrites_and_keeps_frames(dataplane):
    other = Ether(type=0x88CC) / Raw(b"lldp")
    unserved = Ether() / IP(src="192.0.2.4", dst="192.0.2.5") / UDP()
    refused = Ether() / IP(src="192.0.2.4", dst="10.96.0.11") / TCP(sport=1, dport=80)
    out = io.BytesIO()
    reader = Reader(capture([Ether() / SYN, other, unserved, refused]))
    done = replay(dataplane, reader, Writer(out, reader.link_type))
    assert done.not_ip == 1
    assert done.packets == {
        (Verdict.FORWARD, Reason.NEW): 1,
        (Verdict.PASS, Reason.NO_SERVICE): 1,
        (Verdict.REJECT, Reason.NO_DESTINATION): 1,
    }
    out.seek(0)
    forwarded, lldp, passed, answer = PcapReader(out)
    assert forwarded[IP].dst == "10.1.1.7"
    assert forwarded[TCP].dport == 8080
    assert forwarded.time == 1000
    assert bytes(lldp) == bytes(other)
    assert bytes(passed) == bytes(unserved)
    assert answer[TCP].flags == "RA"


def test_replay_is_repeatable():
    def bytes_of_replay() -> bytes:
        dp = Dataplane(seed=7)
        with dp.transaction() as tx:
            service = tx.service("10.96.0.10", 80, scheduler="random")
            for host in range(1, 20):
                service.add(f"10.1.1.{host}", 8080)
        packets = [
            IP(src="192.0.2.4", dst="10.96.0.10") / TCP(sport=port, dport=80) for port in range(100)
        ]
        out = io.BytesIO()
        reader = Reader(capture(packets, linktype=101))
        replay(dp, reader, Writer(out, reader.link_type))
        return out.getvalue()

    assert bytes_of_replay() == bytes_of_replay()


def header(link_type: int = 101) -> bytes:
    return struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, link_type)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a pcap file"),
        (b"\xd4\xc3\xb2\xa1", "not a pcap file"),
        (b"\x0a\x0d\x0d\x0a" + bytes(20), "pcapng"),
        (header(link_type=147), "link type 147"),
        (header() + bytes(7), "record 1: its header is cut short"),
        (header() + struct.pack("<IIII", 0, 0, 100, 100) + bytes(50), "record 1: cut short"),
        (header() + struct.pack("<IIII", 0, 0, 1 << 31, 100), "more than a packet"),
    ],
)
def test_damage_is_named(data, message):
    with pytest.raises(ConfigError, match=message):
        list(Reader(io.BytesIO(data)))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    for start in (b"", header(1), header(0), header(276)):
        try:
            for record in Reader(io.BytesIO(start + data)):
                assert record.offset is None or record.offset < len(record.data)
        except ConfigError:
            pass

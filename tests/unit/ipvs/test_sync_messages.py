"""The sync protocol: bytes of a kernel, bytes written by hand, and bytes that are wrong."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcdp.errors import ConfigError, StateError
from svcdp.ipvs.sync import (
    MessageBuilder,
    Sequence,
    SyncEntry,
    SyncMessage,
    decode,
    encode,
    encode_request,
)

INACTIVE, TEMPLATE, SEQUENCES = 0x100, 0x1000, 0x600

KERNEL = [
    bytes.fromhex("".join(line for line in part.splitlines() if not line.startswith("#")))
    for part in (Path(__file__).parent / "kernel_messages.txt").read_text().split("\n\n")[1:]
]

WEB = SyncEntry(
    protocol=6,
    flags=0,
    state=1,
    client="10.1.0.2",
    client_port=40001,
    virtual="10.9.0.1",
    virtual_port=80,
    destination="10.2.0.2",
    destination_port=8080,
    timeout=900,
)
WEB6 = replace(WEB, client="fd01::2", virtual="fd09::1", destination="fd02::2", client_port=40002)


def one(entry: str, count: int = 1) -> bytes:
    """A message of syncid 7 around entries in hexadecimal."""
    data = bytes.fromhex(entry)
    return bytes((0, 7)) + (8 + len(data)).to_bytes(2, "big") + bytes((count, 1, 0, 0)) + data


#: WEB, by the layout in ip_vs_sync.c: type, protocol, version and length, flags, state, ports,
#: mark, timeout, addresses.
WEB_BYTES = "00 06 0024 00000000 0001 9c41 0050 1f90 00000000 00000384 0a010002 0a090001 0a020002"
WEB6_BYTES = (
    "01 06 0048 00000000 0001 9c42 0050 1f90 00000000 00000384"
    " fd010000000000000000000000000002 fd090000000000000000000000000001"
    " fd020000000000000000000000000002"
)


@pytest.mark.parametrize(("entry", "data"), [(WEB, WEB_BYTES), (WEB6, WEB6_BYTES)])
def test_an_entry_byte_for_byte(entry: SyncEntry, data: str) -> None:
    assert decode(one(data)) == SyncMessage(7, (entry,))
    assert list(encode([entry], 7)) == [one(data)]


def test_options_byte_for_byte() -> None:
    entry = replace(
        WEB,
        sequences=(Sequence(1, 2, 3), Sequence(4, 5, 6)),
        engine="sip",
        engine_data=b"abc",
        source=("198.51.100.1", 1024),
    )
    data = (
        WEB_BYTES.replace("0024", "0050")
        + "01 18 00000001 00000002 00000003 00000004 00000005 00000006"
        + "02 03 616263  03 03 736970  44 06 c6336401 0400"
    )
    assert list(encode([entry], 7)) == [one(data)]
    assert decode(one(data)) == SyncMessage(7, (entry,))


def test_entries_begin_at_multiples_of_four() -> None:
    odd = replace(WEB, engine="sip")
    data = WEB_BYTES.replace("0024", "0029") + "03 03 736970"
    message = one(data + "000000" + WEB_BYTES, count=2)
    assert list(encode([odd, WEB], 7)) == [message]
    assert decode(message) == SyncMessage(7, (odd, WEB))


def test_version_0_byte_for_byte() -> None:
    entry = replace(WEB, timeout=0, flags=INACTIVE, state=5)
    shifted = replace(
        entry, flags=SEQUENCES, sequences=(Sequence(1, 2, 3), Sequence(4, 5, 0xFFFFFFFF))
    )
    data = bytes.fromhex(
        "02 07 004c"
        " 00 06 9c41 0050 1f90 0a010002 0a090001 0a020002 0100 0005"
        " 00 06 9c41 0050 1f90 0a010002 0a090001 0a020002 0600 0005"
        " 00000001 00000002 00000003 00000004 00000005 ffffffff"
    )
    assert list(encode([entry, shifted], 7, version=0)) == [data]
    assert decode(data) == SyncMessage(7, (entry, shifted))


def test_a_request_has_no_entries() -> None:
    assert encode_request(9) == bytes.fromhex("00 09 0008 00 01 0000")
    message = decode(encode_request(9))
    assert message == SyncMessage(9)
    assert message.is_request


# -- a kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", KERNEL)
def test_what_a_kernel_sends_is_read_and_written_alike(data: bytes) -> None:
    message = decode(data)
    assert (message.syncid, message.malformed, message.is_request) == (5, 0, False)
    version: Literal[0, 1] = 1 if data[0] == 0 else 0
    assert list(encode(message.entries, 5, version=version)) == [data]


def test_what_a_kernel_tells() -> None:
    entries = {entry for data in KERNEL[:3] for entry in decode(data).entries}
    assert {WEB, WEB6} <= entries
    assert replace(WEB, state=7, timeout=60, flags=INACTIVE) in entries
    template = SyncEntry(
        6, TEMPLATE | INACTIVE, 1, "10.1.0.2", 0, "10.9.0.1", 81, "10.2.0.2", 8080, timeout=600
    )
    assert template in entries
    call = SyncEntry(
        17,
        TEMPLATE | INACTIVE,
        1,
        "10.1.0.2",
        0,
        "10.9.0.1",
        5060,
        "10.2.0.2",
        5060,
        timeout=600,
        engine="sip",
        engine_data=b"abcdef123@host",
    )
    assert call in entries
    marked = SyncEntry(
        0, TEMPLATE | INACTIVE, 1, "10.1.0.2", 0, "0.0.0.7", 0, "10.2.0.2", 0, 7, timeout=500
    )
    assert marked in entries


# -- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
def test_messages_are_filled_up_to_their_bound(version: Literal[0, 1]) -> None:
    size, header = (24, 4) if version == 0 else (36, 8)
    entries = [replace(WEB, client_port=port, timeout=0) for port in range(1, 101)]
    messages = list(encode(entries, 1, length_max=600, version=version))
    fit = (600 - header) // size
    assert [len(decode(message).entries) for message in messages] == [
        *[fit] * (100 // fit),
        100 % fit,
    ]
    assert all(len(message) <= 600 for message in messages)
    assert [entry for message in messages for entry in decode(message).entries] == entries


def test_a_message_has_at_most_255_entries() -> None:
    entries = [replace(WEB, client_port=port) for port in range(300)]
    messages = list(encode(entries, 1, length_max=65507))
    assert [len(decode(message).entries) for message in messages] == [255, 45]


def test_a_builder_gives_what_is_full_and_what_is_left() -> None:
    builder = MessageBuilder(1, 512)
    assert builder.flush() is None
    full = [message for port in range(15) if (message := builder.add(WEB))]
    assert [len(decode(message).entries) for message in full] == [14]
    rest = builder.flush()
    assert rest is not None
    assert decode(rest).entries == (WEB,)
    assert builder.flush() is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"syncid": 256}, "syncid 256 is not a number from 0 to 255"),
        ({"syncid": 1, "length_max": 100}, "sync messages of 100 bytes: 512 to 65507"),
        ({"syncid": 1, "version": 2}, "sync protocol version 2 is neither 0 nor 1"),
    ],
)
def test_wrong_settings(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MessageBuilder(**arguments)


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({"client": "nobody"}, 1),
        ({"client": "fd01::2"}, 1),
        ({"source": ("fd01::2", 1)}, 1),
        ({"client_port": 65536}, 1),
        ({"flags": -1}, 1),
        ({"engine": "ü"}, 1),
        ({"engine": "x" * 16}, 1),
        ({"engine_data": bytes(256)}, 1),
        ({"virtual": "fd09::1"}, 0),
        ({"state": 1 << 16}, 0),
    ],
)
def test_entries_that_cannot_be_written(change: dict[str, object], version: Literal[0, 1]) -> None:
    with pytest.raises(ConfigError, match="does not fit into a sync message"):
        list(encode([replace(WEB, **change)], 1, version=version))
    with pytest.raises(ConfigError):
        list(encode([replace(WEB6)], 1, version=0))


# -- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "has no header"),
        (b"\0\1\0", "has no header"),
        (b"\0\1\0\5", "of 4 bytes says it has 5"),
        (one(WEB_BYTES) + b"\0", "of 45 bytes says it has 44"),
    ],
)
def test_what_is_no_message(data: bytes, text: str) -> None:
    with pytest.raises(StateError, match=text):
        decode(data)


@pytest.mark.parametrize(
    "entry",
    [
        WEB_BYTES.replace("00 06 0024", "02 06 0024"),  # a type that nobody knows
        WEB_BYTES.replace("0024", "1024"),  # a later version of entries
        WEB_BYTES.replace("0024", "0028") + "04 02 0000",  # an option that must be known
        WEB_BYTES.replace("0024", "0028") + "44 02 0000",  # a source without room for an address
        WEB_BYTES.replace("0024", "0028") + "03 ff 7369",  # an option that is cut off
        WEB_BYTES.replace("0024", "0028") + "03 00 0300",  # an option without data
        WEB_BYTES.replace("0024", "0028") + "01 02 0000",  # sequences that are too short
        WEB_BYTES.replace("0024", "002c") + "03 02 7369 03 02 7369",  # an option twice
        WEB_BYTES.replace("0024", "0028") + "03 02 ffff",  # a name that is none
        WEB_BYTES.replace("0024", "0036") + "03 10" + "41" * 16 + "0000",  # one that is too long
    ],
)
def test_a_bad_entry_spoils_no_other(entry: str) -> None:
    assert decode(one(WEB_BYTES + entry + WEB_BYTES, 3)) == SyncMessage(7, (WEB, WEB), 1)


@pytest.mark.parametrize("length", ["0000", "0023", "0049", "0fff"])
def test_an_entry_of_wrong_length_hides_those_behind_it(length: str) -> None:
    bad = WEB_BYTES.replace("0024", length)
    assert decode(one(WEB_BYTES + bad + WEB_BYTES, 3)) == SyncMessage(7, (WEB,), 2)


def test_entries_that_are_not_there_are_counted() -> None:
    assert decode(one(WEB_BYTES, 255)) == SyncMessage(7, (WEB,), 254)
    assert decode(bytes.fromhex("05 07 0004")) == SyncMessage(7, (), 5)


@pytest.mark.parametrize("data", KERNEL)
def test_damaged_messages_never_hurt(data: bytes) -> None:
    draw = random.Random(data)
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 5)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        if draw.random() < 0.3:
            del damaged[draw.randrange(len(damaged)) :]
        if draw.random() < 0.9:
            damaged[2:4] = len(damaged).to_bytes(2, "big")
        try:
            message = decode(bytes(damaged))
        except StateError:
            continue
        assert len(message.entries) + message.malformed in (damaged[0], *damaged[4:5])


# -- round trips ---------------------------------------------------------------------------------

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFFFFFF)
SEQUENCE = st.builds(Sequence, U32, U32, U32)


def entries(version: int) -> st.SearchStrategy[SyncEntry]:
    addresses = st.ip_addresses(v=version).map(str)
    return st.builds(
        SyncEntry,
        protocol=st.integers(0, 255),
        flags=U32,
        state=U16,
        client=addresses,
        client_port=U16,
        virtual=addresses,
        virtual_port=U16,
        destination=addresses,
        destination_port=U16,
        fwmark=U32,
        timeout=U32,
        sequences=st.none() | st.tuples(SEQUENCE, SEQUENCE),
        engine=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=15),
        engine_data=st.binary(max_size=255),
        source=st.none() | st.tuples(addresses, U16),
    )


@given(
    st.lists(entries(4) | entries(6), min_size=1, max_size=40),
    st.integers(0, 255),
    st.integers(512, 3000),
)
def test_any_entries_survive(sent: list[SyncEntry], syncid: int, length_max: int) -> None:
    messages = [decode(data) for data in encode(sent, syncid, length_max=length_max)]
    assert [entry for message in messages for entry in message.entries] == sent
    assert {(message.syncid, message.malformed) for message in messages} == {(syncid, 0)}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_none(data: bytes) -> None:
    for candidate in (data, bytes(2) + (len(data) + 4).to_bytes(2, "big") + data):
        with contextlib.suppress(StateError):
            decode(candidate)

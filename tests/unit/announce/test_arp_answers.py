"""ARP for addresses that no interface has; scapy makes and reads the frames."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Dot1Q, Ether

from svcdp.announce import arp

MAC, HOST = "02:00:00:00:00:01", "02:00:00:00:00:0a"
PACKED = bytes.fromhex(MAC.replace(":", ""))
OURS, THEIRS = "192.0.2.100", "192.0.2.10"
OWNED = frozenset({bytes((192, 0, 2, 100))})


def request(**fields: Any) -> ARP:
    return ARP(**{"op": "who-has", "hwsrc": HOST, "psrc": THEIRS, "pdst": OURS, **fields})


def asked(layer: ARP, to: str = "ff:ff:ff:ff:ff:ff") -> bytes:
    return bytes(Ether(src=HOST, dst=to) / layer)


@pytest.mark.parametrize("to", ["ff:ff:ff:ff:ff:ff", MAC], ids=["broadcast", "unicast"])
@pytest.mark.parametrize("source", [THEIRS, "0.0.0.0"], ids=["question", "probe"])
def test_who_asks_is_told(source: str, to: str) -> None:
    reply = arp.answer(asked(request(psrc=source), to), OWNED, PACKED)
    assert reply is not None
    frame = Ether(reply)
    assert (frame.src, frame.dst, frame.type) == (MAC, HOST, 0x0806)
    found = frame[ARP]
    assert (found.op, found.hwtype, found.ptype, found.hwlen, found.plen) == (2, 1, 0x0800, 6, 4)
    assert (found.hwsrc, found.psrc, found.hwdst, found.pdst) == (MAC, OURS, HOST, source)


def test_padding_changes_nothing() -> None:
    frame = asked(request())
    assert arp.answer(frame + bytes(18), OWNED, PACKED) == arp.answer(frame, OWNED, PACKED)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(asked(request(pdst=THEIRS)), id="another address"),
        pytest.param(asked(ARP(op="is-at", pdst=OURS, psrc=THEIRS, hwsrc=HOST)), id="a reply"),
        pytest.param(asked(request(psrc=OURS)), id="announced by another"),
        pytest.param(asked(request(hwtype=6)), id="not Ethernet"),
        pytest.param(asked(request(ptype=0x86DD)), id="not IPv4"),
        pytest.param(asked(request(hwsrc="ff:ff:ff:ff:ff:ff")), id="from everybody"),
        pytest.param(asked(request(hwsrc="01:00:5e:00:00:01")), id="from a group"),
        pytest.param(asked(request(hwsrc="00:00:00:00:00:00")), id="from nobody"),
        pytest.param(bytes(Ether(src=HOST) / Dot1Q(vlan=5) / request()), id="of another VLAN"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_nothing_else_is_answered(frame: bytes) -> None:
    assert arp.answer(frame, OWNED, PACKED) is None


def test_what_is_cut_short_is_not_answered() -> None:
    frame = asked(request())
    assert {arp.answer(frame[:length], OWNED, PACKED) for length in range(len(frame))} == {None}


def test_an_announcement_is_a_request_for_the_own_address() -> None:
    frame = Ether(arp.announcement(bytes((192, 0, 2, 100)), PACKED))
    assert (frame.src, frame.dst) == (MAC, "ff:ff:ff:ff:ff:ff")
    found = frame[ARP]
    assert (found.op, found.hwsrc, found.psrc, found.pdst) == (1, MAC, OURS, OURS)
    assert found.hwdst == "00:00:00:00:00:00"


@given(st.binary(max_size=80), st.dictionaries(st.integers(0, 41), st.integers(0, 255)))
def test_whatever_comes_is_borne(noise: bytes, changes: dict[int, int]) -> None:
    """Noise, and a good request with some bytes that are not."""
    assert arp.answer(noise, OWNED, PACKED) is None or len(noise) >= 42
    frame = bytearray(asked(request()))
    for place, value in changes.items():
        frame[place] = value
    reply = arp.answer(bytes(frame), OWNED, PACKED)
    if reply is not None:
        assert len(reply) == 42
        assert Ether(reply)[ARP].psrc == OURS
        assert not reply[0] & 1

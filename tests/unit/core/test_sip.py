"""The Call-ID of SIP messages."""

from __future__ import annotations

import re

import inlines
import pytest
import wire
from hypothesis import given
from hypothesis import strategies as st

core = inlines.load()

REQUEST = (
    b"INVITE sip:bob@example.org SIP/2.0\r\n"
    b"Via: SIP/2.0/UDP 192.0.2.4;branch=z9hG4bK776asdhds\r\n"
    b"Max-Forwards: 70\r\n"
    b"%s\r\n"
    b"CSeq: 314159 INVITE\r\n"
    b"Content-Length: 0\r\n"
    b"\r\n"
)
#: RFC 3261, 25.1.
WORD = b"[0-9A-Za-z\\-.!%*_+`'~()<>:\\\\\"/\\[\\]?{}]+"


@pytest.mark.parametrize(
    "header",
    [
        b"Call-ID: %s",
        b"call-id: %s",
        b"CALL-ID:%s",
        b"Call-ID \t :\t  %s \t",
        b"i: %s",
        b"I:%s",
        b"Call-ID:\r\n %s",
        b"Call-ID: \n\t %s",
        b"i:\r %s",
        b"Call-ID: %s\r\nCall-ID: other",
        b"Call-Info: x\r\ni-what: y\r\nIdentity: z\r\nCall-ID: %s",
        b"Subject: a\r\n Call-ID: folded\r\nCall-ID: %s",
    ],
)
@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"])
def test_where_it_is(header: bytes, end: bytes) -> None:
    for value in (b"a84b4c76e66710@pc33.example.com", b"x", b"f81d4fae-7dec-11d0@[::1]:5060"):
        message = (REQUEST % header % value).replace(b"\r\n", end)
        assert core.sip(message) == value


@pytest.mark.parametrize(
    "header",
    [
        b"X: y",
        b"Call-ID:",
        b"Call-ID: ",
        b"Call-ID abc",
        b"Call-IDs: abc",
        b"XCall-ID: abc",
        b" Call-ID: abc",
        b"ii: abc",
        b"call\rid: abc",
        b"Call-ID: abc@",
        b"Call-ID: @abc",
        b"Call-ID: abc def",
        b"Call-ID: abc@def@ghi",
        b"Call-ID: abc\x00",
        b"Call-ID: \xff",
        b"\r\nCall-ID: in-the-body",
    ],
)
def test_where_there_is_none(header: bytes) -> None:
    assert core.sip(REQUEST % header) is None


def test_the_first_line_is_no_header() -> None:
    assert core.sip(b"Call-ID: abc\r\n\r\n") is None


def test_lengths() -> None:
    for length in (1, 254, 255):
        assert core.sip(REQUEST % (b"i: " + b"x" * length)) == b"x" * length
    assert core.sip(REQUEST % (b"i: " + b"x" * 256)) is None
    assert core.sip(REQUEST % (b"i: " + b"x" * 200 + b"@" + b"y" * 55)) is None


def test_every_prefix() -> None:
    """Found only when the line is all there, however short the datagram was cut."""
    message = REQUEST % b"Call-ID: abc@def"
    whole = message.index(b"def") + 4
    for length in range(len(message) + 1):
        assert core.sip(message[:length]) == (b"abc@def" if length >= whole else None)


@given(
    before=st.lists(st.sampled_from([b"Via: x", b"i", b"Call-ID", b" :", b"\t"])),
    name=st.sampled_from([b"Call-ID", b"cAlL-iD", b"i"]),
    value=st.from_regex(WORD + b"(@" + WORD + b")?", fullmatch=True),
)
def test_any_valid_one(before: list[bytes], name: bytes, value: bytes) -> None:
    message = b"\r\n".join([b"BYE sip:a SIP/2.0", *before, name + b": " + value, b"", b""])
    assert core.sip(message) == (value if len(value) <= 255 else None)


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"@", b"i", b"Call-ID", b"abc"]
            ),
            st.binary(max_size=3),
        ),
        max_size=30,
    )
)
def test_any_text(parts: list[bytes]) -> None:
    text = b"".join(parts)
    found = core.sip(text)
    if found is not None:
        assert re.fullmatch(WORD + b"(@" + WORD + b")?", found)
        pattern = rb"(?i)[\r\n](call-id|i)[ \t]*:\s*" + re.escape(found) + rb"[ \t]*[\r\n]"
        assert re.search(pattern, text)


def test_in_datagrams() -> None:
    text = REQUEST % b"Call-ID: abc"
    for source, target in (("192.0.2.4", "10.96.0.1"), ("2001:db8::4", "fd96::1")):
        packet = bytes(wire.packet("udp", source, 5060, target, 5060, payload=text))
        assert core.key_of(packet) == b"abc"
        assert core.key_of(packet + bytes(9)) == b"abc"
        assert core.key_of(packet, 0) is None
        assert core.key_of(bytes(wire.packet("udp", source, 5060, target, 5060))) is None
        assert core.key_of(bytes(wire.icmp_error(packet, target))) is None
    assert core.key_of(bytes(wire.packet("tcp", source, 5060, target, 5060))) is None


def test_the_datagram_ends_where_udp_says() -> None:
    text = REQUEST % b"Call-ID: abc"
    packet = wire.packet("udp", "192.0.2.4", 5060, "10.96.0.1", 5060, payload=text)
    for length in range(8, 8 + len(text)):
        packet[24:26] = length.to_bytes(2, "big")
        assert core.key_of(bytes(packet)) == core.sip(text[: length - 8])

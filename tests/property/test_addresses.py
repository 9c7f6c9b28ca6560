"""Addresses as `ipaddress` has them, though it is not asked."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from svcdp.errors import ManifestError
from svcdp.kube import model
from svcdp.records import Address, parse_address

V6 = st.lists(st.sampled_from((0, 0, 1, 0xFFFF, 0x0DB8, 0xFF02)), min_size=8, max_size=8)
TEXTS = st.one_of(
    st.ip_addresses().map(str),
    V6.map(lambda words: ":".join(f"{word:04X}" for word in words)),
    V6.map(lambda words: ":".join(f"{word:x}" for word in words).replace("0:0:0", ":", 1)),
    st.text("0123456789abcdefF.:%/ \0é", max_size=20),
    st.sampled_from(
        ("::ffff:192.0.2.1", "::192.0.2.1", "fe80::1%eth0", "010.0.0.1", "1.2.3", "::")
    ),
)


def judged(text: str) -> Address | None:
    with suppress(ValueError):
        address = ipaddress.ip_address(text)
        if "%" not in text:
            return Address(str(address), address.packed, address.version)
    return None


@given(TEXTS)
def test_of_the_dataplane(text: str) -> None:
    found = None
    with suppress(ValueError):
        found = parse_address(text)
    assert found == judged(text)


@given(TEXTS)
def test_of_manifests(text: str) -> None:
    found = None
    with suppress(ManifestError):
        found = model.parse_address(text)
    known = judged(text)
    if known is None:
        return  # Go reads some that ipaddress refuses
    address = ipaddress.ip_address(known.packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    one_host = not (address.is_multicast or address.is_unspecified)
    assert found == (str(address) if one_host else None)

"""Packets in fragments that come in, and fragments that must be made."""

from __future__ import annotations

import pytest
from packets import from_client, from_server, init, padded, syn, udp
from scapy.layers.inet import fragment
from scapy.layers.inet6 import IPv6ExtHdrFragment, fragment6
from scapy.packet import Packet
from scenario import Scenario
from services import METHODS, serve

SIZES = {4: 600, 6: 1280}


def pieces(packet: Packet) -> list[bytes]:
    packet = packet.__class__(bytes(packet))
    if packet.version == 4:
        return [bytes(piece) for piece in fragment(packet, SIZES[4])]
    head, body = packet.copy(), packet.payload
    head.remove_payload()
    extended = head / IPv6ExtHdrFragment(id=77) / body
    return [bytes(piece) for piece in fragment6(extended, SIZES[6])]


def long(method: str) -> Scenario:
    """Longer than the way to the server takes, and DF is not set."""
    scenario = serve(Scenario(f"v4-{method}-long", mtu={"s1": 1300}), 4, method)
    for port, size in enumerate((1301, 1400, 1500), 2000):
        scenario.send(bytes(padded(from_client(4, udp(port)), size)))
    return scenario.connections()


def cut(family: int, method: str) -> Scenario:
    """Requests and replies that come in pieces."""
    scenario = serve(Scenario(f"v{family}-{method}-cut"), family, method)
    port = METHODS[method][1]
    for number, size in enumerate((1201, 1500, 2900, 4000), 2000):
        if size <= SIZES[family]:
            continue
        # SCTP's checksum is of all pieces: with masq they go on only if no port changes.
        for body in (udp(number), syn(number), *([init(number)] if method != "masq" else [])):
            request = from_client(family, body, id=number)
            scenario.send_pieces(*pieces(padded(request, size)))
        if method != "dr":
            answer = from_server(family, udp(port, number), id=number)
            scenario.send_pieces(*pieces(padded(answer, size)), side="s1")
    return scenario.connections()


#: GUE's checksum covers a port that everyone draws, and is not read from fragments.
SCENARIOS = [
    *(long(method) for method in METHODS if method != "gue-csum"),
    *(cut(family, method) for family in (4, 6) for method in ("masq", "masq-same-port", "dr")),
]


@pytest.mark.usefixtures("agree")
def test_fragments(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""

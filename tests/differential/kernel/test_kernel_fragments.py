"""Packets in fragments that come in, and fragments that must be made."""

from __future__ import annotations

import pytest
from packets import (
    PIECE,
    from_client,
    from_server,
    header,
    icmp_errors,
    init,
    padded,
    pieces,
    syn,
    udp,
)
from replay import routed
from scenario import Result, Scenario, whole
from services import METHODS, serve
from topology import CLIENT, VIRTUAL, server


def long(method: str) -> Scenario:
    """Longer than the way to the server takes, and DF is not set."""
    scenario = serve(Scenario(f"v4-{method}-long", mtu={"s1": 1300}), 4, method)
    for port, size in enumerate((1301, 1400, 1500), 2000):
        scenario.send(bytes(padded(from_client(4, udp(port)), size)))
    return scenario.connections()


def cut(family: int, method: str, outer: int | None = None) -> Scenario:
    """Requests and replies that come in pieces, in any order."""
    name = f"v{family}-{method}-cut" + (f"-in-v{outer}" if outer else "")
    scenario = serve(Scenario(name), family, method, outer)
    port = METHODS[method][1]
    for number, size in enumerate((1201, 1500, 2900, 4000), 2000):
        if size <= PIECE[family]:
            continue
        # SCTP's checksum is of all pieces: with masq they go on only if no port changes.
        for body in (udp(number), syn(number), *([init(number)] if method != "masq" else [])):
            request = from_client(family, body, id=number)
            scenario.send_pieces(*pieces(padded(request, size)))
        if method.startswith("masq"):
            answer = from_server(family, udp(port, number), id=number)
            scenario.send_pieces(*pieces(padded(answer, size)), side="s1")
    scenario.connections()
    disordered(scenario, family)
    overtaken(scenario, family, method)
    return scenario


def disordered(scenario: Scenario, family: int) -> None:
    """Pieces that come in another order, twice, or with those of another packet between them."""
    one, two = (
        pieces(padded(from_client(family, udp(port), id=port), 4000)) for port in (3000, 3001)
    )
    first, *others = one
    scenario.send_pieces(first, *reversed(others))
    scenario.send_pieces(first, others[0], *others)
    scenario.send_pieces(*(piece for pair in zip(one, two, strict=True) for piece in pair))


def overtaken(scenario: Scenario, family: int, method: str) -> None:
    """The first piece comes last."""
    request = padded(from_client(family, udp(3002), id=3002), 2 * PIECE[family] - 100)
    first, last = pieces(request)
    scenario.send_pieces(last, first)
    if method.startswith("masq"):
        request.dst, request.payload.dport = server(1, family), METHODS[method][1]
    sent = routed(pieces(request)[0])
    ours = [["host", last[40 * (family == 6) :].hex()], ["s1", sent.hex()]]
    scenario.differs(ours, "what overtakes the first fragment passes: nobody waits for it")


def torn_error(family: int) -> Scenario:
    """An ICMP error of the client that is so long that it comes in pieces."""
    scenario = serve(Scenario(f"v{family}-torn-error"), family, "masq")
    request = from_client(family, udp(3000))
    reply = header(family, VIRTUAL[family], CLIENT[family]) / udp(80, 3000)
    quoted = bytes(padded(reply, 2 * PIECE[family] - 200))
    error, *_ = icmp_errors(CLIENT[family], reply, quoted)
    torn = pieces(error)
    scenario.send(bytes(request)).send_pieces(*torn)
    ours = [["host", piece[40 * (family == 6) :].hex()] for piece in torn]
    return scenario.differs(ours, "none is so long (RFC 1812, 4.3.2.3; RFC 4443, 2.4): it passes")


#: GUE's checksum covers a port that everyone draws, and is not read from fragments.
SCENARIOS = [
    *(long(method) for method in METHODS if method != "gue-csum"),
    *(cut(family, method) for family in (4, 6) for method in METHODS if "csum" not in method),
    *(cut(family, "ipip", 10 - family) for family in (4, 6)),
    *(torn_error(family) for family in (4, 6)),
]


@pytest.mark.usefixtures("agree")
def test_fragments(scenario: Scenario, verdicts: dict[str, Result]) -> None:
    """`agree` compares; and the kernel took them for fragments of what it is to forward."""
    for step, (_, came) in zip(scenario.steps, verdicts[scenario.name], strict=True):
        assert step[0] != "pieces" or {side for side, _ in whole(came)} in ({"s1"}, {"c"})

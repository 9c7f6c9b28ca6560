"""What fits the way and what does not: masq in both directions."""

from __future__ import annotations

from itertools import product

import pytest
from packets import from_client, from_server, padded, syn, udp
from scapy.layers.inet import IPOption_NOP, IPOption_Router_Alert
from scapy.packet import Packet
from scenario import Scenario
from services import METHODS, serve

#: Bytes that a link of the server takes; IPv6 needs at least 1280. The client's takes them all.
NARROW = {4: (1301, 1400), 6: (1280, 1400)}
WIDE = 9000


def around(mtu: int) -> list[int]:
    """Sizes next to what fits, and to what fits twice, with the shortest of headers."""
    return [mtu - 1, mtu, mtu + 1, mtu + 8, 2 * mtu - 20, 2 * mtu, 3 * mtu]


def packets(family: int, mtu: int) -> list[Packet]:
    """Requests of every size, with DF and without."""
    made = []
    flags = (False, True) if family == 4 else (False,)
    for number, (size, df, body) in enumerate(product(around(mtu), flags, (syn, udp)), 1):
        made.append(padded(from_client(family, body(2000 + number), df=df), size))
    return made


def requests(family: int, mtu: int, method: str) -> Scenario:
    scenario = Scenario(f"v{family}-{method}-{mtu}", mtu={"c": WIDE, "s1": mtu})
    serve(scenario, family, method)
    scenario.send(*map(bytes, packets(family, mtu)))
    if family == 4:
        # In fragments the kernel has NOPs where options were that are not theirs (RFC 791, 3.1).
        options = [IPOption_Router_Alert(), IPOption_NOP()]
        for size in (mtu, mtu + 1):
            request = from_client(4, udp(3000), df=True, options=options)
            scenario.send(bytes(padded(request, size)))
    return scenario.connections()


def replies(family: int, mtu: int) -> Scenario:
    """The client's link is the narrow one. What must not be fragmented, its router refuses: that
    is not IPVS (but see tests/netns/test_path_mtu.py).
    """
    scenario = Scenario(f"v{family}-replies-{mtu}", mtu={"c": mtu, "s1": WIDE})
    serve(scenario, family, "masq")
    port = METHODS["masq"][1]
    opening = [from_client(family, syn(2000)), from_client(family, udp(2001))]
    scenario.send(*map(bytes, opening))
    for ttl in (255, 2):
        for body in (syn(port, 2000, "SA"), udp(port, 2001)):
            scenario.send(bytes(from_server(family, body, ttl=ttl)), side="s1")
    for size in around(mtu):
        if family == 4 or size <= mtu:
            for body in (syn(port, 2000, "A"), udp(port, 2001)):
                scenario.send(bytes(padded(from_server(family, body), size)), side="s1")
    return scenario.connections()


SCENARIOS = [
    *(requests(family, mtu, "masq") for family in (4, 6) for mtu in NARROW[family]),
    *(requests(family, 1400, "dr") for family in (4, 6)),
    *(replies(family, mtu) for family in (4, 6) for mtu in NARROW[family]),
]


@pytest.mark.usefixtures("agree")
def test_sizes(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""

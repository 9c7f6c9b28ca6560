"""FTP: addresses in control connections, and the data connections that they announce."""

from __future__ import annotations

import pytest
from packets import header
from scapy.layers.inet import TCP
from scapy.packet import Raw
from scenario import Scenario
from services import shown
from topology import CLIENT, VIRTUAL, server

PORT = 40000


class Session:
    """A control connection, with sequence numbers as its ends count them."""

    def __init__(self, name: str, family: int = 4) -> None:
        self.scenario = Scenario(name)
        self.family = family
        service = f"-t {shown(VIRTUAL[family], 21)}"
        real = shown(server(1, family), 21)
        self.scenario.ipvs(f"-A {service} -s rr", f"-a {service} -r {real} -m")
        self._sent = {"c": 1000, "s1": 5000}
        self._segment("c", "S")
        self._segment("s1", "SA")
        self._segment("c", "A")

    def _segment(self, side: str, flags: str, text: str = "") -> None:
        other = {"c": "s1", "s1": "c"}[side]
        ports = (PORT, 21) if side == "c" else (21, PORT)
        client, virtual = CLIENT[self.family], VIRTUAL[self.family]
        ends = (client, virtual) if side == "c" else (server(1, self.family), client)
        tcp = TCP(
            sport=ports[0], dport=ports[1], flags=flags, seq=self._sent[side], ack=self._sent[other]
        )
        self.scenario.send(bytes(header(self.family, *ends) / tcp / Raw(text.encode())), side=side)
        self._sent[side] += len(text) + ("S" in flags)

    def client(self, text: str) -> None:
        self._segment("c", "PA", f"{text}\r\n")

    def server(self, text: str) -> None:
        self._segment("s1", "PA", f"{text}\r\n")


def comma(address: str, port: int) -> str:
    """As PORT and the answer to PASV write it (RFC 959)."""
    return ",".join([*address.split("."), str(port >> 8), str(port & 255)])


def opened(session: Session, side: str, source: tuple[str, int], target: tuple[str, int]) -> None:
    """A data connection begins."""
    syn = TCP(sport=source[1], dport=target[1], flags="S", seq=1)
    session.scenario.send(
        bytes(header(session.family, source[0], target[0]) / syn), side=side
    ).connections()


def passive(answer: str, command: str, port: int, family: int = 4) -> Scenario:
    """The client opens the data connection, to where the server said."""
    session = Session(f"ftp-v{family}-{command}-{port}", family)
    session.server("220 ready")
    session.client(command)
    session.server(answer)
    session.scenario.connections()
    opened(session, "c", (CLIENT[family], 41000), (VIRTUAL[family], port))
    session.server("150 here it comes")  # after a line of another length
    session.client("QUIT")
    return session.scenario.connections()


def active(command: str, family: int = 4) -> Scenario:
    """The server opens the data connection, from port 20."""
    session = Session(f"ftp-v{family}-{command.split()[0]}", family)
    session.client(command)
    session.server("200 PORT command successful")
    session.scenario.connections()
    opened(session, "s1", (server(1, family), 20), (CLIENT[family], 41000))
    return session.scenario


SCENARIOS = [
    passive(f"227 Entering Passive Mode ({comma(server(1), 30000)}).", "PASV", 30000),
    passive("229 Entering Extended Passive Mode (|||30001|)", "EPSV", 30001),
    active(f"PORT {comma(CLIENT[4], 41000)}"),
    active(f"EPRT |1|{CLIENT[4]}|41000|"),
    passive("229 Entering Extended Passive Mode (|||30001|)", "EPSV", 30001, 6),
    active(f"EPRT |2|{CLIENT[6]}|41000|", 6),
]


@pytest.mark.usefixtures("agree")
def test_ftp(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""

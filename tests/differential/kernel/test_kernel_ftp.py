"""FTP: addresses in control connections, and the data connections that they announce."""

from __future__ import annotations

import pytest
from packets import header
from scapy.layers.inet import TCP
from scapy.packet import Raw
from scenario import Scenario
from topology import CLIENT, VIRTUAL, server

PORT = 40000
SERVICE = f"-t {VIRTUAL[4]}:21"


class Session:
    """A control connection, with sequence numbers as its ends count them."""

    def __init__(self, name: str) -> None:
        self.scenario = Scenario(name)
        self.scenario.ipvs(f"-A {SERVICE} -s rr", f"-a {SERVICE} -r {server(1)}:21 -m")
        self._sent = {"c": 1000, "s1": 5000}
        self._segment("c", "S")
        self._segment("s1", "SA")
        self._segment("c", "A")

    def _segment(self, side: str, flags: str, text: str = "") -> None:
        other = {"c": "s1", "s1": "c"}[side]
        ports = (PORT, 21) if side == "c" else (21, PORT)
        ends = (CLIENT[4], VIRTUAL[4]) if side == "c" else (server(1), CLIENT[4])
        tcp = TCP(
            sport=ports[0], dport=ports[1], flags=flags, seq=self._sent[side], ack=self._sent[other]
        )
        self.scenario.send(bytes(header(4, *ends) / tcp / Raw(text.encode())), side=side)
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
    session.scenario.send(bytes(header(4, source[0], target[0]) / syn), side=side).connections()


def passive(answer: str, command: str, port: int) -> Scenario:
    """The client opens the data connection, to where the server said."""
    session = Session(f"ftp-{command}-{port}")
    session.server("220 ready")
    session.client(command)
    session.server(answer)
    session.scenario.connections()
    opened(session, "c", (CLIENT[4], 41000), (VIRTUAL[4], port))
    session.server("150 here it comes")  # after a line of another length
    session.client("QUIT")
    return session.scenario.connections()


def active(command: str) -> Scenario:
    """The server opens the data connection, from port 20."""
    session = Session(f"ftp-{command.split()[0]}")
    session.client(command)
    session.server("200 PORT command successful")
    session.scenario.connections()
    opened(session, "s1", (server(1), 20), (CLIENT[4], 41000))
    return session.scenario


SCENARIOS = [
    passive(f"227 Entering Passive Mode ({comma(server(1), 30000)}).", "PASV", 30000),
    passive("229 Entering Extended Passive Mode (|||30001|)", "EPSV", 30001),
    active(f"PORT {comma(CLIENT[4], 41000)}"),
    active(f"EPRT |1|{CLIENT[4]}|41000|"),
]


@pytest.mark.usefixtures("agree")
def test_ftp(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""

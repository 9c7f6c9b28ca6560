"""The FTP helper: what both ends read, how their segments are numbered, and data connections."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import wire
from scenario import Scenario
from services import shown
from topology import CLIENT, VIRTUAL, server

WINDOW = 5000
DATA = 5001
#: A server's first bytes; the client's are 0.
GREETING = b"220 ready\r\n"


class Session:
    """An FTP session, as its two ends see it, with the numbers that each of them gives."""

    def __init__(self, name: str) -> None:
        self.client, self.virtual, self.server = (
            (CLIENT[4], 40000),
            (VIRTUAL[4], 21),
            (server(1), 21),
        )
        self.scenario = Scenario(f"ftp-{name}")
        name = f"-t {shown(*self.virtual)}"
        self.scenario.ipvs(f"-A {name} -s rr", f"-a {name} -r {shown(*self.server)} -m")
        #: next byte of client and server, and how much longer the server's text has become
        self.said, self.told, self.grown = 1000, 5000, 0
        self.from_client(b"", "S", acknowledged=0)
        self.said += 1
        self.from_server(b"", "SA")
        self.told += 1
        self.from_client(b"", "A")
        self.from_server(GREETING)

    def from_client(self, text: bytes, flags: str = "PA", **fields: Any) -> None:
        fields = {"number": self.said, "acknowledged": self.told + self.grown} | fields
        self.scenario.send(segment(self.client, self.virtual, flags, text, **fields))
        self.said += len(text)

    def from_server(self, text: bytes, flags: str = "PA", grows: int = 0, **fields: Any) -> None:
        fields = {"number": self.told, "acknowledged": self.said} | fields
        self.scenario.send(segment(self.server, self.client, flags, text, **fields), side="s1")
        self.told += len(text)
        self.grown += grows

    def passive_data(self, port: int = DATA, client_port: int = 40001) -> None:
        """A data connection that the client opens."""
        here, there = (self.client[0], client_port), (self.server[0], port)
        virtual = (self.virtual[0], port)
        self.scenario.send(segment(here, virtual, "S", number=1))
        self.scenario.send(segment(there, here, "SA", number=1, acknowledged=2), side="s1")
        self.scenario.send(segment(here, virtual, "A", number=2, acknowledged=2))


def segment(
    source: tuple[str, int],
    target: tuple[str, int],
    flags: str,
    text: bytes = b"",
    number: int = 0,
    acknowledged: int = 0,
    options: bytes = b"",
) -> bytes:
    bits = sum(wire.FLAGS[flag] for flag in flags)
    length = (20 + len(options)) // 4 << 4
    ports = struct.pack("!HHII", source[1], target[1], number, acknowledged)
    header = ports + struct.pack("!BBHHH", length, bits, WINDOW, 0, 0)
    return bytes(wire.ip(source[0], target[0], wire.TCP, header + options + text))


def host_port(address: str, port: int) -> bytes:
    return f"{address.replace('.', ',')},{port >> 8},{port & 255}".encode()


def grows_by(session: Session) -> int:
    return len(session.virtual[0]) - len(session.server[0])


def passive(text: bytes) -> Scenario:
    session = Session(f"passive-{text[4:11].decode().strip()}")
    session.from_client(b"PASV\r\n")
    session.from_server(text % host_port(session.server[0], DATA), grows=grows_by(session))
    session.from_client(b"", "A")
    session.scenario.connections()
    session.passive_data()
    session.from_client(b"LIST\r\n")
    session.from_server(b"150 here\r\n")
    session.from_server(b"226 done\r\n", number=session.told)
    session.from_client(b"QUIT\r\n")
    return session.scenario.connections()


def extended_passive() -> Scenario:
    session = Session("extended-passive")
    session.from_client(b"EPSV\r\n")
    session.from_server(f"229 Extended (|||{DATA}|)\r\n".encode())
    session.from_client(b"", "A")
    session.scenario.connections()
    session.passive_data()
    return session.scenario.connections()


def active() -> Scenario:
    session = Session("active")
    session.from_client(b"PORT %s\r\n" % host_port(session.client[0], 40001))
    session.from_server(b"200 ok\r\n")
    session.scenario.connections()
    client, real, virtual = (CLIENT[4], 40001), (session.server[0], 20), (VIRTUAL[4], 20)
    session.scenario.send(segment(real, client, "S", number=1), side="s1")
    session.scenario.send(segment(client, virtual, "SA", number=1, acknowledged=2))
    session.scenario.send(segment(real, client, "A", number=2, acknowledged=2), side="s1")
    return session.scenario.connections()


def repeated() -> Scenario:
    """Replies that were lost and are sent again, and several of them."""
    session = Session("repeated")
    text = b"227 Entering (%s).\r\n" % host_port(session.server[0], DATA)
    for _ in range(3):
        session.from_client(b"PASV\r\n")
        session.from_server(text, grows=grows_by(session))
        session.from_client(b"", "A")
        session.from_server(b"200 fine\r\n")
        session.from_client(b"", "A")
    return session.scenario.connections()


def unasked() -> Scenario:
    session = Session("unasked")
    session.from_server(b"227 Entering (%s).\r\n" % host_port(session.server[0], DATA))
    session.from_client(b"NOOP\r\n")
    session.from_server(b"200 PASV\r\n")
    return session.scenario.connections()


SCENARIOS = [
    passive(b"227 Entering Passive Mode (%s).\r\n"),
    passive(b"227 =%s\r\n"),
    extended_passive(),
    active(),
    repeated(),
    unasked(),
]


@pytest.mark.usefixtures("agree")
def test_ftp(scenario: Scenario) -> None:
    """Nothing more: `agree` compares."""

"""FTP sessions through a dataplane: what both ends see, and the data connections between them."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import replace
from typing import Any

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL

import svcdp
from svcdp import DestinationSpec, Reason, ServiceSpec, SourceRule

SERVER = {4: "10.1.0.1", 6: "fd01::1"}
OTHER = {4: "10.1.0.2", 6: "fd01::2"}
NODE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
CONTROL, DATA = 40000, 40001
HEADROOM = 64

families = pytest.mark.parametrize("family", [4, 6])


def tcp(
    source: tuple[str, int],
    target: tuple[str, int],
    flags: str,
    payload: bytes = b"",
    number: int = 0,
    acknowledged: int = 0,
) -> bytes:
    bits = sum(wire.FLAGS[flag] for flag in flags)
    header = struct.pack(
        "!HHIIBBHHH", source[1], target[1], number, acknowledged, 0x50, bits, 512, 0, 0
    )
    return bytes(wire.ip(source[0], target[0], wire.TCP, header + payload))


def flow_of(packet: bytes) -> svcdp.Flow:
    return svcdp.Flow("tcp", *wire.read(packet)[1:])


class Session:
    """A control connection, established."""

    def __init__(self, family: int, **fields: Any) -> None:
        self.now = 0
        self.family = family
        self.virtual = (VIRTUAL[family], 21)
        self.server = (SERVER[family], 2121)
        self.client = (CLIENT[family], CONTROL)
        self.dp = svcdp.Dataplane(64, 1, clock=lambda: self.now, masquerade_ports=(61000, 61009))
        fields.setdefault("helper", "ftp")
        #: the next byte of client and server, as each counts
        self.said = self.heard = 0
        self.dp.apply(
            [ServiceSpec(*self.virtual, destinations=(DestinationSpec(*self.server),), **fields)]
        )
        self.send(tcp(self.client, self.virtual, "S"), Reason.NEW)
        (connection,) = self.dp.connections()
        self.seen = (connection.source, connection.source_port)
        self.send(tcp(self.server, self.seen, "SA"), Reason.REPLY)
        self.send(tcp(self.client, self.virtual, "A"), Reason.ESTABLISHED)

    def go_on_elsewhere(self) -> list[svcdp.ConnectionState]:
        """In another dataplane, with the same services; what it was told."""
        states = list(self.dp.export_connections())
        specs = [status.spec for status in self.dp.services()]
        self.dp = svcdp.Dataplane(64, 2, clock=lambda: self.now, masquerade_ports=(61000, 61009))
        self.dp.apply(specs)
        outcomes = [self.dp.import_connection(state) for state in states]
        assert outcomes == ["created"] * len(states)
        return states

    def send(self, packet: bytes, reason: Reason) -> bytes:
        result = self.dp.process(bytearray(HEADROOM) + packet, headroom=HEADROOM)
        assert result.reason == reason
        if result.packet is None:
            return b""
        sent = bytes(result.packet)
        if result.verdict.name == "FORWARD":
            assert wire.is_intact(sent)
        return sent

    def command(self, text: bytes) -> bytes:
        """What the server gets when the client says this."""
        packet = tcp(self.client, self.virtual, "PA", text, self.said, self.heard)
        self.said += len(text)
        return self.send(packet, Reason.ESTABLISHED)[-len(text) :]

    def reply(self, text: bytes) -> bytes:
        """The packet that the client gets when the server says this."""
        packet = tcp(self.server, self.seen, "PA", text)
        return self.send(packet, Reason.REPLY)

    def listed(self) -> list[tuple[tuple[str, int], tuple[str, int], tuple[str, int], str]]:
        """Data connections."""
        return [
            (
                (c.client, c.client_port),
                (c.virtual, c.virtual_port),
                (c.destination, c.destination_port),
                c.state,
            )
            for c in self.dp.connections()
            if c.virtual_port != 21
        ]


def payload_of(packet: bytes) -> bytes:
    return packet[wire.transport_at(packet) + 20 :]


def h1(address: str) -> bytes:
    return ",".join(str(byte) for byte in ipaddress.ip_address(address).packed).encode()


@pytest.mark.parametrize("extended", [False, True])
@families
def test_passive(family: int, extended: bool) -> None:
    if family == 6 and not extended:
        return
    session = Session(family)
    session.command(b"EPSV\r\n" if extended else b"PASV\r\n")
    text = b"229 ok (|||5001|)\r\n" if extended else b"227 ok (10,1,0,1,19,137).\r\n"
    packet = session.reply(text)
    assert payload_of(packet) == text.replace(b"10,1,0,1", h1(VIRTUAL[4]))
    here, there = (VIRTUAL[family], 5001), (SERVER[family], 5001)
    assert session.listed() == [((CLIENT[family], 0), here, there, "LISTEN")]

    client = (CLIENT[family], DATA)
    packet = session.send(tcp(client, here, "S"), Reason.NEW)
    assert wire.read(packet)[1:] == (*client, *there)
    packet = session.send(tcp(there, client, "SA"), Reason.REPLY)
    assert wire.read(packet)[1:] == (*here, *client)
    session.send(tcp(client, here, "A"), Reason.ESTABLISHED)
    assert session.listed() == [(client, here, there, "ESTABLISHED")]
    # It was for one connection.
    session.send(tcp((CLIENT[family], DATA + 1), here, "S"), Reason.NO_SERVICE)


@families
def test_somebody_else_is_not_let_in(family: int) -> None:
    session = Session(family)
    session.command(b"EPSV\r\n")
    session.reply(b"229 ok (|||5001|)\r\n")
    stranger = "192.0.2.99" if family == 4 else "2001:db8::99"
    here = (VIRTUAL[family], 5001)
    session.send(tcp((stranger, DATA), here, "S"), Reason.NO_SERVICE)
    session.send(tcp((CLIENT[family], DATA), (VIRTUAL[family], 5002), "S"), Reason.NO_SERVICE)
    session.now += 120 * SECOND
    session.send(tcp((CLIENT[family], DATA), here, "S"), Reason.NO_SERVICE)
    assert session.listed() == []


@pytest.mark.parametrize("extended", [False, True])
@families
def test_active(family: int, extended: bool) -> None:
    """The server connects from the port below its control port, the client sees the service."""
    if family == 6 and not extended:
        return
    session = Session(family)
    port = b"PORT 192,0,2,4,156,65\r\n"
    eprt = b"EPRT |%d|%s|40001|\r\n" % (1 if family == 4 else 2, CLIENT[family].encode())
    text = eprt if extended else port
    assert session.command(text) == text
    client, server, here = (CLIENT[family], DATA), (SERVER[family], 2120), (VIRTUAL[family], 20)
    assert session.listed() == [(client, here, server, "LISTEN")]
    packet = session.send(tcp(server, client, "S"), Reason.REPLY)
    assert wire.read(packet)[1:] == (*here, *client)
    packet = session.send(tcp(client, here, "SA"), Reason.ESTABLISHED)
    assert wire.read(packet)[1:] == (*client, *server)
    # Not from another server, nor from another port.
    session.send(tcp((OTHER[family], 2120), client, "S"), Reason.NO_SERVICE)
    session.send(tcp((SERVER[family], 2122), client, "S"), Reason.NO_SERVICE)


@pytest.mark.parametrize("moves", [False, True])
def test_numbers_follow_the_text(moves: bool) -> None:
    """The reply got longer: what the server says moves on, what the client heard moves back.
    Another dataplane knows that too.
    """
    session = Session(4)
    session.command(b"PASV\r\n")
    text = b"227 ok (10,1,0,1,19,137).\r\n"
    got = payload_of(session.reply(text))
    grown = len(got) - len(text)
    assert grown > 0
    if moves:
        (state,) = session.go_on_elsewhere()
        assert state.sequences == ((0, 0, 0), (0, grown, 0))
    packet = session.send(
        tcp(session.server, session.seen, "PA", b"150 here\r\n", len(text), 6), Reason.REPLY
    )
    assert struct.unpack_from("!II", packet, 24) == (len(got), 6)
    for heard, back in ((0, 0), (len(got), len(text)), (len(got) + 10, len(text) + 10)):
        packet = session.send(
            tcp(session.client, session.virtual, "A", b"", 6, heard), Reason.ESTABLISHED
        )
        assert struct.unpack_from("!II", packet, 24) == (6, back)


@families
def test_a_server_that_was_not_asked(family: int) -> None:
    session = Session(family)
    for text in (b"229 ok (|||5001|)\r\n", b"227 ok (10,1,0,1,19,137).\r\n"):
        assert payload_of(session.reply(text)) == text
    assert session.listed() == []


def test_a_client_that_names_somebody_else() -> None:
    """The bounce attack of RFC 2577."""
    session = Session(4)
    session.command(b"PORT 192,0,2,99,156,65\r\n")
    session.command(b"EPRT |1|192.0.2.99|40001|\r\n")
    assert session.listed() == []


def test_without_headroom() -> None:
    session = Session(4)
    session.command(b"PASV\r\n")
    packet = bytearray(tcp(session.server, session.seen, "PA", b"227 ok (10,1,0,1,19,137)\r\n"))
    before = bytes(packet)
    result = session.dp.process(packet)
    assert (result.verdict.name, result.reason) == ("DROP", Reason.NO_HEADROOM)
    assert packet == before


def test_without_the_helper() -> None:
    session = Session(4, helper="")
    session.command(b"PASV\r\n")
    text = b"227 ok (10,1,0,1,19,137)\r\n"
    assert payload_of(session.reply(text)) == text
    assert session.listed() == []


@families
def test_masqueraded_clients(family: int) -> None:
    """Passive transfers work; the server would connect to the node, so active ones do not."""
    session = Session(family, rules=(SourceRule(masquerade=True),), masquerade_address=NODE[family])
    session.command(b"EPRT |1|192.0.2.4|40001|\r\n")
    assert session.listed() == []
    session.command(b"EPSV\r\n")
    session.reply(b"229 ok (|||5001|)\r\n")
    here, there = (VIRTUAL[family], 5001), (SERVER[family], 5001)
    client = (CLIENT[family], DATA)
    packet = session.send(tcp(client, here, "S"), Reason.NEW)
    source, port, *target = wire.read(packet)[1:]
    assert (source, *target) == (NODE[family], *there)
    assert 61000 <= port <= 61009
    packet = session.send(tcp(there, (source, port), "SA"), Reason.REPLY)
    assert wire.read(packet)[1:] == (*here, *client)


def test_another_dataplane_follows_data_connections() -> None:
    session = Session(4)
    (state,) = session.go_on_elsewhere()
    assert state.sequences is None
    session.command(b"PASV\r\n")
    session.reply(b"227 ok (10,1,0,1,19,137)\r\n")
    session.send(tcp((CLIENT[4], DATA), (VIRTUAL[4], 5001), "S"), Reason.NEW)
    session.now += 3600 * SECOND
    session.dp.sweep()
    session.dp.sweep()
    assert session.dp.stats().connections == 0


def test_what_is_shifted_is_brought_up_to_date() -> None:
    session = Session(4)
    session.command(b"PASV\r\n")
    session.reply(b"227 ok (10,1,0,1,19,137)\r\n")
    (state,) = session.dp.export_connections()
    shifts = (svcdp.status.SequenceShift(7, -3, 2), svcdp.status.SequenceShift(2**32 - 1, 5, -5))
    assert session.dp.import_connection(replace(state, sequences=shifts)) == "updated"
    assert [each.sequences for each in session.dp.export_connections()] == [shifts]
    assert session.dp.import_connection(replace(state, sequences=None)) == "updated"
    assert [each.sequences for each in session.dp.export_connections()] == [shifts]


def test_shifted_text_where_nobody_helps_is_refused() -> None:
    """Without the helper all that follows would be out of place."""
    session = Session(4)
    session.command(b"PASV\r\n")
    session.reply(b"227 ok (10,1,0,1,19,137)\r\n")
    states = list(session.dp.export_connections())
    plain = Session(4, helper="")
    assert plain.dp.import_connection(replace(states[0], client_port=5)) == "refused"
    for wrong in ((), ((0, 0, 0), (0, 0)), ((-1, 0, 0), (0, 0, 0)), ((0, 0, 0), (0, 2**31, 0))):
        with pytest.raises(svcdp.ConfigError):
            session.dp.import_connection(replace(states[0], sequences=wrong))


def test_a_quiesced_server_keeps_its_sessions() -> None:
    session = Session(4)
    session.dp.apply(
        [
            ServiceSpec(
                *session.virtual,
                destinations=(
                    DestinationSpec(*session.server, weight=0),
                    DestinationSpec(OTHER[4], 2121),
                ),
                helper="ftp",
            )
        ]
    )
    session.command(b"PASV\r\n")
    session.reply(b"227 ok (10,1,0,1,19,137)\r\n")
    packet = session.send(tcp((CLIENT[4], DATA), (VIRTUAL[4], 5001), "S"), Reason.NEW)
    assert wire.read(packet).destination == SERVER[4]


@pytest.mark.parametrize(
    ("on_removal", "reason"),
    [
        ("drain", Reason.NEW),
        ("expire", Reason.NO_SERVICE),
        ("drop", Reason.DESTINATION_GONE),
    ],
)
@families
def test_data_of_a_removed_server(family: int, on_removal: str, reason: Reason) -> None:
    """What becomes of its control connection becomes of what that announced."""
    session = Session(family, on_removal=on_removal)
    session.command(b"EPSV\r\n")
    session.reply(b"229 ok (|||5001|)\r\n")
    service = ServiceSpec(*session.virtual, helper="ftp", on_removal=on_removal)
    session.dp.apply([service])
    data = tcp((CLIENT[family], DATA), (VIRTUAL[family], 5001), "S")
    explained = session.dp.explain(flow_of(data))
    session.send(data, reason)
    assert explained.action == {"drain": "forward", "expire": "pass", "drop": "drop"}[on_removal]
    for _ in range(2):  # a control connection stays a minute more
        session.now += 3600 * SECOND
        session.dp.sweep()
    assert session.dp.stats().connections == 0
    assert session.dp.draining() == svcdp.Captures()


@families
def test_expected_data_is_explained(family: int) -> None:
    session = Session(family)
    session.command(b"EPSV\r\n")
    session.reply(b"229 ok (|||5001|)\r\n")
    data = tcp((CLIENT[family], DATA), (VIRTUAL[family], 5001), "S")
    before = session.listed()
    explained = session.dp.explain(flow_of(data))
    assert explained.action == "forward"
    assert explained.picked is not None
    assert (explained.picked.address, explained.picked.port) == (SERVER[family], 5001)
    assert not explained.picked.masquerade
    assert session.listed() == before, "nothing changed"
    stranger = replace(explained.flow, source="192.0.2.99" if family == 4 else "2001:db8::99")
    assert session.dp.explain(stranger).action == "pass"
    session.send(data, Reason.NEW)


def test_sessions_end() -> None:
    """Nothing stays of sessions, however many there were."""
    for _ in range(2):
        session = Session(4)
        for _ in range(100):
            session.command(b"PASV\r\n")
            session.reply(b"227 ok (10,1,0,1,19,137)\r\n")
            client = (CLIENT[4], DATA)
            session.send(tcp(client, (VIRTUAL[4], 5001), "S"), Reason.NEW)
            session.send(tcp(client, (VIRTUAL[4], 5001), "R"), Reason.ESTABLISHED)
            session.now += 130 * SECOND
        session.now += 3600 * SECOND
        session.dp.sweep()
        assert session.dp.stats().connections == 0
        (destination,) = session.dp.services()[0].destinations
        assert (destination.active, destination.inactive) == (0, 0)

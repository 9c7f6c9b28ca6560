"""The sync protocol: what the kernel tells of connections, and what it makes of what it is told."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import wire
from replay import SECOND, Replay, routed
from scenario import Result, Scenario, assert_same
from topology import CLIENT, MARKED, VIRTUAL, server

from svcdp.ipvs.receiver import Receiver
from svcdp.ipvs.sender import Sender
from svcdp.ipvs.sync import Sequence, SyncEntry, decode, encode, encode_request

GROUP, PORT = "224.0.0.81", 8848
SIDE = "s5"  # where other directors are
SYNCID = 5
INACTIVE, SEQUENCES, TEMPLATE, NFCT = 0x100, 0x600, 0x1000, 0x10000
METHOD, NOOUTPUT = 7, 0x80
ACTIVE = (1, 2, 3, 10)  # ESTABLISHED, SYN_SENT, SYN_RECV, SYNACK
CALL = b"OPTIONS sip:a@b SIP/2.0\r\nCall-ID: %d@host\r\nContent-Length: 0\r\n\r\n"


class SyncScenario(Scenario):
    """With the sync daemon among its steps."""

    def sync(self, role: str) -> SyncScenario:
        self._step("sync", role, SIDE, SYNCID)
        return self

    def tell(self, *messages: bytes) -> SyncScenario:
        """Messages of another director. The kernel's daemon takes them in its own time."""
        packets = (
            wire.packet("udp", server(5), 50000, GROUP, PORT, payload=message)
            for message in messages
        )
        self.send(*packets, side=SIDE)
        self._step("messages", SIDE, 0.5)  # there are none, and nobody else has the CPU meanwhile
        return self

    def messages(self) -> SyncScenario:
        """Observe what is said; the kernel does so when it is 2 s old."""
        self._step("messages", SIDE, 6)
        return self


class SyncReplay(Replay):
    """With both ends of svcdp's."""

    sender: Sender | None = None
    receiver: Receiver
    said: list[bytes]

    def _sync(self, role: str, side: str, syncid: int) -> None:
        if role == "master":
            self.sender = Sender(self.dp, syncid)
            self.said = [*self.sender.messages(self._now / SECOND)]
        else:
            self.receiver = Receiver(self.dp, syncid)

    def _messages(self, side: str, seconds: float) -> list[str]:
        if self.sender is None:
            return []
        return [message.hex() for message in (*self.said, *self.sender.flush())]

    def _send(self, side: str, *packets: str) -> list[list[list[str]]]:
        came = super()._send(side, *packets)
        if self.sender is not None:
            self.said += self.sender.messages(self._now / SECOND)
        return came

    def _packet(self, side: str, packet: bytes) -> list[tuple[str, bytes]]:
        if packet[0] >> 4 == 4 and wire.read(packet).destination == GROUP:
            self.receiver.receive(packet[28:])
            return []
        return super()._packet(side, packet)


def client(flags: str, port: int, to: int, family: int = 4, **fields: Any) -> bytearray:
    virtual = fields.pop("virtual", VIRTUAL[family])
    protocol = fields.pop("protocol", "tcp")
    return wire.packet(protocol, CLIENT[family], port, virtual, to, flags, **fields)


def reply(flags: str, port: int, source: int, family: int = 4) -> bytearray:
    return wire.packet("tcp", server(1, family), source, CLIENT[family], port, flags)


def entries(messages: Iterable[str]) -> list[SyncEntry]:
    decoded = [decode(bytes.fromhex(message)) for message in messages]
    assert all((m.syncid, m.malformed) == (SYNCID, 0) for m in decoded)
    return [entry for message in decoded for entry in message.entries]


# -- what is told --------------------------------------------------------------------------------

SERVICES = (
    f"-A -t {VIRTUAL[4]}:80 -s rr",
    f"-a -t {VIRTUAL[4]}:80 -r {server(1)}:8080 -m",
    f"-A -t [{VIRTUAL[6]}]:80 -s rr",
    f"-a -t [{VIRTUAL[6]}]:80 -r [{server(1, 6)}]:8080 -m",
    f"-A -u {VIRTUAL[4]}:53 -s rr",
    f"-a -u {VIRTUAL[4]}:53 -r {server(1)}:5353 -m",
    f"-A -u {VIRTUAL[4]}:54 -s rr -o",
    f"-a -u {VIRTUAL[4]}:54 -r {server(1)}:5353 -m",
    f"-A -t {VIRTUAL[4]}:81 -s rr -p 600",
    f"-a -t {VIRTUAL[4]}:81 -r {server(1)}:8080 -m",
    f"-A -t {VIRTUAL[4]}:82 -s rr",
    f"-a -t {VIRTUAL[4]}:82 -r {server(1)}:82 -g",
    f"-A -t {VIRTUAL[4]}:83 -s rr",
    f"-a -t {VIRTUAL[4]}:83 -r {server(1)}:83 -i",
    "-A -f 1 -s rr -p 500",
    f"-a -f 1 -r {server(1)} -m",
)


FTP = (
    f"-A -t {VIRTUAL[4]}:21 -s rr",
    f"-a -t {VIRTUAL[4]}:21 -r {server(1)}:21 -m",
)


def ftp(side: str, flags: str, number: int, acknowledged: int, text: bytes = b"") -> bytes:
    """A segment of an FTP control connection."""
    here, there = (CLIENT[4], 3000), (VIRTUAL[4], 21)
    if side != "c":
        here, there = (server(1), 21), (CLIENT[4], 3000)
    bits = sum(wire.FLAGS[flag] for flag in flags)
    header = struct.pack(
        "!HHIIBBHHH", here[1], there[1], number, acknowledged, 0x50, bits, 512, 0, 0
    )
    return bytes(wire.ip(here[0], there[0], wire.TCP, header + text))


#: Where the server listens, as it says (RFC 959).
PASSIVE = server(1).replace(".", ",").encode() + b",117,48"


#: FTP whose servers answer clients themselves: their data connections are bound to them, too.
BOUND_FTP = ("-A -t 10.96.0.11:21 -s rr -p 600", f"-a -t 10.96.0.11:21 -r {server(1)}:21 -g")


def telling() -> SyncScenario:
    scenario = SyncScenario("telling")
    scenario.ipvs(*SERVICES, *FTP, *BOUND_FTP).marks()
    scenario.sync("master")
    for family in (4, 6):
        scenario.send(client("S", 1000, 80, family))
        scenario.send(reply("SA", 1000, 8080, family), side="s1")
        scenario.send(*(client("A", 1000, 80, family) for _ in range(110)))
    # Ended by the client, and reset by it.
    for port, *ends in ((1001, "FA", "A"), (1002, "RA")):
        scenario.send(client("S", port, 80))
        scenario.send(reply("SA", port, 8080), side="s1")
        scenario.send(client("A", port, 80), *(client(flags, port, 80) for flags in ends))
    # Half open, and closed before it was open.
    scenario.send(client("S", 1003, 80))
    scenario.send(client("S", 1004, 80), client("FA", 1004, 80), client("A", 1004, 80))
    scenario.send(*(client("", 1005, 53, protocol="udp") for _ in range(60)))
    scenario.send(*(client("", 1006, 54, protocol="udp") for _ in range(60)))
    for port in (81, 82, 83):
        scenario.send(*(client(flags, 1007, port) for flags in ("S", "A", "A", "FA", "A")))
    scenario.send(*(client(flags, 1008, 90, virtual=MARKED[4]) for flags in "SAAA"))
    scenario.send(*(client(flags, 1009, 21, virtual="10.96.0.11") for flags in "SAAA"))
    # The answer to PASV becomes longer.
    scenario.send(ftp("c", "S", 100, 0))
    scenario.send(ftp("s1", "SA", 500, 101), side="s1")
    scenario.send(ftp("c", "A", 101, 501), ftp("c", "PA", 101, 501, b"PASV\r\n"))
    scenario.send(ftp("s1", "PA", 501, 107, b"227 (%s).\r\n" % PASSIVE), side="s1")
    scenario.send(ftp("c", "FA", 107, 540))
    scenario.messages()
    return scenario


# -- what is heard -------------------------------------------------------------------------------

WEB = SyncEntry(6, 0, 1, CLIENT[4], 2000, VIRTUAL[4], 80, server(1), 8080, timeout=900)
WEB6 = SyncEntry(6, 0, 1, CLIENT[6], 2001, VIRTUAL[6], 80, server(1, 6), 8080, timeout=900)
UDP = SyncEntry(17, INACTIVE, 0, CLIENT[4], 2002, VIRTUAL[4], 53, server(1), 5353, timeout=300)
BOUND = SyncEntry(
    6, TEMPLATE | INACTIVE, 1, CLIENT[4], 0, VIRTUAL[4], 81, server(2), 8080, timeout=600
)


def one(*entries: SyncEntry, syncid: int = SYNCID) -> bytes:
    (message,) = encode(entries, syncid)
    return message


def hearing() -> SyncScenario:
    scenario = SyncScenario("hearing")
    scenario.ipvs(*SERVICES, f"-a -t {VIRTUAL[4]}:81 -r {server(2)}:8080 -m")
    scenario.sync("backup")
    scenario.tell(one(WEB, WEB6, UDP))
    scenario.connections().services()
    # It goes on.
    scenario.send(client("A", 2000, 80), client("A", 2001, 80, 6))
    scenario.send(client("", 2002, 53, protocol="udp"))
    scenario.send(reply("A", 2000, 8080), reply("A", 2001, 8080, 6), side="s1")
    # News of it, and of others in every state.
    scenario.tell(one(replace(WEB, state=7, flags=INACTIVE, timeout=60)))
    states = [
        replace(
            WEB, client_port=2100 + state, state=state, flags=0 if state in ACTIVE else INACTIVE
        )
        for state in range(12)  # there are 11
    ]
    scenario.tell(one(*states)).connections().services()
    # Only the client of a template is bound.
    scenario.tell(one(BOUND))
    scenario.send(client("S", 2200, 81), client("S", 2201, 81))
    # What is not for it, or wrong.
    wrong = [
        one(replace(WEB, client_port=2300), syncid=6),
        one(replace(WEB, client_port=2301)) + b"\0",
        one(replace(WEB, client_port=2302, protocol=47)),
        one(replace(WEB, client_port=2303))[:-4],
        encode_request(SYNCID),
        b"",
        b"\0",
    ]
    scenario.tell(*wrong).connections()
    # An option of svcdp's: the kernel reads on.
    scenario.tell(one(replace(WEB, client_port=2400, source=(CLIENT[4], 2400)), WEB))
    scenario.connections()
    return scenario


def hearing_of_bound_ftp() -> SyncScenario:
    """The client's next connections go where it is bound, not to whose turn it is."""
    scenario = SyncScenario("bound ftp")
    scenario.ipvs(*BOUND_FTP, f"-a -t 10.96.0.11:21 -r {server(2)}:21 -g")
    scenario.sync("backup")
    template = replace(BOUND, virtual="10.96.0.11", virtual_port=0, destination_port=0)
    scenario.tell(one(replace(template, destination=server(1)))).connections()
    opened = [client("S", 2300 + to, to, virtual="10.96.0.11") for to in (21, 30000, 20)]
    scenario.send(*opened)
    ours = [[["s1", routed(packet).hex()]] for packet in opened]
    return scenario.differs(ours, "the kernel looks for a service of port 0, which there is not")


def hearing_of_shifted_text() -> SyncScenario:
    """Of both ends of an FTP session: the client's became shorter, the server's longer."""
    scenario = SyncScenario("shifted")
    scenario.ipvs(*FTP)
    scenario.sync("backup")
    sequences = (Sequence(100, -3 & 0xFFFFFFFF, 2), Sequence(500, 9, -4 & 0xFFFFFFFF))
    session = replace(WEB, client_port=3000, virtual_port=21, destination_port=21)
    scenario.tell(one(replace(session, flags=SEQUENCES, sequences=sequences)))
    scenario.send(ftp("c", "A", 99, 600), ftp("c", "A", 101, 600))
    scenario.send(ftp("s1", "A", 499, 300), ftp("s1", "PA", 501, 300, b"200 ok\r\n"), side="s1")
    return scenario.connections()


def hearing_of_strangers() -> SyncScenario:
    """Servers that are not configured here."""
    scenario = SyncScenario("strangers")
    scenario.ipvs(*SERVICES)
    scenario.sync("backup")
    scenario.tell(one(replace(WEB, destination=server(3))))
    scenario.connections()
    scenario.differs([], "a connection to nobody knows whom: the kernel forwards it, as NAT")
    return scenario


def hearing_version_0() -> SyncScenario:
    scenario = SyncScenario("version 0")
    scenario.ipvs(*SERVICES)
    scenario.sync("backup")
    scenario.tell(*encode([replace(WEB, timeout=0), replace(UDP, timeout=0)], SYNCID, version=0))
    scenario.connections().services()
    scenario.send(client("A", 2000, 80), client("", 2002, 53, protocol="udp"))
    return scenario


SCENARIOS = [
    telling(),
    hearing(),
    hearing_of_shifted_text(),
    hearing_of_strangers(),
    hearing_version_0(),
    hearing_of_bound_ftp(),
]


def test_the_same_connections_are_told(verdicts: dict[str, Result]) -> None:
    """In the same order. Templates, which the kernel repeats with each packet, as it did last."""
    kernel = verdicts["telling"]
    ours = SyncReplay(telling()).run(kernel)
    theirs, mine = (entries(result[-1][1]) for result in (kernel, ours))
    assert connections(mine) == connections(theirs)
    assert templates(mine) == templates(theirs)
    assert len(connections(mine)) > 15
    assert [entry.virtual_port for entry in mine if entry.sequences] == [21]
    assert len(templates(mine)) == 3


def connections(entries: list[SyncEntry]) -> list[SyncEntry]:
    """As far as both tell of them: the kernel's FTP has the numbers shifted by its connection
    tracking (flag NFCT), which tells nobody."""
    return [
        replace(entry, flags=entry.flags & ~(NFCT | SEQUENCES), sequences=None)
        for entry in entries
        if not entry.flags & TEMPLATE
    ]


def templates(entries: list[SyncEntry]) -> dict[tuple[str, int], SyncEntry]:
    """The last of each, by virtual service. Only the kernel says of a template how its server
    forwards, which is the server's business where it is heard."""
    return {
        (e.virtual, e.virtual_port): replace(e, flags=e.flags & ~(NOOUTPUT | METHOD))
        for e in entries
        if e.flags & TEMPLATE
    }


def test_numbers_are_shifted_as_was_told(verdicts: dict[str, Result]) -> None:
    """The kernel does not correct the checksum for it."""

    def packets(result: Result) -> list[bytes]:
        return [bytes.fromhex(data) for step in result[-3:-1] for [[_, data]] in step[1]]

    kernel = verdicts["shifted"]
    ours = SyncReplay(hearing_of_shifted_text()).run(kernel)
    one, other = (
        [struct.unpack_from("!II", packet, 24) for packet in packets(result)]
        for result in (kernel, ours)
    )
    assert one == other == [(101, 591), (98, 591), (495, 303), (510, 303)]
    assert all(map(wire.is_intact, packets(ours)))


@pytest.mark.parametrize("heard", [SCENARIOS[1], *SCENARIOS[3:]], ids=str)
def test_the_same_is_made_of_what_is_heard(heard: SyncScenario, verdicts: Any) -> None:
    kernel = verdicts[heard.name]
    assert_same(heard, kernel, SyncReplay(heard).run(kernel))

"""Two directors: what one sends, and what the other makes of it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import wire
from bench import CLIENT, SECOND, VIRTUAL, Bench

from svcdp import Dataplane, Reason, ServiceSpec, SourceRule, TunnelSpec
from svcdp.ipvs.receiver import Receiver
from svcdp.ipvs.sender import Sender
from svcdp.ipvs.sync import SyncEntry, decode, encode, encode_request
from svcdp.types import DestinationSpec, fwmark_key

REAL = ("10.1.0.7", 8080)
REAL6 = ("fd01::7", 8080)
KERNEL = [
    bytes.fromhex("".join(line for line in part.splitlines() if not line.startswith("#")))
    for part in (Path(__file__).parent / "kernel_messages.txt").read_text().split("\n\n")[1:]
]


class Director(Bench):
    """A bench that has both ends of the protocol."""

    def __init__(self, seed: int = 1, *, length_max: int = 1472, full_interval: float = 0) -> None:
        super().__init__(seed=seed)
        self.serve(REAL)
        self.serve(REAL6, address=VIRTUAL[6])
        self.serve(("10.1.0.7", 5353), port=53, protocol="udp")
        self.sender = Sender(self.dp, 5, length_max=length_max, full_interval=full_interval)
        self.receiver = Receiver(self.dp, 5, on_request=self.sender.request)
        assert self.due() == []

    def due(self) -> list[SyncEntry]:
        """What is sent now, and after waiting for messages to become full."""
        messages = [*self.sender.messages(self.now / SECOND)]
        return [entry for message in messages for entry in decode(message).entries]

    def after(self, seconds: float) -> list[SyncEntry]:
        entries = self.due()
        self.now += round(seconds * SECOND)
        return entries + self.due()

    def hear(self, entries: Iterable[SyncEntry]) -> None:
        for message in encode(entries, 5):
            self.receiver.receive(message)

    def establish(self, port: int = 40000, family: int = 4) -> None:
        """Two packets of the client."""
        to = (VIRTUAL[family], 80)
        self.send("S", port=port, client=CLIENT[family], to=to)
        real = REAL if family == 4 else REAL6
        self.reply("SA", source=real, port=port, client=CLIENT[family])
        self.send("A", port=port, client=CLIENT[family], to=to)

    def outcomes(self) -> dict[str, int]:
        return dict(self.receiver.stats.outcomes)


# -- when what is sent ---------------------------------------------------------------------------


def test_a_connection_is_told_of_at_its_third_packet() -> None:
    director = Director()
    director.establish()
    assert director.after(2) == []
    director.send("A")
    assert director.due() == []
    (entry,) = director.after(2)
    assert entry == SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)


def test_and_again_every_fifty_packets() -> None:
    director = Director()
    director.establish()
    told = []
    for number in range(3, 160):
        director.send("A")
        told += [number] * len(director.after(2))
    assert told == [3, 53, 103, 153]


def test_changes_of_state_are_told_at_once() -> None:
    director = Director()
    director.establish()
    director.send("FA")
    director.reply("FA", source=REAL)
    director.send("A")
    entries = director.after(2)
    closing = [(entry.state, entry.timeout) for entry in entries]
    assert closing[0] == (7, 60)  # CLOSE_WAIT


def test_udp_is_told_of_by_its_packets() -> None:
    director = Director()
    for _ in range(3):
        director.send(port=40001, to=(VIRTUAL[4], 53), protocol="udp")
    (entry,) = director.after(2)
    assert (entry.protocol, entry.state, entry.timeout, entry.client_port) == (17, 0, 300, 40001)


def test_one_packet_connections_are_never_told_of() -> None:
    director = Director()
    director.serve(("10.1.0.7", 5353), port=54, protocol="udp", one_packet=True)
    for _ in range(60):
        director.send(port=40001, to=(VIRTUAL[4], 54), protocol="udp")
    assert director.after(2) == []


def test_a_full_message_does_not_wait() -> None:
    director = Director(length_max=512)
    for port in range(40000, 40015):
        director.establish(port)
        director.send("A", port=port)
    assert len(director.due()) == 14
    assert director.after(1) == []
    assert len(director.after(1)) == 1


def test_the_template_comes_with_its_connection() -> None:
    director = Director()
    director.serve(REAL, port=81, persistence=600)
    for flags in "SAA":
        director.send(flags, to=(VIRTUAL[4], 81))
    connection, template = director.after(2)
    assert connection.client_port == 40000
    assert (template.client, template.client_port) == (CLIENT[4], 0)
    assert (template.virtual, template.virtual_port) == (VIRTUAL[4], 81)
    assert (template.destination, template.destination_port) == REAL
    assert template.flags & 0x1000
    assert template.timeout == 600


def test_a_masqueraded_connection_says_its_source() -> None:
    director = Director()
    director.serve(
        REAL, port=82, masquerade_address="198.51.100.1", rules=(SourceRule(masquerade=True),)
    )
    for flags in "SAA":
        director.send(flags, to=(VIRTUAL[4], 82))
    (entry,) = director.after(2)
    connection = director.connection()
    assert entry.source == (connection.source, connection.source_port)
    assert entry.source[0] == "198.51.100.1"


def test_what_the_protocol_has_no_words_for_is_counted() -> None:
    director = Director()
    tunnel = TunnelSpec(source="fd01::1")
    spec = DestinationSpec("fd01::9", 83, method="tunnel", tunnel=tunnel)
    director.dp.update([ServiceSpec(VIRTUAL[4], 83, "tcp", (spec,))])
    for flags in "SAA":
        director.dp.process(bytearray(64) + packet(flags, 83), headroom=64)
    assert director.after(2) == []
    assert director.sender.stats.skipped == 1


def test_one_that_does_not_fit_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Director()
    bench.establish(40000)
    (state,) = bench.dp.export_connections()
    bad = [replace(state, state="DREAMING"), replace(state, source="fd01::1")]
    monkeypatch.setattr(Dataplane, "export_connections", lambda self: iter([*bad, state, *bad]))
    monkeypatch.setattr("svcdp.ipvs.sender.is_synchronised", lambda state: True)
    bench.sender.close()
    sender = Sender(bench.dp, 5)
    (message,) = [*sender.messages(0), *sender.flush()]
    assert len(decode(message).entries) == 1
    assert (sender.stats.entries, sender.stats.refused) == (1, 4)
    assert len(caplog.records) == 1


# -- the whole table -----------------------------------------------------------------------------


def test_the_whole_table_is_sent_first() -> None:
    bench = Director()
    for port in range(40000, 40100):
        bench.establish(port)
    bench.send(port=50000)  # SYN_RECV: not yet worth it
    bench.sender.close()
    sender = Sender(bench.dp, 5)
    entries = [e for m in sender.messages(0) for e in decode(m).entries]
    entries += [e for m in sender.flush() for e in decode(m).entries]
    assert sorted(entry.client_port for entry in entries) == [*range(40000, 40100)]
    assert sender.stats.tables == 1


def test_it_is_sent_again_when_asked_for_but_not_too_often() -> None:
    director = Director()
    director.establish()
    director.receiver.receive(encode_request(5))
    assert director.after(1) == []
    told = [len(director.after(1)) for _ in range(15)]
    assert sum(told) == 1
    director.receiver.receive(encode_request(5))
    director.receiver.receive(encode_request(5))
    assert sum(len(director.after(1)) for _ in range(15)) == 1
    assert director.receiver.stats.requests == 3


def test_it_is_sent_again_in_intervals() -> None:
    director = Director(full_interval=60)
    director.establish()
    assert sum(len(director.after(1)) for _ in range(190)) == 3


def test_lost_changes_make_up_for_themselves() -> None:
    director = Director()
    director.sender.close()
    director.sender = Sender(director.dp, 5, watch_limit=4)
    assert director.due() == []
    for port in range(40000, 40010):
        director.establish(port)
        director.send("A", port=port)
    told = {entry.client_port for _ in range(15) for entry in director.after(1)}
    assert told == {*range(40000, 40010)}
    assert director.sender.stats.lost == 6


def heard_of(standby: Director) -> list[int]:
    """Have a standby hear of ports 40000 and 40001, and see packets of 40001."""
    active = Director(1)
    for port in (40000, 40001):
        active.establish(port)
        active.send("A", port=port)
    standby.hear(active.after(2))
    standby.send("A", port=40001)
    return [40000, 40001]


def test_a_peer_does_not_get_its_own_news_back() -> None:
    standby = Director(2, full_interval=60)
    heard_of(standby)
    assert [entry.client_port for _ in range(70) for entry in standby.after(1)] == [40001]


def test_who_knows_nothing_gets_all_with_the_time_that_is_left() -> None:
    standby = Director(2)
    ports = heard_of(standby)
    standby.now += 100 * SECOND
    standby.receiver.receive(encode_request(5))
    entries = [entry for _ in range(15) for entry in standby.after(1)]
    assert [entry.client_port for entry in entries] == ports
    assert all(780 <= entry.timeout <= 800 for entry in entries)


def test_templates_of_others_do_not_go_to_and_fro() -> None:
    active, standby = Director(1), Director(2, full_interval=60)
    for director in (active, standby):
        director.serve(REAL, port=81, persistence=600)
    for flags in "SAA":
        active.send(flags, to=(VIRTUAL[4], 81))
    standby.hear(active.after(2))
    assert [entry for _ in range(70) for entry in standby.after(1)] == []
    standby.send(port=50000, to=(VIRTUAL[4], 81))
    told = [entry for _ in range(70) for entry in standby.after(1)]
    assert [(entry.flags & 0x1000, entry.client_port) for entry in told] == [(0x1000, 0)]


def test_what_a_server_ends_is_told_too() -> None:
    director = Director()
    director.establish()
    director.reply("FA", source=REAL)
    assert [entry.state for entry in director.after(2)] == [4]  # FIN_WAIT


# -- what is heard -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_a_standby_goes_on_with_a_connection(family: int) -> None:
    active, standby = Director(1), Director(2)
    active.establish(family=family)
    to = (VIRTUAL[family], 80)
    active.send("A", client=CLIENT[family], to=to)
    standby.hear(active.after(2))
    assert standby.outcomes() == {"created": 1}
    real = REAL if family == 4 else REAL6
    result = standby.send("A", client=CLIENT[family], to=to)
    assert (result.reason, result.destination) == (Reason.ESTABLISHED, real)
    assert standby.reply("A", source=real, client=CLIENT[family]).reason == Reason.REPLY


def test_later_news_bring_it_up_to_date() -> None:
    active, standby = Director(1), Director(2)
    active.establish()
    active.send("A")
    standby.hear(active.after(2))
    active.send("FA")
    standby.hear(active.after(2))
    assert standby.outcomes() == {"created": 1, "updated": 1}
    assert standby.connection().state == "CLOSE_WAIT"
    assert standby.connection().expires_in == pytest.approx(60)


def test_a_masqueraded_connection_goes_on() -> None:
    active, standby = Director(1), Director(2)
    for director in (active, standby):
        director.serve(
            REAL, port=82, masquerade_address="198.51.100.1", rules=(SourceRule(masquerade=True),)
        )
    for flags in "SAA":
        active.send(flags, to=(VIRTUAL[4], 82))
    standby.hear(active.after(2))
    source = (active.connection().source, active.connection().source_port)
    assert (standby.connection().source, standby.connection().source_port) == source
    answer = standby.reply("A", source=REAL, client=source[0], port=source[1])
    assert answer.next_hop == CLIENT[4]


def test_an_ftp_session_goes_on() -> None:
    """What the server says has become longer."""
    server, here = ("10.1.0.7", 21), (VIRTUAL[4], 21)
    active, standby = Director(1), Director(2)
    for director in (active, standby):
        director.serve(server, port=21, helper="ftp")
    for flags, text in (("S", b""), ("A", b""), ("A", b"PASV\r\n"), ("A", b"")):
        active.dp.process(wire.packet("tcp", CLIENT[4], 40000, *here, flags, payload=text))
        if text:
            answer = wire.packet(
                "tcp", *server, CLIENT[4], 40000, "A", payload=b"227 ok (10,1,0,7,9,9)\r\n"
            )
            active.dp.process(bytearray(64) + answer, headroom=64)
    entry = next(entry for entry in active.after(2) if entry.virtual_port == 21)
    assert entry.flags & 0x600 == 0x200  # out_seq alone, uapi/linux/ip_vs.h
    standby.hear([entry])
    assert standby.outcomes() == {"created": 1}
    one, other = (
        next(s.sequences for s in d.dp.export_connections() if s.virtual_port == 21)
        for d in (active, standby)
    )
    assert one == other
    assert one is not None
    assert one[1].delta == len("10,96,0,10") - len("10,1,0,7")


def test_clients_stay_bound() -> None:
    reals = [(f"10.1.0.{i}", 8080) for i in range(1, 9)]
    active, standby = Director(1), Director(2)
    for director in (active, standby):
        director.serve(*reals, port=81, persistence=600)
    for host in range(1, 9):
        for flags in "SAA":
            active.send(flags, client=f"192.0.2.{host}", to=(VIRTUAL[4], 81))
    bound = {c.client: c.destination for c in active.connections()}
    standby.hear(entry for entry in active.after(2) if entry.flags & 0x1000)
    for client in reversed(bound):
        standby.send(client=client, port=50000, to=(VIRTUAL[4], 81))
    assert {c.client: c.destination for c in standby.connections()} == bound


def test_clients_of_a_mark_stay_bound() -> None:
    reals = tuple(DestinationSpec(f"10.1.0.{i}", 8080) for i in range(1, 5))
    spec = ServiceSpec(*fwmark_key(7), reals, persistence=600)
    active, standby = Director(1), Director(2)
    for director in (active, standby):
        director.dp.update([spec])
    for host in range(1, 5):
        for flags in "SAA":
            active.dp.process(packet(flags, 90, f"192.0.2.{host}"), mark=7)
    entries = active.after(2)
    templates = [entry for entry in entries if entry.flags & 0x1000]
    assert {(t.protocol, t.virtual, t.virtual_port, t.fwmark) for t in templates} == {
        (0, "0.0.0.7", 0, 7)
    }
    bound = {c.client: c.destination for c in active.connections()}
    standby.hear(templates)
    for client in reversed(bound):
        standby.dp.process(packet("S", 90, client), mark=7)
    assert {c.client: c.destination for c in standby.connections()} == bound


def test_a_kernels_connections_go_on() -> None:
    standby = Bench()
    for port, protocol, real in ((80, "tcp", 8080), (53, "udp", 5353)):
        standby.serve(("10.2.0.2", real), address="10.9.0.1", port=port, protocol=protocol)
        standby.serve(("fd02::2", real), address="fd09::1", port=port, protocol=protocol)
    standby.serve(("10.2.0.2", 8080), address="10.9.0.1", port=81, persistence=600)
    marked = DestinationSpec("10.2.0.2", 0)
    standby.dp.update([ServiceSpec(*fwmark_key(7), (marked,), persistence=500)])
    receiver = Receiver(standby.dp, 5)
    receiver.receive(KERNEL[0])
    assert receiver.stats.malformed_entries == 6  # calls bound by the SIP engine
    known = {(c.protocol, c.client_port): c for c in standby.connections()}
    assert {key: c.state for key, c in known.items()} == {
        ("tcp", 40001): "ESTABLISHED",
        ("tcp", 40002): "ESTABLISHED",
        ("udp", 40003): "UDP",
        ("udp", 40004): "UDP",
        ("tcp", 40005): "ESTABLISHED",
        ("tcp", 40007): "ESTABLISHED",
    }
    assert known["tcp", 40001].destination == "10.2.0.2"
    assert known["tcp", 40001].expires_in == pytest.approx(900)
    assert known["udp", 40004].destination_port == 5353
    assert known["tcp", 40007].fwmark == 7
    assert standby.dp.stats().persistence_templates == 2
    receiver.receive(KERNEL[1])
    receiver.receive(KERNEL[2])
    states = {(c.protocol, c.client_port): c.state for c in standby.connections()}
    assert states["tcp", 40001] == "TIME_WAIT"


def test_version_0_has_the_timeouts_of_the_states() -> None:
    standby = Bench()
    standby.serve(("10.2.0.2", 8080), address="10.9.0.1")
    standby.serve(("10.2.0.2", 8080), address="10.9.0.1", port=81, persistence=600)
    receiver = Receiver(standby.dp, 5)
    receiver.receive(KERNEL[3])
    left = {c.client_port: (c.state, c.expires_in) for c in standby.connections()}
    assert left[40005] == ("ESTABLISHED", pytest.approx(900))


# -- what is not for us, or wrong ----------------------------------------------------------------


def test_a_syncid_of_others_is_not_heard() -> None:
    director = Director()
    entry = SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)
    for message in encode([entry], 6):
        director.receiver.receive(message)
    assert director.receiver.stats.foreign == 1
    assert director.connections() == []
    everything = Receiver(director.dp, 0)
    for message in encode([entry], 6):
        everything.receive(message)
    assert len(director.connections()) == 1


def test_it_lacks_something_until_something_was_taken() -> None:
    director = Director()
    assert director.receiver.lacks_something()
    entry = SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)
    director.hear([replace(entry, virtual_port=81), replace(entry, destination="10.1.0.8")])
    assert director.receiver.lacks_something()
    director.hear([entry])
    assert not director.receiver.lacks_something()
    assert not Receiver(None, 5).lacks_something()


def test_it_lacks_something_when_services_come_later_than_connections() -> None:
    director = Director()
    entry = SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)
    director.hear([entry, replace(entry, virtual_port=81), replace(entry, destination="10.1.0.8")])
    assert not director.receiver.lacks_something()
    director.serve(("10.1.0.9", 8080), port=81)
    assert not director.receiver.lacks_something()  # that one is of no use
    director.serve(("10.1.0.9", 8080), REAL, port=81)
    assert director.receiver.lacks_something()
    assert not director.receiver.lacks_something()  # said once
    director.serve(REAL, ("10.1.0.8", 8080))
    assert director.receiver.lacks_something()


def test_what_is_not_served_here_is_counted() -> None:
    director = Director()
    entry = SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)
    director.hear([replace(entry, destination="10.1.0.8"), replace(entry, virtual_port=8)])
    assert director.outcomes() == {"no_destination": 1, "no_service": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 47},
        {"state": 11},
        {"protocol": 17, "state": 1},
        {"protocol": 132, "state": 14},
        {"flags": 0x1000, "state": 2},
        {"engine": "sip"},
    ],
)
def test_entries_that_make_no_sense_are_counted(change: dict[str, object]) -> None:
    director = Director()
    entry = SyncEntry(6, 0, 1, CLIENT[4], 40000, VIRTUAL[4], 80, *REAL, timeout=900)
    director.hear([replace(entry, **change), entry])
    assert director.receiver.stats.malformed_entries == 1
    assert director.outcomes() == {"created": 1}


def test_enemies_do_no_harm() -> None:
    """Random changes of a kernel's messages: nothing is raised, and the table holds."""
    draw = random.Random(3)
    director = Director()
    director.serve(("10.2.0.2", 8080), address="10.9.0.1")
    director.serve(("10.2.0.2", 8080), address="10.9.0.1", port=81, persistence=600)
    sent = 4000
    for _ in range(sent):
        data = bytearray(draw.choice(KERNEL))
        for _ in range(draw.randrange(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        del data[draw.randrange(4, 2 * len(data)) :]
        if draw.random() < 0.9:
            data[1:4] = b"\5" + len(data).to_bytes(2, "big")
        director.receiver.receive(bytes(data))
    stats = director.receiver.stats
    assert stats.messages + stats.foreign + stats.malformed == sent
    assert stats.malformed_entries
    assert stats.outcomes["created"]
    assert director.dp.stats().connections <= 4096
    for _ in range(3):
        director.now += 40 * 86400 * SECOND
        director.dp.sweep(director.now)
    assert director.dp.stats().connections == 0


def packet(flags: str, port: int, client: str = CLIENT[4]) -> bytearray:
    return wire.packet("tcp", client, 40000, VIRTUAL[4], port, flags)

"""The sync daemon on real sockets: two directors on one cable."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import wire

import svcdp
from svcdp.errors import PlatformError
from svcdp.ipvs import sender, syncd
from svcdp.ipvs.sync import SyncEntry, encode
from svcdp.ipvs.syncd import GROUP, PORT, SyncConfig, SyncDaemon
from svcdp.lab import Lab, Namespace, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
VIRTUAL, REAL, CLIENT = "10.96.0.10", ("10.1.0.7", 8080), "192.0.2.4"
ADDRESSES = {"left": "192.168.0.1", "right": "192.168.0.2"}
OTHER = {"left": "right", "right": "left"}

#: Starts the daemon of a place, with these settings.
Start = Callable[..., SyncDaemon]


class Place:
    """A namespace with a dataplane."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.dp = svcdp.Dataplane(4096)
        with self.dp.transaction() as tx:
            tx.service(VIRTUAL, 80).add(*REAL)

    def establish(self, port: int, to: int = 80) -> None:
        for flags in "SAA":
            self.dp.process(wire.packet("tcp", CLIENT, port, VIRTUAL, to, flags))

    def knows(self, *ports: int) -> bool:
        return {c.client_port for c in self.dp.connections()} == {*ports}


def connect(lab: Lab, left: Namespace, right: Namespace) -> None:
    lab.link(left, right)
    for place in (left, right):
        place.add_address(OTHER[place.name], f"{ADDRESSES[place.name]}/24")


@pytest.fixture
def places(lab: Lab) -> dict[str, Place]:
    places = {name: Place(lab.namespace(name)) for name in ADDRESSES}
    connect(lab, *(place.namespace for place in places.values()))
    return places


@pytest.fixture
def start(places: dict[str, Place]) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(name: str, **settings: Any) -> SyncDaemon:
            config = SyncConfig(**{"role": "both", "interface": OTHER[name], **settings})
            place = places[name]
            daemon = SyncDaemon(place.dp, config, netns=place.namespace.path)
            daemon.start()
            stack.callback(daemon.stop)
            return daemon

        yield start


def say(place: Place, *messages: bytes, to: str = GROUP) -> None:
    """Datagrams from a place's network."""

    def speak() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            name = OTHER[place.namespace.name].encode()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            for message in messages:
                sock.sendto(message, (to, PORT))

    place.namespace.call(speak)


def message(port: int) -> bytes:
    (data,) = encode([SyncEntry(6, 0, 1, CLIENT, port, VIRTUAL, 80, *REAL, timeout=900)], 0)
    return data


def test_a_backup_hears_and_a_master_tells(places: dict[str, Place], start: Start) -> None:
    master = start("left", role="master")
    backup = start("right", role="backup")
    places["left"].establish(40000)
    wait_until(lambda: places["right"].knows(40000), TIMEOUT, "the backup hears")
    places["right"].establish(40001)
    say(places["right"], message(40002))
    wait_until(lambda: master.stats().received.messages > 1, TIMEOUT, "the master gets it")
    assert places["left"].knows(40000)
    sent, received = master.stats(), backup.stats().received
    assert sent.sent.entries == sum(received.outcomes.values())
    assert (sent.errors, backup.stats().errors) == (0, 0)
    backup.stop()
    assert backup.stats().sent.entries == 0


def test_who_comes_later_is_told_all(places: dict[str, Place], start: Start) -> None:
    start("left")
    for port in range(40000, 41000):
        places["left"].establish(port)
    start("right")
    ports = range(40000, 41000)
    wait_until(lambda: places["right"].knows(*ports), 3 * TIMEOUT, "it is told all")


def test_who_gets_services_later_is_told_of_their_connections(
    places: dict[str, Place], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncd, "REQUEST_PAUSE", 0.5)
    monkeypatch.setattr(sender, "FULL_PAUSE", 0.5)
    left, right = places.values()
    with left.dp.transaction() as tx:
        tx.service(VIRTUAL, 81).add(*REAL)
    start("left", role="master")
    backup = start("right", role="backup")
    left.establish(40000)
    left.establish(40001, to=81)
    wanted = {"created", "no_service"}
    wait_until(lambda: backup.stats().received.outcomes.keys() >= wanted, TIMEOUT, "it hears")
    with right.dp.transaction() as tx:
        tx.service(VIRTUAL, 81).add(*REAL)
    wait_until(lambda: right.knows(40000, 40001), 2 * TIMEOUT, "it asks again")


def test_what_waits_is_said_at_the_end(places: dict[str, Place], start: Start) -> None:
    start("right", role="backup")
    master = start("left", role="master")
    places["left"].establish(40000)
    master.stop()
    master.stop()
    wait_until(lambda: places["right"].knows(40000), TIMEOUT, "the backup hears")


@pytest.mark.parametrize("version", [0, 1])
def test_both_versions(places: dict[str, Place], start: Start, version: int) -> None:
    start("right", syncid=7)
    start("left", syncid=7, version=version)
    places["left"].establish(40000)
    wait_until(lambda: places["right"].knows(40000), TIMEOUT, "the backup hears")


def test_rubbish_does_no_harm(places: dict[str, Place], start: Start) -> None:
    daemon = start("left")
    say(places["right"], b"", b"rubbish", bytes(2000), message(40000)[:-1], message(40000))
    wait_until(lambda: places["left"].knows(40000), TIMEOUT, "the good one is taken")
    daemon.check()
    assert daemon.stats().received.malformed == 4


def test_only_the_peer_is_heard(places: dict[str, Place], start: Start) -> None:
    right = places["right"]
    daemon = start("left", group=ADDRESSES["right"])
    right.namespace.add_address("left", "192.168.0.9/24")
    right.namespace.ip("route add 192.168.0.1/32 dev left src 192.168.0.9")
    say(right, message(40000), to=ADDRESSES["left"])
    wait_until(lambda: daemon.stats().strangers, TIMEOUT, "a stranger is counted")
    right.namespace.ip("route del 192.168.0.1/32 dev left")
    say(right, message(40001), to=ADDRESSES["left"])
    wait_until(lambda: places["left"].knows(40001), TIMEOUT, "the peer is heard")


def test_a_peer_by_its_link_local_address(places: dict[str, Place], start: Start) -> None:
    for name, last in (("left", 1), ("right", 2)):
        places[name].namespace.ip(f"addr add fe80::{last}/64 dev {OTHER[name]} nodad")
    start("right", role="backup", group="fe80::1")
    start("left", role="master", group="fe80::2")
    places["left"].establish(40000)
    wait_until(lambda: places["right"].knows(40000), TIMEOUT, "the backup hears")


def test_it_outlives_its_interface(places: dict[str, Place], start: Start, lab: Lab) -> None:
    """Down and up again; gone, and another by its name."""
    left, right = places.values()
    daemon = start("left", role="master", full_interval=1)
    start("right", role="backup")
    left.namespace.ip("link set right down")
    left.establish(40000)
    wait_until(lambda: daemon.stats().errors, TIMEOUT, "errors are counted")
    left.namespace.ip("link set right up")
    wait_until(lambda: right.knows(40000), TIMEOUT, "they talk again")
    left.namespace.ip("link delete right")
    errors = daemon.stats().errors
    wait_until(lambda: daemon.stats().errors > errors, TIMEOUT, "errors are counted")
    connect(lab, left.namespace, right.namespace)
    left.establish(40001)
    wait_until(lambda: right.knows(40000, 40001), TIMEOUT, "they talk again")
    daemon.check()


def test_what_cannot_be_opened(places: dict[str, Place], start: Start) -> None:
    with pytest.raises(PlatformError, match=r"cannot synchronise by 224\.0\.0\.81 port 8848 on no"):
        start("left", interface="no")
    daemon = start("left", group=ADDRESSES["right"])
    with pytest.raises(RuntimeError, match="started already"):
        daemon.start()
    with pytest.raises(PlatformError, match="Address already in use"):
        start("left", group=ADDRESSES["right"])

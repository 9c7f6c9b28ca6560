"""A gateway in user space: client - gateway - server, and the gateway has services in a TUN."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

import svcdp
from svcdp.io.tun import Tun
from svcdp.lab import Lab, Namespace, wait_until

pytestmark = pytest.mark.netns

VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
NOBODY = {4: "10.96.0.11", 6: "fd96::11"}
SERVER = {4: "10.1.1.11", 6: "fd01::11"}
CLIENT = {4: "192.0.2.10", 6: "2001:db8::10"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
TIMEOUT = 10.0


@pytest.fixture
def dp() -> svcdp.Dataplane:
    dp = svcdp.Dataplane(seed=1)
    with dp.transaction() as tx:
        for version in (4, 6):
            tx.service(VIRTUAL[version], 80).add(SERVER[version], 8080)
            tx.service(NOBODY[version], 80)
    return dp


@pytest.fixture
def gateway(lab: Lab) -> Namespace:
    client, gateway, server = map(lab.namespace, ("client", "gateway", "server"))
    lab.link(client, gateway)
    lab.link(gateway, server)
    client.add_address("gateway", f"{CLIENT[4]}/24", f"{CLIENT[6]}/64")
    gateway.add_address("client", "192.0.2.1/24", "2001:db8::1/64")
    gateway.add_address("server", "10.1.1.1/24", "fd01::1/64")
    server.add_address("gateway", f"{SERVER[4]}/24", f"{SERVER[6]}/64")
    client.ip("route add default via 192.0.2.1", "route add default via 2001:db8::1")
    server.ip("route add default via 10.1.1.1", "route add default via fd01::1")
    gateway.sysctl("net.ipv4.ip_forward", 1)
    gateway.sysctl("net.ipv6.conf.all.forwarding", 1)
    return gateway


@pytest.fixture
def tun(gateway: Namespace, dp: svcdp.Dataplane) -> Iterator[Tun]:
    """What goes to services and what servers send is routed into it."""
    with Tun(dp, "services", netns=gateway.full_name) as tun:
        gateway.sysctl("net.ipv4.conf.all.rp_filter", 0)
        gateway.sysctl(f"net.ipv4.conf.{tun.name}.rp_filter", 0)
        gateway.ip(f"link set {tun.name} up")
        for option, network in (("-4", "10.96.0.0/16"), ("-6", "fd96::/112")):
            for arguments in (
                f"route add {network} dev {tun.name}",
                f"route add default dev {tun.name} table 100",
                "rule add iif server lookup 100",
            ):
                gateway.run(["ip", option, *arguments.split()])
        yield tun


@pytest.fixture
def running(tun: Tun) -> Iterator[Tun]:
    thread = threading.Thread(target=tun.run)
    thread.start()
    yield tun
    tun.stop()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_through_the_gateway(lab: Lab, running: Tun, version: int) -> None:
    client, server = lab.namespaces["client"], lab.namespaces["server"]
    data = os.urandom(1 << 18)
    with (
        server.call(
            lambda: socket.create_server((SERVER[version], 8080), family=FAMILY[version])
        ) as listener,
        client.call(socket.create_connection, (VIRTUAL[version], 80), TIMEOUT) as connection,
    ):
        accepted, peer = listener.accept()
        assert peer[0] == CLIENT[version]
        with accepted:
            accepted.settimeout(TIMEOUT)
            sender = threading.Thread(target=accepted.sendall, args=(data,))
            sender.start()
            received = bytearray()
            while len(received) < len(data):
                received += connection.recv(1 << 16)
            sender.join(TIMEOUT)
            assert received == data


@pytest.mark.parametrize("version", [4, 6])
def test_rejected_clients_hear_of_it(lab: Lab, running: Tun, version: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.namespaces["client"].call(socket.create_connection, (NOBODY[version], 80), TIMEOUT)


def test_an_event_loop(lab: Lab, tun: Tun) -> None:
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(5):
                client.sendto(b"x", (NOBODY[4], 9))

    # What the kernel sends by itself on a new link.
    tun.process_ready()
    lab.namespaces["gateway"].call(send)
    assert select.select([tun], [], [], TIMEOUT)[0] == [tun]
    assert tun.process_ready(limit=3) == 3
    assert tun.process_ready() >= 2


def test_a_device_that_is_taken_away(gateway: Namespace, tun: Tun) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            tun.run()
        except svcdp.errors.PlatformError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    gateway.ip(f"link delete {tun.name}")
    thread.join(TIMEOUT)
    assert "was it removed?" in str(failures[0])


def test_a_closed_device(gateway: Namespace, dp: svcdp.Dataplane) -> None:
    tun = Tun(dp, "services", netns=gateway.full_name)
    tun.close()
    tun.close()
    tun.stop()
    for call in (tun.run, tun.process_ready, tun.fileno):
        with pytest.raises(svcdp.errors.ClosedError):
            call()
    wait_until(
        lambda: "services" not in gateway.run(["ip", "link"]).stdout, TIMEOUT, "it to be gone"
    )


@pytest.mark.parametrize("name", ["", "a-name-of-16-byte"])
def test_names_that_cannot_be(dp: svcdp.Dataplane, name: str) -> None:
    with pytest.raises(svcdp.errors.ConfigError):
        Tun(dp, name)


def test_a_name_that_is_taken(gateway: Namespace, dp: svcdp.Dataplane) -> None:
    with (
        Tun(dp, "services", netns=gateway.full_name),
        pytest.raises(svcdp.errors.PlatformError, match="services"),
    ):
        Tun(dp, "services", netns=gateway.full_name)

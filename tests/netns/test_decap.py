"""Tunnels on real traffic: a director without tunnel devices, and a real server with
``svcdp decap`` that answers the client directly."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import wire

import svcdp
from svcdp.cli.decap import RUN_DIR
from svcdp.io.decap import Decapsulator
from svcdp.io.tun import Tun
from svcdp.lab import Lab, Namespace, wait_until

pytestmark = pytest.mark.netns

VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
CLIENT = {4: "192.0.2.10", 6: "2001:db8::10"}
DIRECTOR = {4: "10.1.1.1", 6: "fd01::1"}
SERVER = {4: "10.1.1.11", 6: "fd01::11"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
PORT = 8080
MTU = 1500
TIMEOUT = 10.0

#: Starts ``svcdp decap`` on the server, with arguments; it stops at the end of the block.
Start = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def hosts(lab: Lab) -> dict[str, Namespace]:
    """Client and director, director and server are linked, and the server with the client."""
    client, director, server = map(lab.namespace, ("client", "director", "server"))
    lab.link(client, director)
    lab.link(director, server)
    lab.link(client, server)
    client.add_address("director", f"{CLIENT[4]}/24", f"{CLIENT[6]}/64")
    director.add_address("client", "192.0.2.1/24", "2001:db8::1/64")
    director.add_address("server", f"{DIRECTOR[4]}/24", f"{DIRECTOR[6]}/64")
    server.add_address("director", f"{SERVER[4]}/24", f"{SERVER[6]}/64")
    client.add_address("server", "203.0.113.1/24", "2001:db8:1::1/64")
    server.add_address("client", "203.0.113.2/24", "2001:db8:1::2/64")
    client.ip("route add default via 192.0.2.1", "route add default via 2001:db8::1")
    server.ip("route add default via 203.0.113.1", "route add default via 2001:db8:1::1")
    director.sysctl("net.ipv4.ip_forward", 1)
    director.sysctl("net.ipv6.conf.all.forwarding", 1)
    # Answers come by another interface than requests go.
    client.sysctl("net.ipv4.conf.all.rp_filter", 0)
    client.sysctl("net.ipv4.conf.server.rp_filter", 0)
    # A real server checks strictly, all but what comes out of tunnels.
    server.sysctl("net.ipv4.conf.all.rp_filter", 1)
    return {host.name: host for host in (client, director, server)}


@contextmanager
def directing(director: Namespace, version: int, tunnel: svcdp.TunnelSpec) -> Iterator[None]:
    """A director in user space, on a TUN device."""
    dp = svcdp.Dataplane(seed=1)
    with dp.transaction() as tx:
        for protocol in ("tcp", "udp"):
            tx.service(VIRTUAL[version], PORT, protocol).add(
                SERVER[6 if ":" in tunnel.source else 4],
                PORT,
                method="tunnel",
                tunnel=tunnel,
                mtu=MTU,
            )
    with Tun(dp, "services", netns=director.full_name) as tun:
        director.sysctl("net.ipv4.conf.all.rp_filter", 0)
        for key, value in (("rp_filter", 0), ("accept_local", 1)):
            director.sysctl(f"net.ipv4.conf.{tun.name}.{key}", value)
        director.ip(f"link set {tun.name} up", f"route add {VIRTUAL[version]} dev {tun.name}")
        thread = threading.Thread(target=tun.run)
        thread.start()
        try:
            yield
        finally:
            tun.stop()
            thread.join(TIMEOUT)


@pytest.fixture
def start(hosts: dict[str, Namespace]) -> Start:
    @contextmanager
    def start(*arguments: str) -> Iterator[subprocess.Popen[str]]:
        process = hosts["server"].popen(
            [sys.executable, "-m", "svcdp", "decap", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        try:
            assert "come out here" in process.stdout.readline(), process.communicate(
                timeout=TIMEOUT
            )
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT)

    return start


def tunnel(kind: Any, version: int, checksum: bool = False) -> svcdp.TunnelSpec:
    port = 6080 if kind == "gue" else 0
    return svcdp.TunnelSpec(kind, DIRECTOR[version], port, checksum)


def transfer(hosts: dict[str, Namespace], version: int, size: int = 1 << 18) -> None:
    """Send and receive over one TCP connection to the virtual address."""
    data = os.urandom(size)
    server, client = hosts["server"], hosts["client"]
    with (
        server.call(lambda: socket.create_server(("", PORT), family=FAMILY[version])) as listener,
        client.call(socket.create_connection, (VIRTUAL[version], PORT), TIMEOUT) as connection,
    ):
        accepted, peer = listener.accept()
        assert peer[0] == CLIENT[version]
        with accepted:
            accepted.settimeout(TIMEOUT)
            for sender, receiver in ((connection, accepted), (accepted, connection)):
                thread = threading.Thread(target=sender.sendall, args=(data,))
                thread.start()
                received = bytearray()
                while len(received) < len(data):
                    received += receiver.recv(1 << 16)
                thread.join(TIMEOUT)
                assert received == data


@pytest.mark.parametrize("inner", [4, 6], ids=["v4", "v6"])
@pytest.mark.parametrize("outer", [4, 6], ids=["in-v4", "in-v6"])
@pytest.mark.parametrize(
    ("kind", "checksum"),
    [("ipip", False), ("gre", False), ("gre", True), ("gue", False), ("gue", True)],
)
def test_tcp_through_a_tunnel(
    hosts: dict[str, Namespace], start: Start, kind: str, checksum: bool, outer: int, inner: int
) -> None:
    """The client's full-sized segments do not fit into the tunnel: it is told, and adapts."""
    arguments = ["--type", kind, "--vip", VIRTUAL[inner]]
    arguments += ["--local", SERVER[outer], "--from", DIRECTOR[outer]]
    with (
        directing(hosts["director"], inner, tunnel(kind, outer, checksum)),
        start(*arguments) as process,
    ):
        transfer(hosts, inner)
    assert process.stdout is not None
    numbers = re.search(r"(\d+) packets came out, (\d+) were refused", process.stdout.read())
    assert numbers is not None
    assert int(numbers[1]) > 100
    assert numbers[2] == "0"
    assert process.returncode == 0


def test_datagrams_in_fragments(hosts: dict[str, Namespace], start: Start) -> None:
    with (
        directing(hosts["director"], 4, tunnel("ipip", 4)),
        start("--vip", VIRTUAL[4]),
        hosts["server"].call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as server,
        hosts["client"].call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((VIRTUAL[4], PORT))
        server.settimeout(TIMEOUT)
        client.settimeout(TIMEOUT)
        payload = os.urandom(4000)
        client.sendto(payload, (VIRTUAL[4], PORT))
        received, peer = server.recvfrom(1 << 16)
        assert (received, peer[0]) == (payload, CLIENT[4])
        server.sendto(payload, peer)
        assert client.recvfrom(1 << 16) == (payload, (VIRTUAL[4], PORT))


def test_the_host_is_as_it_was(hosts: dict[str, Namespace], start: Start) -> None:
    server = hosts["server"]

    def state() -> tuple[str, str]:
        sysctls = server.run(["sysctl", "-a", "-r", r"^net\.ipv[46]\.conf\.(all|client)\."])
        addresses = server.run(["ip", "-brief", "address"])
        return sysctls.stdout, addresses.stdout

    server.sysctl("net.ipv4.conf.all.arp_announce", 1)
    before = state()
    with start("--vip", VIRTUAL[4], "--vip", VIRTUAL[6], "--device", "mine"):
        sysctls, addresses = state()
        assert "net.ipv4.conf.all.arp_ignore = 1" in sysctls
        assert "net.ipv4.conf.all.arp_announce = 2" in sysctls
        assert VIRTUAL[4] in addresses
        assert VIRTUAL[6] in addresses
        # Who asks for it on a link hears nothing.
        director = hosts["director"]
        director.sysctl("net.ipv4.neigh.server.retrans_time_ms", 20)
        director.ip(f"route add {VIRTUAL[4]} dev server")
        with director.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (VIRTUAL[4], PORT))
        asked = ["ip", "neigh", "show", VIRTUAL[4], "nud", "failed"]
        wait_until(lambda: director.run(asked).stdout, TIMEOUT, "ARP to give up")
    wait_until(lambda: "mine" not in state()[1], TIMEOUT, "the device to be gone")
    assert state() == before


def arp(host: Namespace) -> str:
    names = ("net.ipv4.conf.all.arp_ignore", "net.ipv4.conf.all.arp_announce")
    return host.run(["sysctl", "-n", *names]).stdout


def test_the_last_one_lets_the_host_speak_again(hosts: dict[str, Namespace], start: Start) -> None:
    server = hosts["server"]
    server.sysctl("net.ipv4.conf.all.arp_announce", 1)
    inode = server.call(lambda: os.stat("/proc/thread-self/ns/net").st_ino)
    file = Path(RUN_DIR) / f"arp-{inode}.json"
    before = arp(server)
    with ExitStack() as first:
        first.enter_context(start("--vip", VIRTUAL[4]))
        quiet = arp(server)
        with start("--vip", "10.96.0.11", "--device", "second"):
            first.close()
            assert arp(server) == quiet == "1\n2\n"
    assert arp(server) == before
    assert not file.exists()
    with start("--vip", VIRTUAL[4]) as process:
        process.kill()
        process.wait(TIMEOUT)
    assert arp(server) == quiet
    with start("--vip", VIRTUAL[4]):
        server.sysctl("net.ipv4.conf.all.arp_ignore", 8)  # by somebody else
    assert arp(server) == "8\n1\n"
    assert not file.exists()


@pytest.mark.parametrize("error", [errno.ENOBUFS, errno.ENOMEM, errno.EIO])
def test_a_device_without_room_loses_packets(
    hosts: dict[str, Namespace], monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    server = hosts["server"]
    tunnels = server.call(Decapsulator)
    write, device = os.write, tunnels._device
    left = [error]

    def fails_once(fd: int, data: bytes) -> int:
        if fd == device and left:
            raise OSError(left.pop(), "no room")
        return write(fd, data)

    monkeypatch.setattr(os, "write", fails_once)
    server.ip(f"link set {tunnels.name} up")
    thread = threading.Thread(target=tunnels.run)
    thread.start()
    try:
        with hosts["director"].call(socket.socket, socket.AF_INET, socket.SOCK_RAW, 4) as sender:
            for _ in range(2):
                inner = wire.packet("udp", CLIENT[4], 5, SERVER[4], PORT)
                sender.sendto(inner, (SERVER[4], 0))
            wait_until(lambda: tunnels.taken + tunnels.refused == 2, TIMEOUT, "both to come")
    finally:
        tunnels.stop()
        thread.join(TIMEOUT)
        tunnels.close()
    assert (tunnels.taken, tunnels.refused) == (1, 1)


def test_a_device_without_an_address_and_a_strict_host(start: Start) -> None:
    with start() as process:
        pass
    assert process.stderr is not None
    assert "net.ipv4.conf.all.rp_filter is on" in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--vip", "10.96.0.300"], 2, "10.96.0.300"),
        (["--from", "10.1.1.1/8"], 2, "host bits"),
        (["--local", "10.9.9.9"], 1, "10.9.9.9: IP protocol 4: Cannot assign"),
        (["--device", "a-name-of-16-byte"], 2, "1 to 15 bytes"),
        (["--device", "client"], 1, "client"),
        (["--type", "ip"], 2, "'ip' is not one of"),
        (["--port", "0"], 2, "0 is not in the range"),
        (["--vip", VIRTUAL[4], "--vip", VIRTUAL[4]], 1, "ip address add"),
    ],
)
def test_mistakes(
    hosts: dict[str, Namespace], arguments: list[str], status: int, message: str
) -> None:
    server = hosts["server"]
    before = server.run(["ip", "-brief", "address"]).stdout
    ended = server.run([sys.executable, "-m", "svcdp", "decap", *arguments], check=False)
    assert ended.returncode == status
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert server.run(["ip", "-brief", "address"]).stdout == before
    assert server.run(["sysctl", "-n", "net.ipv4.conf.all.arp_ignore"]).stdout == "0\n"


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--from", "10.1.1.2"], True),
        (["--from", "10.1.1.0/24"], False),
        (["--vip", "10.96.0.99"], True),
        ([], False),
    ],
)
def test_who_may_send_what(
    hosts: dict[str, Namespace], start: Start, arguments: list[str], refused: bool
) -> None:
    server, director = hosts["server"], hosts["director"]
    server.sysctl("net.ipv4.conf.all.rp_filter", 0)
    with (
        start(*arguments) as process,
        server.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        director.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, 4) as sender,
    ):
        receiver.bind((SERVER[4], PORT))
        receiver.settimeout(TIMEOUT)
        inner = wire.packet("udp", CLIENT[4], 5, SERVER[4], PORT, payload=b"hello")
        sender.sendto(inner, (SERVER[4], 0))
        if not refused:
            assert receiver.recv(100) == b"hello"
    assert process.stdout is not None
    assert f"{1 - refused} packets came out, {int(refused)} were" in process.stdout.read()

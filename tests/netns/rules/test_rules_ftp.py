"""FTP through a node: data connections in both modes belong to the service."""

from __future__ import annotations

import ftplib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from capture import PLAIN, TIMEOUT, Directing, server_addresses

from svcdp import DestinationSpec, ServiceSpec
from svcdp.lab import Namespace, Topology
from svcdp.lab.servers import PATTERN

pytestmark = pytest.mark.netns

DATA = PATTERN[:300000]


class FtpServer:
    """As much of RFC 959 and RFC 2428 as a download needs, for one client."""

    def __init__(self, place: Namespace, address: str) -> None:
        self._place = place
        self._address = address
        self._control = self._listen(21)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self._control.close()
        self._thread.join(TIMEOUT)

    def _listen(self, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        sock = self._place.call(lambda: socket.create_server((self._address, port), family=family))
        sock.settimeout(TIMEOUT)
        return sock

    def _serve(self) -> None:
        control, _ = self._control.accept()
        data: Callable[[], socket.socket] | None = None
        with control, control.makefile("rw", newline="\r\n") as lines:

            def say(text: str) -> None:
                lines.write(f"{text}\n")
                lines.flush()

            say("220 ready")
            while line := lines.readline().strip():
                verb, _, argument = line.partition(" ")
                if verb in ("PASV", "EPSV"):
                    listener = self._listen(0)
                    port = listener.getsockname()[1]
                    commas = f"{self._address},{port >> 8},{port & 255}".replace(".", ",")
                    say(f"227 here ({commas})" if verb == "PASV" else f"229 here (|||{port}|)")
                    data = partial(accept, listener)
                elif verb in ("PORT", "EPRT"):
                    data = partial(self._connect, peer_of(argument))
                    say("200 as you wish")
                elif verb == "RETR" and data:
                    say("150 it comes")
                    with data() as connection:
                        connection.sendall(DATA)
                    say("226 done")
                else:
                    say("221 bye" if verb == "QUIT" else "230 fine")

    def _connect(self, target: tuple[str, int]) -> socket.socket:
        """RFC 959: data comes from port 20."""
        return self._place.call(
            lambda: socket.create_connection(target, TIMEOUT, source_address=(self._address, 20))
        )


def accept(listener: socket.socket) -> socket.socket:
    """The one connection that comes."""
    with listener:
        return listener.accept()[0]


def peer_of(argument: str) -> tuple[str, int]:
    """The address that PORT or EPRT names."""
    if argument.startswith("|"):
        _, _, host, port, _ = argument.split("|")
        return host, int(port)
    *host, high, low = re.findall(r"\d+", argument)
    return ".".join(host), int(high) << 8 | int(low)


@pytest.fixture(params=[0, 1], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def server(cluster: Topology, family: int) -> Iterator[None]:
    ftp = FtpServer(cluster.servers[0].namespace, server_addresses(cluster, 0)[family])
    yield
    ftp.stop()


@pytest.mark.parametrize("cluster", [False, True], ids=["open", "firewall"], indirect=True)
@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
def test_download(
    cluster: Topology,
    server: None,
    directing: Directing,
    family: int,
    passive: bool,
) -> None:
    one = DestinationSpec(server_addresses(cluster, 0)[family], 21)

    def download() -> bytes:
        received = bytearray()
        with ftplib.FTP(timeout=TIMEOUT) as ftp:
            ftp.connect(PLAIN[family], 21)
            ftp.trust_server_pasv_ipv4_address = True
            ftp.set_pasv(passive)
            ftp.login()
            ftp.retrbinary("RETR file", received.extend)
        return bytes(received)

    with directing(ServiceSpec(PLAIN[family], 21, destinations=(one,), helper="ftp")):
        assert cluster.client.call(download) == DATA

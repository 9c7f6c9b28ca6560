"""FTP through a service, between Python's client and a server that does what the client asks."""

from __future__ import annotations

import ftplib
import socket
import threading
from itertools import product
from pathlib import Path

import pytest
from traffic import CLUSTER_IPS, TIMEOUT, Start, endpoint_slice, write_objects

from svcdp.lab import Server, Topology

pytestmark = [
    pytest.mark.netns,
    pytest.mark.parametrize("cluster", [False, True], indirect=True, ids=["plain", "firewall"]),
]

CONTROL = 2121
CONTENT = bytes(range(256)) * 4096


def write_service(folder: Path, server: Server) -> None:
    """Have one Service of port 21, with the helper, and this server behind it."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "files", "annotations": {"svcdp.io/helper": "ftp"}},
        "spec": {
            "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": CLUSTER_IPS[0],
            "clusterIPs": CLUSTER_IPS,
            "ports": [{"name": "ftp", "protocol": "TCP", "port": 21, "targetPort": CONTROL}],
        },
    }
    ports = [{"name": "ftp", "protocol": "TCP", "port": CONTROL}]
    slices = [
        endpoint_slice("files", family, ports, [{"addresses": [address]}])
        for family, address in (("IPv4", server.ipv4), ("IPv6", server.ipv6))
    ]
    write_objects(folder, service, *slices)


class FtpServer:
    """Serves one session, with one file in it. It tells its own address, as it knows no other."""

    def __init__(self, server: Server, family: socket.AddressFamily) -> None:
        self._namespace = server.namespace
        self._family = family
        self._address = server.ipv4 if family == socket.AF_INET else server.ipv6
        self._control = self._listen(CONTROL)
        self._data: socket.socket | None = None
        self._active: tuple[str, int] | None = None
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FtpServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(TIMEOUT)
        self._control.close()

    def _socket(self, port: int) -> socket.socket:
        made = self._namespace.call(socket.socket, self._family)
        made.settimeout(TIMEOUT)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self._address, port))
        return made

    def _listen(self, port: int) -> socket.socket:
        listening = self._socket(port)
        listening.listen()
        return listening

    def _serve(self) -> None:
        connection, _ = self._control.accept()
        connection.settimeout(TIMEOUT)
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b"220 ready\r\n")
            for line in lines:
                word, _, argument = line.decode().strip().partition(" ")
                connection.sendall(self._answer(word, argument))
                if word == "RETR":
                    self._send()
                    connection.sendall(b"226 done\r\n")
                if word == "QUIT":
                    return

    def _answer(self, word: str, argument: str) -> bytes:
        if word in ("PASV", "EPSV"):
            self._data = self._listen(0)
            port = self._data.getsockname()[1]
            if word == "EPSV":
                return f"229 Extended Passive (|||{port}|)\r\n".encode()
            numbers = f"{self._address.replace('.', ',')},{port >> 8},{port & 255}"
            return f"227 Entering Passive Mode ({numbers}).\r\n".encode()
        if word == "PORT":
            *address, high, low = argument.split(",")
            self._active = (".".join(address), int(high) << 8 | int(low))
        if word == "EPRT":
            _, _, host, port_text, _ = argument.split(argument[0])
            self._active = (host, int(port_text))
        return {"USER": b"230 in\r\n", "RETR": b"150 here\r\n", "QUIT": b"221 bye\r\n"}.get(
            word, b"200 ok\r\n"
        )

    def _send(self) -> None:
        if self._active is not None:
            connection = self._socket(CONTROL - 1)
            connection.connect(self._active)
            self._active = None
        else:
            assert self._data is not None
            with self._data:
                connection, _ = self._data.accept()
        with connection:
            connection.sendall(CONTENT)


@pytest.mark.parametrize("passive", [True, False], ids=["passive", "active"])
def test_transfers(cluster: Topology, folder: Path, start: Start, passive: bool) -> None:
    """Both ways to open a data connection, three times in one session.

    The client from outside is masqueraded, so that only passive ones can reach it.
    """
    server, neighbour = cluster.servers[:2]
    write_service(folder / "manifests", server)

    def session(address: str) -> list[bytes]:
        files = []
        with ftplib.FTP(timeout=TIMEOUT) as ftp:
            ftp.connect(address, 21)
            ftp.login()
            ftp.set_pasv(passive)
            # Connect where the server says, as old clients do.
            ftp.trust_server_pasv_ipv4_address = True
            for _ in range(3):
                parts: list[bytes] = []
                ftp.retrbinary("RETR file", parts.append)
                files.append(b"".join(parts))
        return files

    sources = [neighbour.namespace, cluster.client][: 2 if passive else 1]
    with start():
        for source, address in product(sources, CLUSTER_IPS):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with FtpServer(server, family):
                assert source.call(session, address) == [CONTENT] * 3

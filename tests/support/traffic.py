"""Manifests for a lab's servers, and clients that notice what happens to their connections."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, Self

import pytest

from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Namespace, Server, Topology, wait_until

CLUSTER_IPS = ("10.96.0.10", "fd00:10:96::a")
PORT, NODE_PORT = 80, 30080
UDP_PORT = 53
#: Of the servers: HTTP, where a firewall lets clients connect directly too, and UDP.
PORTS = (9000, 5353)
TIMEOUT = 10.0  # seconds; a lost SYN is sent again within
SILENCE = 1.5  # seconds in which a refusal would have come
PHASE_TIMEOUT = 60.0  # seconds

Target = tuple[str, int]
#: Starts the daemon with more settings; it stops at the end of the block.
Start = Callable[..., AbstractContextManager[RunningDaemon]]

#: The node of ``cluster`` forwards only what the daemon or a rule of its own lets pass.
firewall = pytest.mark.parametrize("cluster", [True], indirect=True, ids=["firewall"])


def write_service(
    folder: Path,
    servers: Sequence[Server],
    weights: Mapping[str, int] | None = None,
    ports: tuple[int, int] = PORTS,
    terminating: Sequence[Server] = (),
) -> None:
    """Have one Service with these endpoints, in one step. ``weights`` are by server name. Those
    that are ``terminating`` serve.
    """
    texts = [f"{a}={(weights or {}).get(s.name, 1)}" for s in servers for a in (s.ipv4, s.ipv6)]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "annotations": {"svcdp.io/weights": ",".join(texts)}},
        "spec": {
            "type": "NodePort",
            "ipFamilies": ["IPv4", "IPv6"],
            "clusterIP": CLUSTER_IPS[0],
            "clusterIPs": CLUSTER_IPS,
            "ports": [
                {"name": "http", "protocol": "TCP", "port": PORT, "nodePort": NODE_PORT},
                {"name": "echo", "protocol": "UDP", "port": UDP_PORT},
            ],
        },
    }
    endpoint_ports = [
        {"name": "http", "protocol": "TCP", "port": ports[0]},
        {"name": "echo", "protocol": "UDP", "port": ports[1]},
    ]
    conditions = [
        {"ready": False, "serving": True, "terminating": True} if each in terminating else {}
        for each in servers
    ]
    slices = [
        endpoint_slice(
            "web",
            family,
            endpoint_ports,
            [
                {"addresses": [address], "conditions": each}
                for address, each in zip(addresses, conditions, strict=True)
            ],
        )
        for family, addresses in (
            ("IPv4", [server.ipv4 for server in servers]),
            ("IPv6", [server.ipv6 for server in servers]),
        )
    ]
    write_objects(folder, service, *slices)


def endpoint_slice(
    service: str,
    family: str,
    ports: Sequence[Mapping[str, Any]],
    endpoints: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest of a Service's endpoints of one IP family."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service}-{family.lower()}",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family,
        "ports": ports,
        "endpoints": endpoints,
    }


def write_objects(folder: Path, *objects: Mapping[str, Any], name: str = "web") -> None:
    """Have these in ``folder``, as one file and in one step."""
    hidden = folder / f".{name}.json"
    hidden.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    os.replace(hidden, folder / f"{name}.json")


def targets(topology: Topology) -> list[Target]:
    """All addresses of the HTTP port."""
    return [
        *((address, PORT) for address in CLUSTER_IPS),
        *((address, NODE_PORT) for address in (topology.node_ipv4, topology.node_ipv6)),
    ]


class Kept:
    """One HTTP connection from a namespace, never opened again."""

    def __init__(self, source: Namespace, target: Target, timeout: float = TIMEOUT) -> None:
        self._connection = http.client.HTTPConnection(*target, timeout=timeout)
        self._connection.auto_open = 0
        source.call(self._connection.connect)

    def ask(self) -> dict[str, Any]:
        """Who serves, and whom it sees: ``{"server": "a", "client": ["192.0.2.10", 40000]}``."""
        self._connection.request("GET", "/")
        return dict(json.loads(self._connection.getresponse().read()))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(source: Namespace, target: Target) -> dict[str, Any]:
    """One request over a connection of its own."""
    with Kept(source, target) as connection:
        return connection.ask()


def meets(source: Namespace, target: Target) -> str:
    """What a client meets: the name of who serves it, or "refused" or "silence"."""
    try:
        with Kept(source, target, SILENCE) as connection:
            return str(connection.ask()["server"])
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silence"


def all_meet(sources: Iterable[Namespace], targets: Iterable[Target]) -> set[str]:
    """What these meet there, all at once: silence is waited for once."""
    pairs = list(product(sources, targets))
    with ThreadPoolExecutor(len(pairs)) as pool:
        return set(pool.map(lambda pair: meets(*pair), pairs))


def ask_udp(source: Namespace, target: Target, payload: bytes = b"hello") -> bytes:
    """One datagram from a socket of its own, and its answer."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with source.call(socket.socket, family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(target)
        sock.send(payload)
        return sock.recv(65535)


class Load:
    """Asks all targets over new connections without pause, a thread each, until the block ends.

    A request belongs to the phase in which it began.
    """

    def __init__(self, source: Namespace, targets: Iterable[Target]) -> None:
        self.failures: list[str] = []
        self._targets = list(targets)
        self._phases: list[list[tuple[Target, str]]] = [[]]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=source.call, args=(self._run, target))
            for target in self._targets
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        """Requests so far."""
        return sum(len(phase) for phase in self._phases)

    def servers(self, count: int) -> set[str]:
        """Begin a phase; the names of those who answer, once every target did ``count`` times."""
        phase: list[tuple[Target, str]] = []
        self._phases.append(phase)

        def enough() -> bool:
            seen = Counter(target for target, _ in list(phase))
            return bool(self.failures) or min(seen[target] for target in self._targets) >= count

        wait_until(enough, PHASE_TIMEOUT, f"{count} answers from each of {self._targets}")
        assert self.failures == []
        return {server for _, server in list(phase)}

    def _run(self, target: Target) -> None:
        while not self._stop.is_set():
            phase = self._phases[-1]
            connection = http.client.HTTPConnection(*target, timeout=TIMEOUT)
            try:
                connection.request("GET", "/")
                phase.append((target, json.loads(connection.getresponse().read())["server"]))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{target}: {error!r}")
            finally:
                connection.close()

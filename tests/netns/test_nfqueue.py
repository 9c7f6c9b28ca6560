"""The queue loop on real packets: client - node - server, the node's kernel sends them to us."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import svcdp
from svcdp.io import nfqueue
from svcdp.io.nfqueue import FORWARD_MARK, PASS_MARK, NFQueue, QueueWorkers
from svcdp.lab import Lab, Namespace, wait_until

pytestmark = pytest.mark.netns

VIRTUAL = {4: "10.96.0.10", 6: "fd96::10"}
NOBODY = {4: "10.96.0.11", 6: "fd96::11"}
SERVER = {4: "10.1.1.11", 6: "fd01::11"}
CLIENT = {4: "192.0.2.10", 6: "2001:db8::10"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
TIMEOUT = 10.0

RULES = """*raw
:PREROUTING ACCEPT
:OUTPUT ACCEPT
:SVCDP -
-A PREROUTING -j SVCDP
-A OUTPUT -j SVCDP
-A SVCDP -m mark --mark {passed:#x}/{passed:#x} -m comment --comment passed -j RETURN
-A SVCDP -m mark --mark {forwarded:#x}/{forwarded:#x} -m comment --comment forwarded -j RETURN
-A SVCDP -d {virtual} -j NFQUEUE --queue-balance 0:1
-A SVCDP -d {nobody} -j NFQUEUE --queue-balance 0:1
-A SVCDP -s {server} -j NFQUEUE --queue-balance 0:1
COMMIT
"""


class Path:
    """A client, a node that forwards, a server; the node's rules send services to queues 0, 1."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.node, self.server = map(lab.namespace, ("client", "node", "server"))
        lab.link(self.client, self.node)
        lab.link(self.node, self.server)
        self.client.add_address("node", f"{CLIENT[4]}/24", f"{CLIENT[6]}/64")
        self.node.add_address("client", "192.0.2.1/24", "2001:db8::1/64")
        self.node.add_address("server", "10.1.1.1/24", "fd01::1/64")
        self.server.add_address("node", f"{SERVER[4]}/24", f"{SERVER[6]}/64")
        self.client.ip("route add default via 192.0.2.1", "route add default via 2001:db8::1")
        self.server.ip("route add default via 10.1.1.1", "route add default via fd01::1")
        # The node's own clients need some route before the OUTPUT hook is reached.
        self.node.ip(f"route add {VIRTUAL[4]} dev server", f"route add {VIRTUAL[6]} dev server")
        self.node.sysctl("net.ipv4.ip_forward", 1)
        self.node.sysctl("net.ipv6.conf.all.forwarding", 1)
        for version, tool in ((4, "iptables-restore"), (6, "ip6tables-restore")):
            self.node.run(
                [tool],
                input=RULES.format(
                    virtual=VIRTUAL[version],
                    nobody=NOBODY[version],
                    server=SERVER[version],
                    passed=PASS_MARK,
                    forwarded=FORWARD_MARK,
                ),
            )

    def only_rule(self, *rule: str) -> None:
        """Have one rule in place of the others, for IPv4."""
        self.node.run(["iptables", "-t", "raw", "-F", "SVCDP"])
        self.node.run(["iptables", "-t", "raw", "-A", "SVCDP", *rule])

    def counted(self, comment: str, version: int = 4) -> int:
        """Packets that a rule has seen."""
        tool = "iptables-save" if version == 4 else "ip6tables-save"
        lines = self.node.run([tool, "-c", "-t", "raw"]).stdout.splitlines()
        (line,) = (line for line in lines if f"--comment {comment}" in line)
        return int(line[1:].split(":")[0])


@pytest.fixture
def path(lab: Lab) -> Path:
    return Path(lab)


@pytest.fixture
def dp() -> svcdp.Dataplane:
    dp = svcdp.Dataplane(seed=1)
    with dp.transaction() as tx:
        for version in (4, 6):
            for protocol in ("tcp", "udp"):
                tx.service(VIRTUAL[version], 80, protocol).add(SERVER[version], 8080)
                tx.service(NOBODY[version], 80, protocol)
    return dp


@contextmanager
def served(dp: svcdp.Dataplane, path: Path, **settings: Any) -> Iterator[QueueWorkers]:
    workers = QueueWorkers(dp, 0, 1, netns=path.node.full_name, **settings)
    workers.start()
    try:
        yield workers
    finally:
        workers.stop()
        workers.check()


def totals(workers: QueueWorkers) -> Callable[[str], int]:
    stats = workers.stats().values()
    return lambda field: sum(getattr(each, field) for each in stats)


def listen(path: Path, version: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    def open_here() -> socket.socket:
        server = socket.socket(FAMILY[version], kind)
        server.settimeout(TIMEOUT)
        server.bind((SERVER[version], 8080))
        if kind == socket.SOCK_STREAM:
            server.listen()
        return server

    return path.server.call(open_here)


def receive_all(connection: socket.socket) -> str:
    digest = hashlib.sha256()
    while data := connection.recv(1 << 16):
        digest.update(data)
    return digest.hexdigest()


def send_all(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def transfer(path: Path, version: int, size: int, source: Namespace) -> None:
    """Random bytes both ways over one connection through the virtual address."""
    data = os.urandom(size)
    expected = hashlib.sha256(data).hexdigest()
    with (
        listen(path, version) as listener,
        source.call(socket.create_connection, (VIRTUAL[version], 80), TIMEOUT) as client,
    ):
        server, peer = listener.accept()
        with server:
            server.settimeout(TIMEOUT)
            if source is path.client:
                assert peer[0] == CLIENT[version]
            assert client.getpeername()[0] == VIRTUAL[version]
            senders = [
                threading.Thread(target=send_all, args=(end, data)) for end in (client, server)
            ]
            digests: list[str] = []
            receiver = threading.Thread(target=lambda: digests.append(receive_all(server)))
            for thread in (*senders, receiver):
                thread.start()
            assert receive_all(client) == expected
            for thread in (*senders, receiver):
                thread.join(TIMEOUT)
            assert digests == [expected]


@pytest.mark.parametrize("gso", [True, False], ids=["gso", "no-gso"])
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_of_a_client_arrives_intact(
    path: Path, dp: svcdp.Dataplane, version: int, gso: bool
) -> None:
    with served(dp, path, gso=gso) as workers:
        transfer(path, version, 4 << 20, path.client)
    total = totals(workers)
    assert total("received") == total("verdicts") > 0
    assert total("errors") == total("truncated") == 0
    # Each came back to the head of its chain, marked. (Neighbour discovery of IPv6 passed.)
    marked = path.counted("forwarded", version) + path.counted("passed", version)
    assert marked == total("verdicts")


@pytest.mark.parametrize("gso", [True, False], ids=["gso", "no-gso"])
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_of_the_node_itself_arrives_intact(
    path: Path, dp: svcdp.Dataplane, version: int, gso: bool
) -> None:
    with served(dp, path, gso=gso):
        transfer(path, version, 4 << 20, path.node)


def test_rules_that_know_no_marks_do_not_loop(path: Path, dp: svcdp.Dataplane) -> None:
    path.only_rule("-j", "NFQUEUE", "--queue-num", "0")
    with served(dp, path) as workers:
        flood(path, 1)
        wait_until(lambda: totals(workers)("verdicts"), TIMEOUT, "the packet")
        transfer(path, 4, 1 << 16, path.client)


def test_without_repeat_packets_are_accepted(path: Path, dp: svcdp.Dataplane) -> None:
    with served(dp, path, repeat=False):
        transfer(path, 4, 1 << 16, path.client)
    assert path.counted("forwarded") == 0


@pytest.mark.parametrize("version", [4, 6])
def test_udp_of_every_size(path: Path, dp: svcdp.Dataplane, version: int) -> None:
    sizes = [0, 1, 2, 3, 17, 500, 1400, 1440]

    def open_here() -> socket.socket:
        client = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
        client.settimeout(TIMEOUT)
        client.connect((VIRTUAL[version], 80))
        return client

    with (
        served(dp, path),
        listen(path, version, socket.SOCK_DGRAM) as server,
        path.client.call(open_here) as client,
    ):
        for size in sizes:
            payload = os.urandom(size)
            client.send(payload)
            received, peer = server.recvfrom(2048)
            assert received == payload
            assert peer[0] == CLIENT[version]
            server.sendto(payload[::-1], peer)
            assert client.recv(2048) == payload[::-1]


@pytest.mark.parametrize("source", ["client", "node"])
@pytest.mark.parametrize("version", [4, 6])
def test_rejected_clients_hear_of_it(
    path: Path, dp: svcdp.Dataplane, version: int, source: str
) -> None:
    # The node's own clients need some route to the address.
    path.node.ip(f"route add {NOBODY[version]} dev server")
    space = {"client": path.client, "node": path.node}[source]
    with served(dp, path) as workers:
        with pytest.raises(ConnectionRefusedError):
            space.call(socket.create_connection, (NOBODY[version], 80), TIMEOUT)

        def ask() -> None:
            with socket.socket(FAMILY[version], socket.SOCK_DGRAM) as client:
                client.settimeout(TIMEOUT)
                client.connect((NOBODY[version], 80))
                client.send(b"anybody?")
                client.recv(1)

        with pytest.raises(ConnectionRefusedError):
            space.call(ask)
        # The client may hear of it before the worker has counted it.
        wait_until(lambda: totals(workers)("answers") == 2, TIMEOUT, "both answers")
        assert totals(workers)("errors") == 0


def test_verdicts_that_do_not_fit_go_one_by_one(path: Path, dp: svcdp.Dataplane) -> None:
    count, payload = 40, bytes(1000)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(count):
                client.sendto(payload, (VIRTUAL[4], 80))

    path.only_rule("-m", "mark", "--mark", "0", "-j", "NFQUEUE")
    with (
        listen(path, 4, socket.SOCK_DGRAM) as server,
        NFQueue(dp, 0, netns=path.node.full_name) as queue,
        socket.socket(fileno=os.dup(queue.fileno())) as same,
    ):
        # The kernel's least, some 4 KiB: a group of these packets is more, one is less.
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        path.client.call(send)
        assert queue.process_ready() == count
        stats = queue.stats()
        assert (stats.received, stats.verdicts, stats.waiting) == (count, count, 0)
        assert stats.errors > 0
        for _ in range(count):
            assert server.recv(2000) == payload


def test_what_is_no_service_passes_as_it_was(path: Path, dp: svcdp.Dataplane) -> None:
    with (
        served(dp, path) as workers,
        listen(path, 4) as listener,
        path.client.call(socket.create_connection, (SERVER[4], 8080), TIMEOUT) as client,
    ):
        server, _ = listener.accept()
        with server:
            server.sendall(b"directly")
            assert client.recv(100) == b"directly"
    # What the server sends is captured, since it might be the reply of a service.
    assert totals(workers)("received") == path.counted("passed") > 0
    assert path.counted("forwarded") == 0


def flood(path: Path, count: int) -> None:
    """UDP packets of one flow to a port of nobody's, captured, for the queue to pass."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(count):
                client.sendto(b"x", (VIRTUAL[4], 9))

    path.client.call(send)


@pytest.mark.parametrize("fail_open", [True, False])
def test_a_full_queue(path: Path, dp: svcdp.Dataplane, fail_open: bool) -> None:
    queues = [
        NFQueue(dp, number, max_packets=5, fail_open=fail_open, netns=path.node.full_name)
        for number in (0, 1)
    ]
    try:
        flood(path, 20)
        (used,) = [queue for queue in queues if queue.stats().waiting]
        assert used.stats().waiting == 5
        assert used.stats().dropped_kernel == (0 if fail_open else 15)
        assert used.process_ready() == 5
        after = used.stats()
        assert (after.waiting, after.received, after.verdicts, after.errors) == (0, 5, 5, 0)
    finally:
        for queue in queues:
            queue.close()


def test_packets_wait_for_halted_workers(path: Path, dp: svcdp.Dataplane) -> None:
    with served(dp, path) as workers:
        workers.halt()
        flood(path, 20)
        assert totals(workers)("waiting") == 20
        assert totals(workers)("received") == 0


def test_an_event_loop(path: Path, dp: svcdp.Dataplane) -> None:
    with (
        NFQueue(dp, 0, netns=path.node.full_name) as first,
        NFQueue(dp, 1, netns=path.node.full_name) as second,
    ):
        assert first.process_ready() == 0
        flood(path, 200)
        ready, _, _ = select.select([first, second], [], [], TIMEOUT)
        (queue,) = ready
        # Bounded: a group of messages at a time.
        assert 0 < queue.process_ready(limit=1) < 200
        wait_until(lambda: queue.process_ready() == 0, TIMEOUT, "the queue to be empty")
        assert queue.stats().received == queue.stats().verdicts == 200


def test_stop_from_another_thread_and_before(path: Path, dp: svcdp.Dataplane) -> None:
    with NFQueue(dp, 0, netns=path.node.full_name) as queue:
        queue.stop()
        queue.run()
        started = threading.Event()

        def run() -> None:
            started.set()
            queue.run()

        thread = threading.Thread(target=run)
        thread.start()
        started.wait(TIMEOUT)
        queue.stop()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    queue.stop()
    with pytest.raises(svcdp.errors.ClosedError):
        queue.run()
    with pytest.raises(svcdp.errors.ClosedError):
        queue.process_ready()
    assert queue.stats().waiting == 0


def test_a_running_queue_is_not_closed(path: Path, dp: svcdp.Dataplane) -> None:
    queue = NFQueue(dp, 0, netns=path.node.full_name)
    flood(path, 1)
    thread = threading.Thread(target=queue.run)
    thread.start()
    wait_until(lambda: _refuses_close(queue), TIMEOUT, "the queue to run")
    queue.stop()
    thread.join(TIMEOUT)
    queue.close()
    queue.close()


def _refuses_close(queue: NFQueue) -> bool:
    # A second run is refused exactly while there is a first one.
    try:
        queue.process_ready()
    except RuntimeError:
        with pytest.raises(RuntimeError, match="stop"):
            queue.close()
        return True
    return False


def test_a_queue_that_is_taken(path: Path, dp: svcdp.Dataplane) -> None:
    with NFQueue(dp, 1, netns=path.node.full_name):
        workers = QueueWorkers(dp, 0, 1, netns=path.node.full_name)
        with pytest.raises(svcdp.errors.PlatformError, match="queue 1 is taken") as caught:
            workers.start()
        assert caught.value.errno == errno.EBUSY
        workers.stop()
        # Nothing stays bound of the half.
        NFQueue(dp, 0, netns=path.node.full_name).close()


def test_the_callers_namespace_stays(path: Path, dp: svcdp.Dataplane) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    with (
        NFQueue(dp, 0, netns=str(path.node.path)),
        open(path.node.path) as file,
        NFQueue(dp, 1, netns=file.fileno()),
    ):
        assert os.readlink("/proc/thread-self/ns/net") == before
        table = path.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
        assert [line.split()[0] for line in table.splitlines()] == ["0", "1"]
    with pytest.raises(svcdp.errors.PlatformError, match="no-such-namespace"):
        NFQueue(dp, 0, netns="no-such-namespace")


def test_without_capabilities(path: Path) -> None:
    program = (
        "import os, svcdp\n"
        "from svcdp.io.nfqueue import NFQueue\n"
        "dp = svcdp.Dataplane()\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    NFQueue(dp, 0)\n"
        "except svcdp.errors.MissingCapability as error:\n"
        "    print(error)\n"
    )
    result = path.node.run([sys.executable, "-c", program])
    assert "CAP_NET_ADMIN" in result.stdout


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (-1, {}),
        (65536, {}),
        (0, {"forward_mark": 1 << 32}),
        (0, {"forward_mark": 3, "pass_mark": 1}),
        (0, {"max_packets": 0}),
        (0, {"max_packets": 1 << 32}),
        (0, {"receive_buffer": 1 << 31}),
    ],
)
def test_wrong_settings(dp: svcdp.Dataplane, number: int, settings: dict[str, int]) -> None:
    with pytest.raises(svcdp.errors.ConfigError):
        NFQueue(dp, number, **settings)  # type: ignore[arg-type]


def test_a_worker_that_dies(
    path: Path, dp: svcdp.Dataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = NFQueue.run

    def fail(queue: NFQueue) -> None:
        if queue.number == 0:
            raise OSError(errno.ENOMEM, "out of memory")
        run(queue)

    monkeypatch.setattr(nfqueue.NFQueue, "run", fail)
    workers = QueueWorkers(dp, 0, 1, netns=path.node.full_name)
    workers.start()
    try:
        wait_until(lambda: workers.error, TIMEOUT, "the error of the worker")
        with pytest.raises(svcdp.errors.PlatformError, match="no longer served") as caught:
            workers.check()
        assert isinstance(caught.value.__cause__, OSError)
        path.only_rule("-j", "NFQUEUE", "--queue-num", "1")
        transfer(path, 4, 1 << 16, path.client)
    finally:
        workers.stop()
    with pytest.raises(svcdp.errors.PlatformError):
        workers.check()


def test_interrupted_by_a_signal(path: Path) -> None:
    """Ctrl-C ends a run() in the main thread."""
    program = (
        "import svcdp\n"
        "from svcdp.io.nfqueue import NFQueue\n"
        "queue = NFQueue(svcdp.Dataplane(), 0)\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    queue.run()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    process = path.node.popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_until(
        lambda: b"poll" in _wait_channel(process.pid), TIMEOUT, "the queue to wait for packets"
    )
    process.send_signal(2)
    assert process.communicate(timeout=TIMEOUT)[0] == "interrupted\n"


def _wait_channel(pid: int) -> bytes:
    with open(f"/proc/{pid}/wchan", "rb") as file:
        return file.read()

"""``svcdp get``: the tables, against an admin socket with known answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from svcdp.cli import get
from svcdp.cli.group import run
from svcdp.node.admin import AdminServer

WEB = {
    "namespace": "default",
    "name": "web",
    "type": "NodePort",
    "clusterIPs": ["10.96.0.10", "fd00:10:96::a"],
    "ports": [
        {"name": "http", "port": 80, "lastPort": None, "nodePort": 30080, "protocol": "TCP"},
        {"name": "dns", "port": 53, "lastPort": None, "nodePort": None, "protocol": "UDP"},
    ],
    "externalIPs": [],
    "loadBalancerIPs": [],
    "loadBalancerHostnames": [],
    "externalName": "",
    "selector": {"tier": "front", "app": "web"},
    "creationTimestamp": None,
    "schedulers": ["wrr"],
    "endpoints": 3,
    "endpointsReady": 2,
}
CART = {**WEB, "namespace": "shop", "name": "cart", "type": "ClusterIP", "clusterIPs": []}
CART |= {"ports": [], "schedulers": [], "creationTimestamp": "2020-01-01T00:00:00Z"}
ENDPOINT = {
    "namespace": "default",
    "service": "web:http",
    "protocol": "tcp",
    "virtual": "fd00:10:96::a",
    "virtualPort": 80,
    "address": "fd00::1",
    "port": 8080,
    "weight": 1,
    "method": "masq",
    "active": 2,
    "inactive": 3,
    "connections": 9,
    "packetsIn": 1,
    "packetsOut": 2,
    "bytesIn": 3,
    "bytesOut": 4,
}
CONNECTION = {
    "protocol": "tcp",
    "client": "192.0.2.9",
    "clientPort": 40000,
    "virtual": "10.96.0.10",
    "virtualPort": 80,
    "destination": "10.1.0.1",
    "destinationPort": 8080,
    "source": "192.0.2.1",
    "sourcePort": 61000,
    "state": "established",
    "expiresIn": 899.5,
    "packets": 12,
}
POD = {
    "namespace": "default",
    "name": "web-0",
    "phase": "Running",
    "ready": True,
    "ips": ["10.1.0.1", "fd00::1"],
    "node": "n1",
    "services": ["web", "web-2"],
}
QUEUE = {
    "queue": 100,
    "received": 9,
    "verdicts": 8,
    "truncated": 0,
    "answers": 1,
    "errors": 0,
    "overruns": 0,
    "dropped_kernel": 2,
    "dropped_user": 3,
    "waiting": 1,
}
POOL: dict[str, Any] = {
    "name": "lan",
    "addresses": ["192.0.2.0/28", "2001:db8::10-2001:db8::1f"],
    "size": 30,
    "used": 3,
    "free": 27,
    "autoAssign": False,
    "namespaces": ["shop"],
    "serviceSelector": {
        "matchLabels": {"b": "2", "a": "1"},
        "matchExpressions": [
            {"key": "zone", "operator": "In", "values": ["b", "a"]},
            {"key": "old", "operator": "NotIn", "values": ["yes"]},
            {"key": "public", "operator": "Exists", "values": None},
            {"key": "private", "operator": "DoesNotExist", "values": None},
        ],
    },
    "creationTimestamp": None,
}
ANSWERS: dict[str, list[dict[str, Any]]] = {
    "services": [WEB, CART],
    "endpoints": [ENDPOINT],
    "pods": [POD, {**POD, "name": "job", "phase": "", "ready": False, "ips": [], "services": []}],
    "pools": [
        POOL,
        {**POOL, "name": "all", "namespaces": [], "autoAssign": True, "serviceSelector": None},
    ],
    "connections": [CONNECTION],
    "queues": [QUEUE],
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """An admin socket that answers from ``ANSWERS``; its path."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    path = str(tmp_path / "admin.sock")

    def answer(name: str) -> Any:
        def handler(request: Any) -> Any:
            wanted = request.get("namespace")
            return [i for i in ANSWERS[name] if wanted in (None, i.get("namespace"))]

        return handler

    async def serve() -> None:
        server = AdminServer(path, {name: answer(name) for name in ANSWERS})
        await server.start()
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await server.close()

    task = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    assert started.wait(10)
    yield path
    loop.call_soon_threadsafe(task.cancel)
    thread.join(10)
    loop.close()


def output(capsys: pytest.CaptureFixture[str], daemon: str, *arguments: str) -> str:
    assert run(["get", *arguments, "--admin-socket", daemon]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_services(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    header, web = output(capsys, daemon, "services").splitlines()
    assert header == "NAME   TYPE       CLUSTER-IP   EXTERNAL-IP   PORT(S)               AGE"
    assert web == "web    NodePort   10.96.0.10   <none>        80:30080/TCP,53/UDP   <unknown>"


@pytest.mark.parametrize(
    ("kind", "external", "balancer", "shown"),
    [
        ("ClusterIP", [], [], "<none>"),
        ("ClusterIP", ["192.0.2.9", "192.0.2.8"], [], "192.0.2.9,192.0.2.8"),
        ("LoadBalancer", [], [], "<pending>"),
        ("LoadBalancer", [], ["2001:db8::1", "192.0.2.1"], "192.0.2.1,2001:db8::1"),
        ("LoadBalancer", ["192.0.2.9"], ["192.0.2.1"], "192.0.2.1,192.0.2.9"),
        ("ExternalName", [], [], "remote.example"),
    ],
)
def test_external_addresses(
    capsys: pytest.CaptureFixture[str],
    daemon: str,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    external: list[str],
    balancer: list[str],
    shown: str,
) -> None:
    fields = {"type": kind, "externalIPs": external, "loadBalancerIPs": balancer}
    item = {**WEB, **fields, "clusterIPs": ["None"], "externalName": "remote.example"}
    monkeypatch.setitem(ANSWERS, "services", [item])
    cells = output(capsys, daemon, "svc").splitlines()[1].split()
    assert cells[1:4] == [kind, "None", shown]


def test_all_namespaces_wide(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    lines = output(capsys, daemon, "svc", "-A", "-o", "wide").splitlines()
    assert " ".join(lines[0].split()) == (
        "NAMESPACE NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE SELECTOR ENDPOINTS SCHEDULER"
    )
    assert lines[1].split()[-3:] == ["app=web,tier=front", "2/3", "wrr"]
    assert lines[2].startswith("shop        cart   ClusterIP   <none>  ")
    assert lines[2].split()[-2:] == ["2/3", "<none>"]


@pytest.mark.parametrize(("style", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_documents(capsys: pytest.CaptureFixture[str], daemon: str, style: str, read: Any) -> None:
    assert read(output(capsys, daemon, "services", "-n", "shop", "-o", style)) == {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "List",
        "items": [CART],
    }


def test_names(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    assert output(capsys, daemon, "service", "-A", "-o", "name") == "service/web\nservice/cart\n"


def test_endpoints(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    assert output(capsys, daemon, "endpoints") == (
        "SERVICE    PROTO   VIRTUAL              ENDPOINT         WEIGHT   ACTIVE   INACTIVE\n"
        "web:http   tcp     [fd00:10:96::a]:80   [fd00::1]:8080   1        2        3\n"
    )


def test_pods(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    lines = [line.split() for line in output(capsys, daemon, "po").splitlines()]
    assert lines == [
        ["NAME", "READY", "STATUS", "IP", "NODE", "SERVICES"],
        ["web-0", "yes", "Running", "10.1.0.1,fd00::1", "n1", "web,web-2"],
        ["job", "no", "<unknown>", "<none>", "n1", "<none>"],
    ]


def test_connections(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    assert output(capsys, daemon, "connections") == (
        "PROTO   CLIENT            VIRTUAL         DESTINATION     STATE         EXPIRES\n"
        "tcp     192.0.2.9:40000   10.96.0.10:80   10.1.0.1:8080   established   14m\n"
    )


def test_pools(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    addresses = "192.0.2.0/28,2001:db8::10-2001:db8::1f"
    assert output(capsys, daemon, "pools") == (
        "NAME   ADDRESSES                                USED   FREE   AGE\n"
        f"lan    {addresses}   3      27     <unknown>\n"
        f"all    {addresses}   3      27     <unknown>\n"
    )
    _, lan = output(capsys, daemon, "lbpool", "lan", "-o", "wide").splitlines()
    selector = "a=1,b=2,old notin (yes),!private,public,zone in (a,b)"
    assert (
        lan
        == f"lan    {addresses}   3      27     <unknown>   no            shop         {selector}"
    )
    _, everybodys = output(capsys, daemon, "pools", "all", "-o", "wide").splitlines()
    assert everybodys.split()[-3:] == ["yes", "<all>", "<none>"]
    assert json.loads(output(capsys, daemon, "pool", "lan", "-o", "json"))["items"] == [POOL]
    assert output(capsys, daemon, "pools", "-o", "name") == "pool/lan\npool/all\n"
    assert run(["get", "pools", "wan", "--admin-socket", daemon]) == 1
    assert capsys.readouterr().err == "error: pools wan: none\n"


def test_queues(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    assert output(capsys, daemon, "queues") == (
        "QUEUE   RECEIVED   VERDICTS   WAITING   DROPPED   ERRORS\n"
        "100     9          8          1         5         0\n"
    )


def test_nothing_found(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    assert run(["get", "svc", "-n", "empty", "--admin-socket", daemon]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "No services found in namespace empty\n"


def test_some_names(capsys: pytest.CaptureFixture[str], daemon: str) -> None:
    for arguments, shown in (
        (["svc", "web", "-o", "name"], ["service/web"]),
        (["po", "job", "web-0", "-o", "name"], ["pod/web-0", "pod/job"]),
        (["ep", "web", "-o", "name"], ["endpoint/web:http/[fd00::1]:8080"]),
    ):
        assert output(capsys, daemon, *arguments).splitlines() == shown
    # What is there is shown, what is not is an error, as with kubectl.
    assert run(["get", "svc", "web", "nosuch", "cart", "--admin-socket", daemon]) == 1
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["NAME", "web"]
    assert "services nosuch, cart: none in default" in captured.err


def test_watch_prints_what_changes(
    capsys: pytest.CaptureFixture[str], daemon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[dict[str, Any]] = [
        {"active": 7, "bytesIn": 99},  # counters alone are no news
        {"weight": 0},
        {"weight": 0},
    ]

    def sleep(seconds: float) -> None:
        if not rounds:
            raise KeyboardInterrupt
        monkeypatch.setitem(ANSWERS, "endpoints", [{**ENDPOINT, **rounds.pop(0)}])

    monkeypatch.setattr(get.time, "sleep", sleep)
    assert run(["get", "endpoints", "-w", "--admin-socket", daemon]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines] == ["WEIGHT", "1", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodes"], "get one of services, endpoints, pods, pools, connections, queues"),
        (["svc", "-A", "-n", "x"], "-n and -A exclude each other"),
        (["svc", "web", "-A"], "names are those of one namespace"),
        (["queues", "100"], "names are those of one namespace"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["get", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_daemon(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["get", "svc", "--run-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: no daemon listens at {tmp_path}/admin.sock" in captured.err

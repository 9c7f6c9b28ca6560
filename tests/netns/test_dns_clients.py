"""Programs that know a Service by its name alone: resolvers of others, and real traffic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from traffic import PORT, PORTS, Start, all_meet, ask, endpoint_slice, write_objects

from svcdp.cli._demo.daemon import RunningDaemon
from svcdp.lab import Namespace, Server, Topology, wait_until

pytestmark = pytest.mark.netns

TIMEOUT = 10.0  # seconds
DNS = ("10.96.0.10", "fd00:10:96::a")  # the tenth of each service CIDR
METRICS = 9153  # as of kube-dns
WEB = ("10.96.0.80", "fd00:10:96::80")
SVC = "svc.cluster.local"
#: More than a datagram of 512 bytes holds.
CROWD = {f"10.1.2.{number}" for number in range(1, 101)}
REMOTE = "remote.server.url.com"
INTRODUCTION = Path(__file__).parents[2] / "examples" / "introduction"
POOL = {
    "apiVersion": "svcdp.io/v1alpha1",
    "kind": "LoadBalancerPool",
    "metadata": {"name": "pool"},
    "spec": {"addresses": ["203.0.113.0/30"]},
}

PROGRAM = """
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int count, char **names) {
    char text[64];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    if (count != 2 || getaddrinfo(names[1], 0, &hints, &found)) return 1;
    for (; found; found = found->ai_next) {
        getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
        puts(text);
    }
    return 0;
}
"""

In = Callable[..., str]
"""Run a program in a namespace whose resolv.conf is that of a Pod; what it printed."""


def service(name: str, cluster_ips: tuple[str, ...], *ports: dict[str, Any]) -> dict[str, Any]:
    spec = {"clusterIP": cluster_ips[0], "ports": ports}
    if cluster_ips[0] != "None":
        spec |= {"clusterIPs": cluster_ips, "ipFamilies": ["IPv4", "IPv6"]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def slices(name: str, servers: tuple[Server, ...], number: int) -> list[dict[str, Any]]:
    return [
        endpoint_slice(
            name,
            family,
            [{"name": "http", "protocol": "TCP", "port": number}],
            [
                {"addresses": [getattr(each, family.lower())], "hostname": f"{name}-{each.name}"}
                for each in servers
            ],
        )
        for family in ("IPv4", "IPv6")
    ]


def write(folder: Path, cluster: Topology, *more: dict[str, Any]) -> None:
    a, b, _ = cluster.servers
    http = {"name": "http", "port": PORT}
    external = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "remote"},
        "spec": {"type": "ExternalName", "externalName": REMOTE},
    }
    # The DNS Service itself is one whose Pods would answer: they are not asked.
    dns = {"name": "dns", "port": 53, "protocol": "UDP"}
    metrics = {"name": "metrics", "port": METRICS, "protocol": "TCP"}
    kube_dns = service("kube-dns", DNS, dns, metrics)
    served = [dns | {"port": PORTS[1]}, metrics | {"port": PORTS[0]}]
    write_objects(
        folder / "manifests",
        service("web", WEB, http),
        *slices("web", (a, b), PORTS[0]),
        service("db", ("None",), http),
        *slices("db", (a,), PORTS[0]),
        service("crowd", ("None",), http),
        endpoint_slice(
            "crowd", "IPv4", [http | {"protocol": "TCP"}], [{"addresses": [each]} for each in CROWD]
        ),
        external,
        kube_dns,
        endpoint_slice("kube-dns", "IPv4", served, [{"addresses": [b.ipv4]}]),
        endpoint_slice("kube-dns", "IPv6", served, [{"addresses": [b.ipv6]}]),
        *more,
    )


@pytest.fixture
def inside(tmp_path: Path) -> In:
    """The mount is the program's own: it goes with it."""
    conf = tmp_path / "resolv.conf"
    conf.write_text(
        f"search default.{SVC} {SVC} cluster.local\noptions ndots:5 timeout:2 attempts:3\n"
        f"nameserver {DNS[0]}\nnameserver {DNS[1]}\n"
    )

    def run(namespace: Namespace, *argv: str, check: bool = True) -> str:
        shell = f'mount --bind {conf} /etc/resolv.conf && exec "$@"'
        done = namespace.run(["sh", "-c", shell, "sh", *argv], check=check, timeout=30)
        return done.stdout

    return run


@pytest.fixture
def upstream(cluster: Topology) -> str:
    """Debian's dnsmasq, where the client is: it knows one name in the world."""
    a = cluster.servers[0]
    options = ["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null"]
    options += ["--pid-file=", "--user=root", "--port=5300", "--local-ttl=60"]
    options += [f"--address=/{REMOTE}/{each}" for each in (a.ipv4, a.ipv6)]
    cluster.client.popen(["dnsmasq", *options], stderr=subprocess.DEVNULL)
    where = "192.0.2.10:5300"

    def answers() -> bool:
        asked = ["dig", "+short", "+tries=1", "+time=1", "@127.0.0.1", "-p5300", REMOTE]
        return cluster.client.run(asked, check=False).stdout == f"{a.ipv4}\n"

    wait_until(answers, TIMEOUT, "dnsmasq")
    return where


def lines(text: str) -> set[str]:
    return set(text.split("\n")) - {""}


def dig(inside: In, where: Namespace, *argv: str) -> set[str]:
    return lines(inside(where, "dig", "+short", "+tries=3", "+time=2", *argv))


def test_every_resolver_finds_services(
    cluster: Topology, folder: Path, start: Start, inside: In, upstream: str, tmp_path: Path
) -> None:
    write(folder, cluster)
    (tmp_path / "lookup.c").write_text(PROGRAM)
    musl = str(tmp_path / "lookup")
    subprocess.run(["musl-gcc", "-static", "-o", musl, f"{musl}.c"], check=True)
    a, _, pod = cluster.servers
    with start("--dns", "--dns-upstreams", upstream) as daemon:
        for where in (pod.namespace, cluster.node):
            for server in DNS:
                for tcp in ("+notcp", "+tcp"):
                    name = f"web.default.{SVC}"
                    assert dig(inside, where, f"@{server}", tcp, name, "A") == {WEB[0]}
                    assert dig(inside, where, f"@{server}", tcp, name, "AAAA") == {WEB[1]}
        asked = dig(inside, pod.namespace, f"_http._tcp.db.default.{SVC}", "SRV")
        assert asked == {f"0 1 {PORTS[0]} db-a.db.default.{SVC}."}
        assert dig(inside, pod.namespace, "-x", WEB[1]) == {f"web.default.{SVC}."}

        for name, expected in {
            "web": set(WEB),
            "web.default": set(WEB),
            f"web.default.{SVC}": set(WEB),
            "db": {a.ipv4, a.ipv6},
            "db-a.db": {a.ipv4, a.ipv6},
            "remote": {a.ipv4, a.ipv6},
        }.items():
            found = inside(pod.namespace, "getent", "ahosts", name)
            assert {line.split()[0] for line in lines(found)} == expected, name
            assert lines(inside(pod.namespace, musl, name)) == expected, name
        assert inside(pod.namespace, "getent", "ahosts", "nosuch", check=False) == ""
        found = inside(pod.namespace, "getent", "ahosts", "crowd")
        assert {line.split()[0] for line in lines(found)} == CROWD  # by TCP
        # Before 1.2.4 musl knows no TCP, and since 1.2.4 no more than 48 addresses.
        some = lines(inside(pod.namespace, musl, "crowd"))
        assert len(some) > 20
        assert some <= CROWD

        for family, url, server in (
            ("-4", f"http://web:{PORT}/", {"a", "b"}),
            ("-6", f"http://web:{PORT}/", {"a", "b"}),
            ("-4", f"http://db.default:{PORTS[0]}/", {"a"}),
            ("-6", f"http://remote:{PORTS[0]}/", {"a"}),
        ):
            said = [
                json.loads(inside(pod.namespace, "curl", "-sS", "--max-time", "10", family, url))
                for _ in range(4)
            ]
            assert {each["server"] for each in said} == server

        # As soon as another change is in force.
        moved = service("late", ("10.96.0.81", "fd00:10:96::81"), {"name": "http", "port": PORT})
        write(folder, cluster, moved)
        wait_until(lambda: "late" in known(daemon), TIMEOUT, "the Service in force")
        assert dig(inside, pod.namespace, f"late.default.{SVC}") == {"10.96.0.81"}


def test_the_introduction_works_as_written(
    cluster: Topology, folder: Path, start: Start, inside: In, upstream: str
) -> None:
    """Its four Services and its Pod, from outside, from the node and from Pods, by address and by
    name, and as environment variables.
    """
    (folder / "manifests" / "web.json").unlink()
    for manifest in INTRODUCTION.glob("*.yaml"):
        shutil.copy(manifest, folder / "manifests")
    write_objects(folder / "manifests", POOL, name="pool")
    python, _, pod = cluster.servers
    python.start(http=(443,), udp=4443)
    # As nodes have one: else their own programs could not dial an address of a load balancer.
    cluster.node.ip(f"route add default via {cluster.client_ipv4}")
    everywhere = (cluster.client, cluster.node, pod.namespace, python.namespace)
    with start("--dns", "--dns-upstreams", upstream) as daemon:
        services = {each["name"]: each for each in daemon.get("services")}
        plain = services["service-python"]["clusterIPs"][0]
        at_node_port = services["service-python-node-port"]["clusterIPs"][0]
        (balanced,) = services["service-python-load-balancer"]["loadBalancerIPs"]
        assert balanced in ("203.0.113.1", "203.0.113.2")
        for source in everywhere:
            for target in (
                (plain, 3000),
                (at_node_port, 3000),
                (cluster.node_ipv4, 30080),
                (balanced, 3000),
            ):
                assert ask(source, target)["server"] == "a", target
        for name, number in (
            ("service-python", 3000),
            ("service-python-node-port.default", 3000),
            (f"service-python-load-balancer.default.{SVC}", 3000),
            ("service-python-external", 443),
        ):
            for source in (pod.namespace, python.namespace):
                url = f"http://{name}:{number}/"
                said = json.loads(inside(source, "curl", "-4sS", "--max-time", "10", url))
                assert said["server"] == "a", url
        names = dig(inside, pod.namespace, f"service-python-external.default.{SVC}", "CNAME")
        assert names == {f"{REMOTE}."}
        command = [sys.executable, "-m", "svcdp", "env", "pod-python"]
        command += ["--admin-socket", str(folder / "run" / "admin.sock")]
        told = lines(cluster.node.run(command, timeout=30).stdout)
        assert f"SERVICE_PYTHON_SERVICE_HOST={plain}" in told
        assert "SERVICE_PYTHON_SERVICE_PORT=3000" in told
        assert f"SERVICE_PYTHON_NODE_PORT_PORT_3000_TCP=tcp://{at_node_port}:3000" in told
        assert not any("EXTERNAL" in line for line in told)


def known(daemon: RunningDaemon) -> set[str]:
    return {each["name"] for each in daemon.get("services")}


def local_routes(node: Namespace) -> set[str]:
    return {
        route["dst"]
        for family in ("-4", "-6")
        for route in json.loads(
            node.run(
                ["ip", "-json", family, "route", "show", "table", "local", "proto", "112"]
            ).stdout
            or "[]"
        )
    }


def test_the_address_is_taken_over_and_given_back(
    cluster: Topology, folder: Path, start: Start, inside: In
) -> None:
    write(folder, cluster)
    pod = cluster.servers[2].namespace
    name = f"web.default.{SVC}"
    with start("--dns") as daemon:
        assert local_routes(cluster.node) == set(DNS)
        assert dig(inside, pod, name) == {WEB[0]}
        daemon.process.kill()
        daemon.process.wait(TIMEOUT)
    assert local_routes(cluster.node) == set(DNS)
    with start("--dns") as daemon:
        assert dig(inside, pod, name) == {WEB[0]}
        # One that is no longer ours is not kept.
        daemon.process.kill()
        daemon.process.wait(TIMEOUT)
    with start("--dns", "--dns-addresses", DNS[0]) as daemon:
        assert local_routes(cluster.node) == {DNS[0]}
        assert daemon.stop() == 0
    assert local_routes(cluster.node) == set()
    with start("--dns") as daemon:
        daemon.process.kill()
        daemon.process.wait(TIMEOUT)
    remove = [sys.executable, "-m", "svcdp", "rules", "remove", "--run-dir", str(folder / "run")]
    cluster.node.run(remove)
    assert local_routes(cluster.node) == set()


def test_other_ports_of_the_address_are_the_services(
    cluster: Topology, folder: Path, start: Start, inside: In
) -> None:
    """Names are told at port 53 by the node, metrics by the Pods that the Service has."""
    write(folder, cluster)
    pod = cluster.servers[2].namespace
    everywhere = (pod, cluster.node, cluster.client)
    with start("--dns"):
        assert local_routes(cluster.node) == set(DNS)
        for _ in range(2):
            assert all_meet(everywhere, [(each, METRICS) for each in DNS]) == {"b"}
            assert all_meet(everywhere, [(each, METRICS + 1) for each in DNS]) == {"refused"}
            for where in everywhere:
                for server in DNS:
                    assert dig(inside, where, f"@{server}", f"web.default.{SVC}") == {WEB[0]}

"""`svcdp controller` at a real API server: who gets which address, and by which of several."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane import ControlPlane
from probing import free_port, get
from relay import Relay

from svcdp._version import __version__
from svcdp.kube.pools import ADDRESSES_ANNOTATION, CLEANUP_FINALIZER, POOL_CLASS, SHARING_ANNOTATION
from svcdp.lab import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
CRD = DEPLOY / "loadbalancerpools.yaml"
MANIFEST = DEPLOY / "svcdp-controller.yaml"
ACCOUNT = "system:serviceaccount:svcdp:svcdp-controller"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/svcdp/leases/svcdp-controller"
TIMEOUT = 30.0


def pool(*addresses: str, name: str = "lan", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": name},
        "spec": {"addresses": list(addresses), **spec},
    }


def service(
    name: str, *, port: int = 80, ip: str = "", sharing: str = "", **spec: Any
) -> dict[str, Any]:
    asked = {ADDRESSES_ANNOTATION: ip, SHARING_ANNOTATION: sharing}
    annotations = {key: value for key, value in asked.items() if value}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"type": "LoadBalancer", "ports": [{"port": port}], **spec},
    }


class Replica:
    """``svcdp controller`` as the Deployment's container starts it, with a shorter Lease."""

    def __init__(self, process: subprocess.Popen[str], log: Path, port: int) -> None:
        self.process = process
        self.log = log
        self._port = port

    def get(self, path: str) -> tuple[int, str]:
        """Status and body, by HTTP."""
        answer = asyncio.run(get(("127.0.0.1", self._port), path))
        return answer.status, answer.body.decode()

    def is_leader(self) -> bool:
        return "\nsvcdp_controller_leader 1.0\n" in self.get("/metrics")[1]

    def has_said(self, text: str) -> bool:
        return text in self.log.read_text()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(TIMEOUT)


class Cluster:
    """An API server with what deploy/ has for the controller."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self._folder = folder
        plane.kubectl("create", "namespace", "svcdp")
        plane.kubectl("apply", "--server-side", "--validate=strict", "-f", MANIFEST)
        token = plane.kubectl("create", "token", "svcdp-controller", "--namespace=svcdp")
        self._token = token.strip()

    def install(self) -> None:
        """The kind LoadBalancerPool."""
        kubectl = self.plane.kubectl
        kubectl("apply", "--server-side", "--validate=strict", "-f", CRD)
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", CRD)

    @contextlib.contextmanager
    def replica(self, *arguments: str, duration: int = 5, url: str = "") -> Iterator[Replica]:
        port = free_port()
        log = self._folder / f"log-{port}"
        kubeconfig = self.plane.kubeconfig("svcdp-controller", url=url, token=self._token)
        command = [sys.executable, "-m", "svcdp", "controller", "--kubeconfig", str(kubeconfig)]
        command += [f"--lease-duration={duration}", f"--bind-address=127.0.0.1:{port}", *arguments]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stderr=stream, text=True)
        try:
            replica = Replica(process, log, port)
            wait_until(lambda: replica.has_said("message=started"), TIMEOUT, "it has started")
            yield replica
        finally:
            process.kill()
            process.wait()

    def service(self, name: str) -> Any:
        return self.plane.get(f"/api/v1/namespaces/default/services/{name}")

    def addresses(self, name: str) -> list[str]:
        found = self.service(name)
        return [each.get("ip", "") for each in found["status"]["loadBalancer"].get("ingress", ())]

    def given(self, name: str) -> list[str]:
        """Its addresses, as soon as it has some."""
        return wait_until(lambda: self.addresses(name), TIMEOUT, f"{name} has an address")

    def until(self, name: str, *addresses: str) -> None:
        wait_until(
            lambda: self.addresses(name) == list(addresses), TIMEOUT, f"{name} has {addresses}"
        )

    def until_event(self, name: str, reason: str, kind: str = "service") -> str:
        """What kubectl's users are told."""
        said = ""

        def told() -> bool:
            nonlocal said
            said = self.plane.kubectl("describe", kind, name)
            return reason in said

        wait_until(told, TIMEOUT, f"{name} has an Event {reason}")
        return said

    def holder(self) -> str:
        return str(self.plane.get(LEASE)["spec"]["holderIdentity"])


@pytest.fixture
def cluster(plane: ControlPlane, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(plane, tmp_path)
    # Before etcd forgets it: the server serves its kind as long as it knows of it.
    plane.kubectl("delete", "--ignore-not-found", "--wait=true", "-f", CRD)


@pytest.fixture
def pooled(cluster: Cluster) -> Cluster:
    cluster.install()
    return cluster


def test_addresses_as_services_ask_for_them(pooled: Cluster) -> None:
    plane = pooled.plane
    plane.apply(pool("192.0.2.10-192.0.2.12"))
    with pooled.replica() as replica:
        plane.apply(service("asks", ip="192.0.2.12"))
        pooled.until("asks", "192.0.2.12")
        found = pooled.service("asks")["status"]["loadBalancer"]
        assert found["ingress"] == [{"ip": "192.0.2.12", "ipMode": "VIP"}]
        assert "192.0.2.12" in pooled.until_event("asks", "LoadBalancerIPAllocated")

        plane.apply(service("a", sharing="x", port=1), service("b", sharing="x", port=2))
        assert pooled.given("b") == pooled.given("a")

        plane.apply(service("taken", ip="192.0.2.12"), service("outside", ip="198.51.100.1"))
        pooled.until_event("taken", "LoadBalancerIPAlreadyAllocated")
        pooled.until_event("outside", "LoadBalancerIPOutOfRange")
        plane.apply(service("last"), service("late"))
        pooled.until_event("late", "LoadBalancerPoolFull")
        assert pooled.addresses("taken") == pooled.addresses("late") == []
        taken = {*pooled.addresses("a"), *pooled.addresses("last"), "192.0.2.12"}
        assert taken == {f"192.0.2.{number}" for number in (10, 11, 12)}

        # Who is no more of this type has no more address, which is somebody else's then.
        [free] = pooled.addresses("last")
        plane.kubectl("patch", "service", "last", "-p", '{"spec":{"type":"ClusterIP"}}')
        pooled.until("late", free)
        pooled.until("last")
        plane.kubectl("delete", "service", "asks")
        pooled.until("taken", "192.0.2.12")
        assert replica.get("/readyz") == (200, "ok\n")
        assert replica.get("/healthz") == (200, "ok\n")
        metrics = replica.get("/metrics")[1].splitlines()
        assert "svcdp_controller_leader 1.0" in metrics
        assert 'svcdp_pool_addresses{pool="lan"} 3.0' in metrics
        assert 'svcdp_pool_addresses_used{pool="lan"} 3.0' in metrics
        assert "svcdp_controller_services_lacking 1.0" in metrics
        assert 'svcdp_controller_writes_total{result="failed"} 0.0' in metrics
        assert replica.stop() == 0
    assert pooled.holder() == ""


def test_a_restart_changes_nothing(pooled: Cluster) -> None:
    plane = pooled.plane
    plane.apply(pool("192.0.2.0/28", "2001:db8::/120"), *(service(f"a{n}") for n in range(5)))
    with pooled.replica() as replica:
        before = {name: pooled.given(name) for name in (f"a{n}" for n in range(5))}
        assert len(set(map(tuple, before.values()))) == 5
        versions = {name: pooled.service(name)["metadata"]["resourceVersion"] for name in before}
        replica.process.kill()
    # Which of them would have an address by its name or age must not count.
    plane.apply(*(service(f"A{n}".lower() + "-late") for n in range(5)))
    plane.apply(service("thief", ip=before["a0"][0]))
    with pooled.replica():
        pooled.until_event("thief", "LoadBalancerIPAlreadyAllocated")
        late = {tuple(pooled.given(f"a{n}-late")) for n in range(5)}
        assert len(late) == 5
        assert not late & set(map(tuple, before.values()))
    assert {name: pooled.addresses(name) for name in before} == before
    found = {name: pooled.service(name)["metadata"]["resourceVersion"] for name in before}
    assert found == versions


def test_one_of_two_works_and_the_other_takes_over(pooled: Cluster, relay: Relay) -> None:
    plane = pooled.plane
    plane.apply(pool("192.0.2.0/24"))
    replicas = contextlib.ExitStack()
    with replicas:
        first = replicas.enter_context(pooled.replica(duration=60))
        wait_until(first.is_leader, TIMEOUT, "the first one leads")
        far = f"https://127.0.0.1:{relay.port}"
        second = replicas.enter_context(pooled.replica(url=far))
        third = replicas.enter_context(pooled.replica())
        wait_until(lambda: second.get("/readyz")[0] == 200, TIMEOUT, "the second one is ready")
        assert not second.is_leader()
        assert not third.is_leader()
        plane.apply(service("a"))
        pooled.given("a")
        # Told to stop it leaves the Lease, however long that would have lasted.
        assert first.stop() == 0
        wait_until(lambda: second.is_leader() or third.is_leader(), TIMEOUT, "another one leads")
        if third.is_leader():
            third.process.kill()
            wait_until(second.is_leader, TIMEOUT, "the second one leads")
            third = replicas.enter_context(pooled.replica())
        # Cut off it stops by itself, and the next one goes on.
        relay.pause()
        wait_until(third.is_leader, TIMEOUT, "the third one leads")
        assert not second.is_leader()
        plane.apply(service("b"))
        assert pooled.given("b") != pooled.given("a")
        relay.cut()
        relay.resume()
        wait_until(lambda: second.get("/readyz")[0] == 200, TIMEOUT, "the second one is back")
        assert not second.is_leader()
        assert third.is_leader()
        assert second.has_said("no longer leading")
        third.process.kill()
        wait_until(second.is_leader, TIMEOUT, "the second one leads again")
        plane.apply(service("c"))
        assert pooled.given("c") not in (pooled.addresses("a"), pooled.addresses("b"))


def test_without_the_kind_it_waits_and_says_so(cluster: Cluster) -> None:
    with cluster.replica() as replica:
        wait_until(lambda: replica.has_said("deploy/loadbalancerpools.yaml"), TIMEOUT, "it says so")
        assert replica.get("/readyz?verbose") == (
            503,
            "[+] lease\n[-] sources\n[+] writes\nnot ready: sources\n",
        )
        assert replica.get("/healthz")[0] == 200
        cluster.install()
        cluster.plane.apply(service("a", loadBalancerClass=POOL_CLASS))
        cluster.until_event("a", "NoLoadBalancerPool")
        cluster.plane.apply(pool("192.0.2.9/32"))
        cluster.until("a", "192.0.2.9")
        assert replica.get("/readyz")[0] == 200


def test_pools_that_are_wrong_or_gone(pooled: Cluster) -> None:
    plane = pooled.plane
    for text in ("lan", "192.0.2.1", "192.0.2.0/x", "192.0.2.1-"):
        with pytest.raises(subprocess.CalledProcessError) as refused:
            plane.apply(pool(text))
        assert "spec.addresses[0]" in refused.value.stderr
    with pytest.raises(subprocess.CalledProcessError):
        plane.apply(pool())
    with pooled.replica() as replica:
        plane.apply(pool("192.0.2.9-192.0.2.1", name="bad"), pool("192.0.2.9 - 192.0.2.9"))
        plane.apply(service("a"))
        pooled.until("a", "192.0.2.9")
        said = pooled.until_event("bad", "InvalidLoadBalancerPool", "loadbalancerpool")
        assert "ends before it starts" in said
        # Where a pool cannot be read, it could be this Service's.
        plane.kubectl("delete", "loadbalancerpool", "lan")
        plane.apply(service("b", loadBalancerClass=POOL_CLASS))
        pooled.until_event("b", "NoLoadBalancerPool")
        assert pooled.addresses("a") == ["192.0.2.9"]
        plane.kubectl("delete", "loadbalancerpool", "bad")
        pooled.until("a")
        pooled.until_event("a", "LoadBalancerIPReleased")
        assert replica.get("/readyz")[0] == 200
    columns = plane.kubectl("get", "lbpool").splitlines()
    assert columns == []
    plane.apply(pool("192.0.2.0/28", autoAssign=False, namespaces=["shop"]))
    header, lan = plane.kubectl("get", "lbpool", "-o", "wide").splitlines()
    assert header.split() == ["NAME", "ADDRESSES", "AUTO-ASSIGN", "NAMESPACES", "AGE"]
    assert lan.split()[:4] == ["lan", '["192.0.2.0/28"]', "false", '["shop"]']


def test_what_others_serve_is_left_alone(pooled: Cluster) -> None:
    plane = pooled.plane
    plane.apply(
        pool("192.0.2.8-192.0.2.9"),
        service("foreign", loadBalancerClass="example.com/lb"),
        service("cloud"),
        service("named"),
        service("elsewhere"),
    )
    ingress = {
        "foreign": {"ip": "198.51.100.1"},
        "cloud": {"ip": "192.0.2.9"},
        "named": {"hostname": "lb.example.com"},
        "elsewhere": {"ip": "198.51.100.2"},
    }
    finalizers = json.dumps({"metadata": {"finalizers": [CLEANUP_FINALIZER]}})
    plane.kubectl("patch", "service", "cloud", "-p", finalizers)
    for name, found in ingress.items():
        status = json.dumps({"status": {"loadBalancer": {"ingress": [found]}}})
        plane.kubectl("patch", "service", name, "--subresource=status", "-p", status)
    before = {name: pooled.service(name) for name in ingress}
    with pooled.replica():
        plane.apply(service("asks", ip="192.0.2.9"), service("plain"))
        pooled.until("plain", "192.0.2.8")
        pooled.until_event("asks", "LoadBalancerIPAlreadyAllocated")
        assert {name: pooled.service(name) for name in ingress} == before
        # What goes, is free.
        plane.kubectl("patch", "service", "cloud", "-p", '{"metadata":{"finalizers":null}}')
        plane.kubectl("delete", "service", "cloud")
        pooled.until("asks", "192.0.2.9")


def test_class_only(pooled: Cluster) -> None:
    plane = pooled.plane
    plane.apply(pool("192.0.2.9/32"), service("plain"))
    with pooled.replica() as replica:
        pooled.until("plain", "192.0.2.9")
        assert replica.stop() == 0
    with pooled.replica("--class-only"):
        plane.apply(service("own", loadBalancerClass=POOL_CLASS))
        pooled.until("own", "192.0.2.9")
        assert pooled.addresses("plain") == []


def test_its_account_may_do_this_and_no_more(cluster: Cluster) -> None:
    may = ["list services", "watch services", "patch services/status"]
    may += [f"{verb} loadbalancerpools.svcdp.io" for verb in ("list", "watch")]
    may += [f"{verb} events.events.k8s.io" for verb in ("create", "patch")]
    may += ["create leases.coordination.k8s.io"]
    may += [f"{verb} leases.coordination.k8s.io/svcdp-controller" for verb in ("get", "patch")]
    may_not = ["patch services", "update services", "update services/status", "get secrets"]
    may_not += ["list pods", "list nodes", "patch nodes", "patch loadbalancerpools.svcdp.io"]
    may_not += ["patch leases.coordination.k8s.io", "delete leases.coordination.k8s.io"]
    may_not += ["patch leases.coordination.k8s.io/node-1"]

    def allowed(what: str) -> bool:
        verb, resource = what.split()
        resource, _, name = resource.partition("/")
        more = [f"--subresource={name}"] if name == "status" else []
        what = f"{resource}/{name}" if name and not more else resource
        asked = ["auth", "can-i", verb, what, *more, f"--as={ACCOUNT}", "--namespace=svcdp"]
        with contextlib.suppress(subprocess.CalledProcessError):  # "no" is a failure
            return cluster.plane.kubectl(*asked) == "yes\n"
        return False

    cluster.install()
    assert [each for each in may + may_not if allowed(each)] == may


def test_the_server_takes_the_manifest(cluster: Cluster) -> None:
    plane = cluster.plane
    plane.kubectl("apply", "--dry-run=server", "--server-side", "-f", MANIFEST)
    found = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}
    template = found["Deployment"]["spec"]["template"]
    metadata = {**template["metadata"], "name": "x", "namespace": "svcdp"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    plane.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(pod)
    )
    [container] = template["spec"]["containers"]
    assert container["image"] == f"svcdp:{__version__}"

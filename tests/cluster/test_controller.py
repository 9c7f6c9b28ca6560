"""`svcdp controller` at a real API server: who gets which address, and by which of several."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane
from controlplane.process import free_port

from svcdp.kube.pools import ADDRESSES_ANNOTATION, SHARING_ANNOTATION
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
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

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
        token = plane.kubectl("create", "token", "svcdp-controller", "--namespace=svcdp").strip()
        self.kubeconfig = plane.kubeconfig("svcdp-controller", token=token)

    def install(self) -> None:
        """The kind LoadBalancerPool."""
        kubectl = self.plane.kubectl
        kubectl("apply", "--server-side", "--validate=strict", "-f", CRD)
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", CRD)

    @contextlib.contextmanager
    def replica(self, *arguments: str, duration: int = 5, url: str = "") -> Iterator[Replica]:
        port = free_port()
        log = self._folder / f"log-{port}"
        command = [sys.executable, "-m", "svcdp", "controller", "--kubeconfig", self.kubeconfig]
        command += [f"--lease-duration={duration}", f"--bind-address=127.0.0.1:{port}", *arguments]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stderr=stream, text=True)
        try:
            yield Replica(process, log, port)
        finally:
            process.terminate()
            process.wait(TIMEOUT)

    def addresses(self, name: str) -> list[str]:
        found = self.plane.get(f"/api/v1/namespaces/default/services/{name}")
        return [each.get("ip", "") for each in found["status"]["loadBalancer"].get("ingress", ())]

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
        found = plane.get("/api/v1/namespaces/default/services/asks")["status"]["loadBalancer"]
        assert found["ingress"] == [{"ip": "192.0.2.12", "ipMode": "VIP"}]
        assert "192.0.2.12" in pooled.until_event("asks", "LoadBalancerIPAllocated")

        plane.apply(service("a", sharing="x", port=1), service("b", sharing="x", port=2))
        wait_until(lambda: bool(pooled.addresses("b")), TIMEOUT, "b has one")
        assert pooled.addresses("a") == pooled.addresses("b")

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

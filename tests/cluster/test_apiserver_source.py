"""svcdp's source against a real API server: at the end it knows what the server knows."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane
from relay import Relay

from svcdp.kube import ApiServerSource, NodeContext
from svcdp.kube.client import Client
from svcdp.kube.decode import decode_value
from svcdp.kube.events import Event
from svcdp.kube.health import is_eligible
from svcdp.kube.model import (
    HEADLESS_LABEL,
    PROXY_NAME_LABEL,
    Node,
    Object,
    ObjectKey,
    ServiceCIDR,
)
from svcdp.kube.own import informed
from svcdp.kube.publisher import EventPublisher

DEADLINE = 20.0
READS = "services,endpointslices.discovery.k8s.io,servicecidrs.networking.k8s.io"
RETRY = (0.05, 0.5)
PATHS = (
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
    "/apis/networking.k8s.io/v1/servicecidrs",
)


class Follower:
    """What a source says, put together in a thread of its own.

    The test's thread is the one that starts servers: they end with it.
    """

    def __init__(self, kubeconfig: Path, **options: Any) -> None:
        self.objects: dict[ObjectKey, Object] = {}
        self.batches = 0
        self._kubeconfig = kubeconfig
        self._options = options
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        # httpcore leaves the socket of a TLS handshake that is cancelled to the garbage collector.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
            gc.collect()

    def _serve(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _run(self) -> None:
        client = Client(self._kubeconfig)
        self.source = ApiServerSource(client, min_period=0.02, retry=RETRY, **self._options)
        try:
            async for batch in self.source.changes():
                with self._news:
                    for change in batch:
                        assert not change.replace
                        for key in change.deleted:
                            self.objects.pop(key, None)
                        self.objects.update((found.key, found) for found in change.objects)
                    self.batches += 1
                    self._news.notify_all()
        finally:
            await client.close()

    def until(self, reached: Callable[[], bool]) -> None:
        """Also where no batch says so, for before the first there is none."""
        deadline = time.monotonic() + DEADLINE
        with self._news:
            while not reached():
                assert time.monotonic() < deadline, self.errors()
                self._news.wait(0.05)

    def listed(self) -> bool:
        return self.batches > 0

    def names(self) -> set[str]:
        return {key.name for key in self.objects} - {"kubernetes"}

    def errors(self) -> list[str]:
        return [str(error) for error in self.source.errors] if hasattr(self, "source") else []


def of_server(plane: ControlPlane) -> dict[ObjectKey, Object]:
    """What a proxy should know, by plain HTTPS."""
    return {
        found.key: found
        for path in PATHS
        for found in decode_value(plane.get(path))
        if not set(found.metadata.labels or ()) & {HEADLESS_LABEL, PROXY_NAME_LABEL}
    }


def until_equal(plane: ControlPlane, follower: Follower) -> None:
    truth = of_server(plane)
    follower.until(lambda: follower.objects == truth)


def service(name: str, address: str, **more: Any) -> dict[str, Any]:
    spec = {"clusterIP": address, "clusterIPs": [address], "ports": [{"port": 80}], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoint_slice(name: str, of: str, *addresses: str) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": of}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]} for address in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def test_follows_what_kubectl_does(plane: ControlPlane) -> None:
    kubectl = plane.kubectl
    with Follower(plane.kubeconfig()) as follower:
        follower.until(follower.listed)
        assert follower.names() == set()
        kubectl("create", "service", "clusterip", "web", "--tcp=80:8080")
        plane.apply(endpoint_slice("web-1", "web", "10.1.0.1"))
        follower.until(lambda: follower.names() == {"web", "web-1"})
        # As a label of somebody else's proxy comes and goes, so does the Service.
        kubectl("label", "service", "web", f"{PROXY_NAME_LABEL}=other")
        follower.until(lambda: follower.names() == {"web-1"})
        kubectl("label", "service", "web", f"{PROXY_NAME_LABEL}-")
        follower.until(lambda: follower.names() == {"web", "web-1"})
        kubectl("patch", "service", "web", "-p", '{"spec":{"type":"NodePort"}}')
        until_equal(plane, follower)
        kubectl("delete", "service", "web")
        follower.until(lambda: follower.names() == {"web-1"})


def test_a_restart_and_410_gone_lose_no_deletion(plane: ControlPlane) -> None:
    plane.apply(service("old", "10.96.0.81"), service("kept", "10.96.0.82"))

    with Follower(plane.kubeconfig()) as follower:
        follower.until(lambda: follower.names() == {"old", "kept"})
        plane.stop(crash=True)
        follower.until(lambda: bool(follower.errors()))
        # What was known goes on to be known.
        assert follower.names() == {"old", "kept"}
        plane.erase(service("old", "10.96.0.81"))
        plane.store(service("new", "10.96.0.83"))
        plane.compact()
        plane.start()
        follower.until(lambda: follower.names() == {"new", "kept"})
        follower.until(lambda: not follower.errors())
        until_equal(plane, follower)


def test_connections_that_are_cut_or_silent_lose_nothing(plane: ControlPlane, relay: Relay) -> None:
    kubeconfig = plane.kubeconfig(url=f"https://127.0.0.1:{relay.port}")

    with Follower(kubeconfig, silence=1.0) as follower:
        follower.until(follower.listed)
        for round in range(3):
            plane.apply(service(f"a{round}", f"10.96.1.{round}"))
            relay.cut()
        until_equal(plane, follower)
        # Nobody says that this connection is dead.
        relay.pause()
        before = relay.connections
        plane.apply(service("quiet", "10.96.1.9"))
        follower.until(lambda: relay.connections > before)
        relay.cut()
        relay.resume()
        until_equal(plane, follower)
        relay.slow(20_000)
        plane.kubectl("delete", "service", "a0", "a1")
        until_equal(plane, follower)


def test_who_may_not_is_told_what_to_grant(plane: ControlPlane) -> None:
    with Follower(plane.kubeconfig("restricted")) as follower:
        follower.until(lambda: len(follower.errors()) == 3)
        text = follower.errors()[0]
        assert "cannot list services" in text
        assert 'User "restricted"' in text
        assert "grant the verbs list and watch on services" in text
        assert follower.batches == 0
        plane.grant("restricted", "list,watch", READS)
        follower.until(lambda: follower.batches > 0 and not follower.errors())


@pytest.mark.parametrize("kind", ["file", "kubeconfig", "plugin v1beta1", "plugin v1"])
def test_expired_credentials_are_read_again(plane: ControlPlane, kind: str) -> None:
    plane.grant("restricted", "list,watch", READS)
    token = plane.folder / "token"
    token.write_text(plane.token("restricted"))
    if kind == "file":
        kubeconfig = plane.kubeconfig("restricted", tokenFile=str(token))
    elif kind == "kubeconfig":
        kubeconfig = plane.kubeconfig("restricted", token=plane.token("restricted"))
    else:
        version = "client.authentication.k8s.io/" + kind.split()[1]
        script = (
            "import json, os, sys; token = open(sys.argv[1]).read();"
            "asked = os.environ.get('KUBERNETES_EXEC_INFO');"
            "assert asked is None or json.loads(asked)['kind'] == 'ExecCredential';"
            f"print(json.dumps({{'apiVersion': '{version}', 'kind': 'ExecCredential',"
            "'status': {'token': token}}))"
        )
        arguments = ["-c", script, str(token)]
        plugin = {"apiVersion": version, "command": sys.executable, "args": arguments}
        kubeconfig = plane.kubeconfig("restricted", exec={**plugin, "interactiveMode": "Never"})

    with Follower(kubeconfig) as follower:
        follower.until(follower.listed)
        fresh = plane.expire_token("restricted")
        plane.apply(service("web", "10.96.0.80"))
        follower.until(lambda: any("401 Unauthorized" in each for each in follower.errors()))
        token.write_text(fresh)
        if kind == "kubeconfig":
            kubeconfig.write_text(plane.kubeconfig("restricted", token=fresh).read_text())
        follower.until(lambda: "web" in follower.names() and not follower.errors())


def test_5000_services_and_changes_at_100_a_second(plane: ControlPlane) -> None:
    many = [service(f"web-{i}", f"10.97.{i >> 8}.{i & 255}") for i in range(5000)]
    slices = [endpoint_slice(f"web-{i}", f"web-{i}", "10.1.0.1") for i in range(5000)]
    plane.stop()
    plane.store(*many, *slices)
    plane.start()

    with Follower(plane.kubeconfig()) as follower:
        follower.until(lambda: len(follower.objects) > 10_000)
        until_equal(plane, follower)
        before = follower.batches
        began = time.monotonic()
        for number in range(500):
            plane.store(endpoint_slice(f"web-{number}", f"web-{number}", "10.1.0.2"))
            time.sleep(max(0.0, began + number / 100 - time.monotonic()))
        until_equal(plane, follower)
        assert before < follower.batches <= before + 500


def test_long_lists_come_in_pages(plane: ControlPlane) -> None:
    plane.apply(*(service(f"web-{i}", f"10.97.0.{i}") for i in range(25)))

    with Follower(plane.kubeconfig(), page=10) as follower:
        follower.until(follower.listed)
        until_equal(plane, follower)


def test_makes_objects(plane: ControlPlane) -> None:
    async def main() -> None:
        client = Client(plane.kubeconfig())
        path = "/api/v1/namespaces/default/services"
        made = json.loads(
            await client.post(path, json.dumps(service("web", "10.96.0.80")).encode())
        )
        assert made["metadata"]["uid"]
        await client.close()

    asyncio.run(main())
    with plane.request("GET", "/api/v1/namespaces/default/services/web") as answer:
        assert answer.status == HTTPStatus.OK


def test_follows_the_own_node_alone(plane: ControlPlane) -> None:
    nodes = ({"apiVersion": "v1", "kind": "Node", "metadata": {"name": n}} for n in ("n1", "n2"))
    plane.apply(*nodes)
    own = ObjectKey("Node", "", "n1")

    def known(follower: Follower) -> Node | None:
        found = follower.objects.get(own)
        return found if isinstance(found, Node) else None

    with Follower(plane.kubeconfig(), node_name="n1") as follower:
        follower.until(follower.listed)
        assert follower.names() == {"n1"}
        assert is_eligible(known(follower))
        plane.kubectl("label", "node", "n1", "topology.kubernetes.io/zone=a")
        plane.kubectl("taint", "node", "n1", "ToBeDeletedByClusterAutoscaler=1:NoSchedule")
        follower.until(lambda: not is_eligible(known(follower)))
        node = known(follower)
        assert node is not None
        assert (node.metadata.labels or {})["topology.kubernetes.io/zone"] == "a"
        plane.kubectl("delete", "node", "n1")
        follower.until(lambda: own not in follower.objects)


def test_follows_the_addresses_and_networks_of_a_cluster(plane: ControlPlane) -> None:
    """What the Node and the ServiceCIDRs say, as a real server writes it."""
    spec = {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]}
    plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": spec})
    given = NodeContext("n1", ["192.0.2.9", "192.0.2.1"], detect_local="NodeCIDR")

    def known(follower: Follower) -> NodeContext:
        own = follower.objects.get(ObjectKey("Node", "", "n1"))
        cidrs = [each for each in follower.objects.values() if isinstance(each, ServiceCIDR)]
        return informed(given, own if isinstance(own, Node) else None, cidrs)

    with Follower(plane.kubeconfig(), node_name="n1") as follower:
        follower.until(lambda: known(follower).service_cidrs == ("10.96.0.0/12",))
        assert known(follower).pod_cidrs == ("10.1.0.0/24",)
        addresses = [{"type": "InternalIP", "address": "192.0.2.1"}]
        patch = json.dumps({"status": {"addresses": addresses}})
        plane.kubectl("patch", "node", "n1", "--subresource=status", "-p", patch)
        follower.until(lambda: known(follower).primary_address("IPv4") == "192.0.2.1")
        more = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR"}
        plane.apply({**more, "metadata": {"name": "more"}, "spec": {"cidrs": ["10.200.0.0/16"]}})
        follower.until(lambda: "10.200.0.0/16" in known(follower).service_cidrs)


def test_a_named_proxy_follows_what_has_its_name(plane: ControlPlane) -> None:
    kubectl = plane.kubectl
    with Follower(plane.kubeconfig(), service_proxy_name="svcdp") as follower:
        plane.apply(service("web", "10.96.0.80"), endpoint_slice("web-1", "web", "10.1.0.1"))
        kubectl("label", "service,endpointslice", "--all", f"{PROXY_NAME_LABEL}=svcdp")
        follower.until(lambda: follower.names() == {"web", "web-1"})
        kubectl("label", "service", "web", "--overwrite", f"{PROXY_NAME_LABEL}=other")
        follower.until(lambda: follower.names() == {"web-1"})
        kubectl("label", "service", "web", "--overwrite", f"{PROXY_NAME_LABEL}=svcdp")
        follower.until(lambda: follower.names() == {"web", "web-1"})
        kubectl("label", "service", "web", f"{PROXY_NAME_LABEL}-")
        follower.until(lambda: follower.names() == {"web-1"})


def test_events_are_seen_by_kubectl(plane: ControlPlane) -> None:
    plane.apply(service("web", "10.96.0.80"))
    made = plane.get("/api/v1/namespaces/default/services/web")
    event = Event(ObjectKey("Service", "default", "web"), "InvalidAnnotation", "no such scheduler")
    plane.grant("restricted", "create,patch", "events.events.k8s.io")
    path = "/apis/events.k8s.io/v1/namespaces/default/events"

    async def main() -> None:
        client = Client(plane.kubeconfig("restricted"))
        publisher = EventPublisher(client, "n1", lambda key: str(made["metadata"]["uid"]))
        task = asyncio.create_task(publisher.run())
        publisher.record(event)
        async with asyncio.timeout(DEADLINE):
            while not (found := (await asyncio.to_thread(plane.get, path))["items"]):
                await asyncio.sleep(0.02)
            publisher.record(event)
            while "series" not in found[0]:
                found = (await asyncio.to_thread(plane.get, path))["items"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
        assert len(found) == 1
        assert found[0]["series"]["count"] == 2

    asyncio.run(main())
    described = plane.kubectl("describe", "service", "web")
    assert "InvalidAnnotation" in described
    assert "no such scheduler" in described

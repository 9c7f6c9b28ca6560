"""Pods and selectors, as the EndpointSlice controller joins them."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from svcdp.errors import ManifestError
from svcdp.kube.decode import decode_value
from svcdp.kube.model import EndpointHints, EndpointSlice, Node, Object, Pod, Service
from svcdp.kube.selector import slices_of
from svcdp.kube.state import Change, State

ZONE = "topology.kubernetes.io/zone"
READY = {"type": "Ready", "status": "True"}
UNREADY = {"type": "Ready", "status": "False"}


def pod(
    name: str = "a",
    *ips: str,
    labels: dict[str, str] | None = None,
    ready: bool = True,
    phase: str = "Running",
    spec: dict[str, Any] | None = None,
    **metadata: Any,
) -> Pod:
    found = decode_value(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels or {"run": "web"}, **metadata},
            "spec": spec or {},
            "status": {
                "phase": phase,
                "conditions": [READY if ready else UNREADY],
                "podIPs": [{"ip": ip} for ip in ips or ("10.1.0.1",)],
            },
        }
    )[0]
    assert isinstance(found, Pod)
    return found


def service(name: str = "web", *ports: dict[str, Any], **spec: Any) -> Service:
    spec.setdefault("selector", {"run": "web"})
    spec.setdefault("clusterIP", "10.96.0.1")
    found = decode_value(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"ports": list(ports or ({"port": 80},)), **spec},
        }
    )[0]
    assert isinstance(found, Service)
    return found


def node(zone: str, name: str = "n1", **spec: Any) -> Node:
    metadata = {"name": name, "labels": {ZONE: zone}}
    value = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec}
    (found,) = decode_value(value)
    assert isinstance(found, Node)
    return found


def endpoints(slices: list[EndpointSlice]) -> list[tuple[str, int | None]]:
    return [
        (endpoint.addresses[0], port.port)
        for found in slices
        for endpoint in found.endpoints or ()
        for port in found.ports or ()
    ]


class TestSlices:
    def test_a_pod_is_an_endpoint(self) -> None:
        (found,) = slices_of(service(), [pod(spec={"nodeName": "n1"})])
        assert found.ref == service().ref
        assert found.address_type == "IPv4"
        (endpoint,) = found.endpoints or ()
        assert endpoint.addresses == ("10.1.0.1",)
        assert endpoint.node_name == "n1"
        assert endpoint.target_ref is not None
        assert endpoint.target_ref.name == "a"
        (port,) = found.ports or ()
        assert (port.name, port.port, port.protocol) == ("", 80, "TCP")

    @pytest.mark.parametrize(
        ("of_pod", "of_service", "expected"),
        [
            pytest.param({}, {}, (True, True, False), id="ready"),
            pytest.param({"ready": False}, {}, (False, False, False), id="unready"),
            pytest.param(
                {"deletionTimestamp": "2026-01-01T00:00:00Z"}, {}, (False, True, True), id="leaving"
            ),
            pytest.param(
                {"ready": False},
                {"publishNotReadyAddresses": True},
                (True, False, False),
                id="published",
            ),
            pytest.param(
                {"deletionTimestamp": "2026-01-01T00:00:00Z"},
                {"publishNotReadyAddresses": True},
                (True, True, True),
                id="leaving, published",
            ),
        ],
    )
    def test_conditions(
        self, of_pod: dict[str, Any], of_service: dict[str, Any], expected: tuple[bool, ...]
    ) -> None:
        (found,) = slices_of(service(**of_service), [pod(**of_pod)])
        (endpoint,) = found.endpoints or ()
        conditions = endpoint.conditions
        assert conditions is not None
        assert (conditions.ready, conditions.serving, conditions.terminating) == expected

    @pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
    def test_a_pod_that_ended_is_no_endpoint(self, phase: str) -> None:
        published = service(publishNotReadyAddresses=True)
        assert slices_of(published, [pod(phase=phase)]) == []

    @pytest.mark.parametrize("status", [{}, {"phase": "Pending"}, {"podIP": ""}])
    def test_no_address_no_endpoint(self, status: dict[str, Any]) -> None:
        value = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "a"},
            "spec": {},
            "status": status,
        }
        (found,) = decode_value(value)
        assert isinstance(found, Pod)
        assert slices_of(service(), [found]) == []

    def test_pod_ip_alone_and_no_conditions(self) -> None:
        value = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "a"},
            "status": {"podIP": "10.1.0.9"},
        }
        (found,) = decode_value(value)
        assert isinstance(found, Pod)
        (slice_,) = slices_of(service(), [found])
        assert endpoints([slice_]) == [("10.1.0.9", 80)]
        assert slice_.endpoints is not None
        assert slice_.endpoints[0].conditions is not None
        assert slice_.endpoints[0].conditions.ready

    def test_a_named_port_is_each_pods_own(self) -> None:
        def listening(name: str, ip: str, number: int, protocol: str = "TCP") -> Pod:
            port = {"name": "http", "containerPort": number, "protocol": protocol}
            return pod(name, ip, spec={"containers": [{"ports": [port]}]})

        pods = [
            listening("a", "10.1.0.1", 8080),
            listening("b", "10.1.0.2", 9090),
            listening("c", "10.1.0.3", 8080),
            listening("d", "10.1.0.4", 8080, "UDP"),  # another protocol is another port
            pod("e", "10.1.0.5"),
        ]
        found = slices_of(service("web", {"port": 80, "targetPort": "http"}), pods)
        assert [each.metadata.name for each in found] == [f"web-ipv4-{i}" for i in range(3)]
        # Those without the port have names all the same.
        without, *_ = found
        assert without.ports == ()
        assert [each.addresses for each in without.endpoints or ()] == [
            ("10.1.0.4",),
            ("10.1.0.5",),
        ]
        assert endpoints(found) == [("10.1.0.1", 8080), ("10.1.0.3", 8080), ("10.1.0.2", 9090)]

    def test_a_pod_lacking_one_named_port_serves_the_others(self) -> None:
        ports = [
            {"name": "web", "port": 80, "targetPort": 8080},
            {"name": "admin", "port": 81, "targetPort": "admin"},
        ]
        (found,) = slices_of(service("web", *ports), [pod()])
        assert [(port.name, port.port) for port in found.ports or ()] == [("web", 8080)]

    def test_ports_of_sidecars_count(self) -> None:
        init = [
            {"ports": [{"name": "http", "containerPort": 1}]},
            {"restartPolicy": "Always", "ports": [{"name": "http", "containerPort": 2}]},
        ]
        found = slices_of(
            service("web", {"port": 80, "targetPort": "http"}), [pod(spec={"initContainers": init})]
        )
        assert endpoints(found) == [("10.1.0.1", 2)]

    @pytest.mark.parametrize(
        ("spec", "families"),
        [
            ({}, ["IPv4"]),
            ({"ipFamilies": ["IPv6"], "clusterIP": "fd00::1"}, ["IPv6"]),
            ({"clusterIPs": ["10.96.0.1", "fd00::1"]}, ["IPv4", "IPv6"]),
            ({"clusterIP": "None"}, ["IPv4", "IPv6"]),
        ],
    )
    def test_families(self, spec: dict[str, Any], families: list[str]) -> None:
        found = slices_of(service(**spec), [pod("a", "10.1.0.1", "fd01::1", "10.1.0.2")])
        assert [each.address_type for each in found] == families
        assert all(len(each.endpoints or ()) == 1 for each in found)

    def test_a_headless_service_needs_no_port(self) -> None:
        headless = service(clusterIP="None", ports=None)
        (found,) = slices_of(headless, [pod()])
        assert found.ports == ()
        assert len(found.endpoints or ()) == 1

    def test_a_hostname_is_of_its_subdomain(self) -> None:
        named = pod(labels={"app": "web"}, spec={"hostname": "web-0", "subdomain": "web"})
        other = pod("b", labels={"app": "web"}, spec={"hostname": "b", "subdomain": "other"})
        [found] = slices_of(service(clusterIP="None"), [named, other])
        assert [each.hostname for each in found.endpoints or ()] == ["web-0", None]

    @pytest.mark.parametrize(
        ("distribution", "zones", "nodes"),
        [
            (None, [None, None, None], [None, None, None]),
            ("PreferClose", ["z1", "z2", None], [None, None, None]),
            ("PreferSameZone", ["z1", "z2", None], [None, None, None]),
            ("PreferSameNode", ["z1", "z2", None], ["n1", None, None]),
            ("PreferTheMoon", [None, None, None], [None, None, None]),
        ],
    )
    def test_hints_for_those_who_prefer_what_is_near(
        self, distribution: str | None, zones: list[str | None], nodes: list[str | None]
    ) -> None:
        """The Node's zone counts before the Pod's; who is not ready has no hint."""
        pods = [
            pod("a", labels={"run": "web", ZONE: "z9"}, spec={"nodeName": "n1"}),
            pod("b", labels={"run": "web", ZONE: "z2"}),
            pod("c", labels={"run": "web", ZONE: "z3"}, ready=False, spec={"nodeName": "n1"}),
        ]
        (found,) = slices_of(service(trafficDistribution=distribution), pods, {"n1": node("z1")})
        hints = [each.hints or EndpointHints() for each in found.endpoints or ()]
        assert [each.for_zones and each.for_zones[0].name for each in hints] == zones
        assert [each.for_nodes and each.for_nodes[0].name for each in hints] == nodes

    def test_external_name(self) -> None:
        external = service(type="ExternalName", externalName="remote.server.url.com")
        assert slices_of(external, [pod()]) == []

    def test_a_bad_address(self) -> None:
        with pytest.raises(ManifestError, match=r"\$\.status\.podIPs\[0\]\.ip"):
            pod("a", "10.1.0.256")


class TestState:
    def test_pods_come_change_and_go(self) -> None:
        state = State()
        web = service()
        state.apply(0, "s", Change("f", (web, pod())))
        assert endpoints(state.slices(web.ref)) == [("10.1.0.1", 80)]
        touched = state.apply(0, "s", Change("p", (pod("b", "10.1.0.2"),)))
        assert touched == {web.ref}
        assert endpoints(state.slices(web.ref)) == [("10.1.0.1", 80), ("10.1.0.2", 80)]
        moved = pod("b", "10.1.0.2", labels={"run": "other"})
        assert state.apply(0, "s", Change("p", (moved,))) == {web.ref}
        assert endpoints(state.slices(web.ref)) == [("10.1.0.1", 80)]
        again = pod("b", "10.1.0.3", labels={"run": "other"})
        assert state.apply(0, "s", Change("p", (again,))) == set()
        assert state.apply(0, "s", Change("f", (web,), replace=True)) == {web.ref}
        assert state.slices(web.ref) == []
        assert state.slice_count() == 0

    def test_hints_follow_the_zone_of_a_node(self) -> None:
        def zones() -> list[list[str]]:
            return [
                [hint.name for hint in (each.hints and each.hints.for_zones) or ()]
                for found in state.slices(web.ref)
                for each in found.endpoints or ()
            ]

        state = State()
        web = service(trafficDistribution="PreferSameZone")
        state.apply(0, "s", Change("f", (web, pod(spec={"nodeName": "n1"}))))
        assert zones() == [[]]
        assert state.apply(0, "s", Change("n", (node("z1"),))) == {web.ref}
        assert zones() == [["z1"]]
        assert state.apply(0, "s", Change("n", (node("z1", taints=[{"key": "t"}]),))) == set()
        assert state.apply(0, "s", Change("n", (node("z2"),))) == {web.ref}
        assert zones() == [["z2"]]
        assert state.apply(0, "s", Change("n", (node("z3", name="n2"),))) == set()
        assert state.apply(0, "s", Change("n", replace=True)) == {web.ref}
        assert zones() == [[]]

    def test_manual_slices_stay(self) -> None:
        value = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "own", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.1"]}],
            "ports": [{"name": "", "port": 1}],
        }
        state = State()
        state.apply(0, "s", Change("f", (service(), pod(), *decode_value(value))))
        assert endpoints(state.slices(service().ref)) == [("192.0.2.1", 1), ("10.1.0.1", 80)]
        assert (state.slice_count(), state.endpoint_count()) == (2, 2)

    def test_other_namespaces_and_no_selector(self) -> None:
        state = State()
        without = service("without", selector=None)
        empty = service("empty", selector={})
        state.apply(0, "s", Change("f", (service(), without, empty, pod(namespace="other"))))
        for found in (service(), without, empty):
            assert state.slices(found.ref) == []

    def test_any_history_is_as_if_made_at_once(self) -> None:
        """After each of many random changes the state has what one made afresh has, and it says
        so of each Service that it touched.
        """
        random = Random(1)

        def labels() -> dict[str, str]:
            return {key: random.choice("xy") for key in random.sample("abc", random.randint(1, 3))}

        def change() -> Object:
            if random.random() < 0.3:
                return service(f"s{random.randint(0, 4)}", selector=labels())
            name = f"p{random.randint(0, 9)}"
            return pod(name, f"10.1.0.{random.randint(1, 3)}", labels=labels())

        state = State()
        objects: dict[Any, Object] = {}
        for _ in range(500):
            made = change()
            before = {ref: state.slices(ref) for ref in state.services}
            if made.key in objects and random.random() < 0.4:
                del objects[made.key]
                touched = state.apply(0, "s", Change(deleted=(made.key,)))
            else:
                objects[made.key] = made
                touched = state.apply(0, "s", Change(objects=(made,)))
            pods = [found for _, found in sorted(objects.items()) if isinstance(found, Pod)]
            for found in objects.values():
                if isinstance(found, Service):
                    wanted = (found.spec.selector or {}).items()
                    chosen = [
                        each for each in pods if wanted <= (each.metadata.labels or {}).items()
                    ]
                    assert state.slices(found.ref) == slices_of(found, chosen)
                    if state.slices(found.ref) != before.get(found.ref, []):
                        assert found.ref in touched

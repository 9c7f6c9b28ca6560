"""A Service of type ExternalName is a name for another name, whatever else it declares."""

from __future__ import annotations

from typing import Any

import dns.name
import dns.rdatatype
import pytest
import wire
from dnslab import SVC, names_of
from kube_objects import case, endpoint, endpoints, port, service

from svcdp import Dataplane, Flow, Reason, Verdict
from svcdp.discovery.env import environment
from svcdp.kube import Change, NodeContext, resolve
from svcdp.kube.allocations import allocated
from svcdp.kube.balancers import balanced
from svcdp.kube.decode import decode_value
from svcdp.kube.model import Service
from svcdp.kube.tracker import Tracker

NODE = NodeContext(name="n1", addresses=["192.0.2.1", "2001:db8::1"], localhost_node_ports=True)
CLIENT, CLIENT6 = "198.51.100.7", "2001:db8:9::7"
INGRESS = {"loadBalancer": {"ingress": [{"ip": "203.0.113.2"}, {"ip": "2001:db8:ff::2"}]}}
POOL = {
    "apiVersion": "svcdp.io/v1alpha1",
    "kind": "LoadBalancerPool",
    "metadata": {"name": "pool"},
    "spec": {"addresses": ["203.0.113.64/26"]},
}


def everything(**more: Any) -> list[Any]:
    """A Service with all that others have, and endpoints on this node."""
    declared = service(
        "web",
        "10.96.0.10",
        "fd00:10:96::a",
        ports=[port(80, nodePort=30080), port(53, "dns", "UDP", nodePort=30053)],
        externalIPs=["203.0.113.1", "2001:db8:ff::1"],
        externalTrafficPolicy="Local",
        healthCheckNodePort=30500,
        sessionAffinity="ClientIP",
        annotations={"svcdp.io/scheduler": "lc", "svcdp.io/load-balancer-ips": "203.0.113.70"},
        **more,
    )
    ports = [port(8080), port(5353, "dns", "UDP")]
    return [
        {**declared, "status": INGRESS},
        endpoints(endpoint("10.1.0.1", "ready", node="n1"), ports=ports),
        endpoints(endpoint("fd00:10:1::1", "ready", node="n1"), name="web-6", ports=ports),
    ]


EXTERNAL = everything(type="ExternalName", externalName="remote.server.url.com")
BALANCED = everything(type="LoadBalancer")
#: Wherever the other one is served.
PLACES = [
    case("cluster IP", "10.96.0.10", 80, "tcp"),
    case("cluster IP, IPv6", "fd00:10:96::a", 80, "tcp"),
    case("cluster IP, UDP", "10.96.0.10", 53, "udp"),
    case("node port", "192.0.2.1", 30080, "tcp"),
    case("node port, IPv6", "2001:db8::1", 30080, "tcp"),
    case("node port, UDP", "192.0.2.1", 30053, "udp"),
    case("external IP", "203.0.113.1", 80, "tcp"),
    case("external IP, IPv6", "2001:db8:ff::1", 80, "tcp"),
    case("load balancer", "203.0.113.2", 80, "tcp"),
    case("load balancer, IPv6, UDP", "2001:db8:ff::2", 53, "udp"),
]


def records(manifests: list[Any]) -> list[Any]:
    return [record for each in manifests for record in decode_value(each)]


@pytest.mark.parametrize(("address", "number", "protocol"), PLACES)
def test_it_is_never_given_packets(address: str, number: int, protocol: Any) -> None:
    client = CLIENT6 if ":" in address else CLIENT
    packet = wire.packet(protocol, client, 40000, address, number)
    flow = Flow(protocol, client, 40000, address, number)
    dataplane = Dataplane(100, seed=1, clock=lambda: 0)
    dataplane.apply(resolve(BALANCED, NODE))
    assert dataplane.explain(flow).action == "forward"
    assert dataplane.process(bytearray(packet)).verdict == Verdict.FORWARD
    # A TCP connection that it has goes on, as kube-proxy's do.
    dataplane.apply(resolve(EXTERNAL, NODE))
    assert dataplane.explain(Flow(protocol, client, 40001, address, number)).action == "pass"
    result = dataplane.process(wire.packet(protocol, client, 40001, address, number))
    assert (result.verdict, result.reason) == (Verdict.PASS, Reason.NO_SERVICE)


def test_its_cluster_ip_is_nobodys() -> None:
    """Where it is known where cluster IPs are it is turned away, as any that no Service has."""
    node = NodeContext(name="n1", service_cidrs=["10.96.0.0/16"])
    dataplane = Dataplane(100, seed=1, clock=lambda: 0)
    dataplane.apply(resolve(EXTERNAL, node))
    result = dataplane.process(wire.packet("tcp", CLIENT, 40000, "10.96.0.10", 80))
    assert result.verdict == Verdict.DROP
    dataplane.apply(resolve(BALANCED, node))
    result = dataplane.process(wire.packet("tcp", CLIENT, 40000, "10.96.0.10", 80))
    assert result.verdict == Verdict.FORWARD


def test_nobody_answers_for_it_and_nobody_is_told_of_it() -> None:
    def looked_at(manifests: list[Any]) -> tuple[int, int]:
        tracker = Tracker(NODE)
        tracker.apply([(0, "", Change(objects=tuple(records(manifests))))])
        told = environment(tracker.state.services.values(), "shop")
        return len(tracker.health_checks()), len(told)

    assert looked_at(EXTERNAL) == (0, 0)
    checks, variables = looked_at(BALANCED)
    assert checks > 0
    assert variables > 0


@pytest.mark.parametrize("kind", ["A", "AAAA", "SRV", "TXT", "CNAME"])
def test_its_name_is_another_name(kind: str) -> None:
    names = names_of(EXTERNAL)
    asked = dns.name.from_text(f"web.shop.{SVC}")
    answer = names.lookup(asked, dns.rdatatype.from_text(kind))
    assert answer is not None
    assert [record.to_text() for rrset in answer.answer for record in rrset] == [
        "remote.server.url.com."
    ]
    assert [rrset.rdtype for rrset in answer.answer] == [dns.rdatatype.CNAME]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"_http._tcp.web.shop.{SVC}", "SRV"),
        ("10.0.96.10.in-addr.arpa.", "PTR"),
    ],
)
def test_it_has_no_other_names(name: str, kind: str) -> None:
    asked, rdtype = dns.name.from_text(name), dns.rdatatype.from_text(kind)
    served = names_of([BALANCED[0]]).lookup(asked, rdtype)
    assert served is not None
    assert served.answer
    answer = names_of(EXTERNAL).lookup(asked, rdtype)
    assert answer is None or not answer.answer


def test_it_is_given_no_addresses() -> None:
    bare = {
        **EXTERNAL[0],
        "spec": {"type": "ExternalName", "externalName": "remote.server.url.com"},
    }
    bare["spec"]["ports"] = [port(80)]
    objects, problems = allocated(records([bare, POOL]), ["10.96.0.0/16"])
    objects, more = balanced(objects)
    assert [*problems, *more] == []
    (written,) = records([bare])
    assert [each for each in objects if isinstance(each, Service)] == [written]

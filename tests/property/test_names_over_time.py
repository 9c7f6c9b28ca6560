"""Names that change one by one, and responses that are kept, beside a server that is told the
end alone.
"""

from __future__ import annotations

from typing import Any

import dns.message
import dns.rdatatype
from dnslab import SVC, ZONE, names_of
from hypothesis import given, settings
from hypothesis import strategies as st

from svcdp.discovery.dns import DnsServer
from svcdp.discovery.names import Names
from svcdp.discovery.resolver import Resolver
from svcdp.discovery.upstream import Forwarder
from svcdp.kube.decode import decode_value
from svcdp.kube.model import ServiceRef

ADDRESSES = ["10.1.0.1", "10.1.0.2"]
HOSTS = ["a", "b"]
PLACES = [ServiceRef(namespace, name) for namespace in ("x", "y") for name in ("a", "b")]
ENDPOINTS = st.lists(
    st.tuples(st.sampled_from(ADDRESSES), st.sampled_from([*HOSTS, None])), max_size=3
)
SERVICES = st.one_of(
    st.none(),
    st.builds(dict, clusterIP=st.sampled_from(["10.96.0.1", "10.96.0.2"])),
    st.builds(
        dict,
        type=st.just("ExternalName"),
        externalName=st.sampled_from([f"a.y.{SVC}", f"b.x.{SVC}"]),
    ),
    st.just({"clusterIP": "None"}),
)
CHANGES = st.lists(st.tuples(st.sampled_from(PLACES), SERVICES, ENDPOINTS), min_size=1, max_size=6)

OWN = [f"{name}.{namespace}.{SVC}" for namespace, name in PLACES]
QUESTIONS = [
    *((name, kind) for name in OWN for kind in ("A", "SRV")),
    *((f"{host}.{name}", "A") for name in OWN for host in HOSTS),
    *((f"_p._tcp.{name}", "SRV") for name in OWN),
    *((name, "A") for name in (f"10-1-0-1.{OWN[0]}", f"_tcp.{OWN[0]}", f"x.{SVC}", SVC)),
    *((f"{number}.0.{part}.10.in-addr.arpa.", "PTR") for number in (1, 2) for part in (1, 96)),
    *((ZONE, kind) for kind in ("NS", "SOA")),
]


def objects(ref: ServiceRef, spec: Any, endpoints: Any) -> list[dict[str, Any]]:
    metadata = {"name": ref.name, "namespace": ref.namespace}
    if spec is None:
        return []
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {**spec, "ports": [{"name": "p", "port": 80}]},
    }
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**metadata, "labels": {"kubernetes.io/service-name": ref.name}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [address]} | ({"hostname": host} if host else {})
            for address, host in endpoints
        ],
        "ports": [{"name": "p", "port": 8080}],
    }
    return [service, slice_]


def said(server: DnsServer, name: str, kind: str) -> Any:
    """All that a response says, in any order, but for the zone's serial."""
    query = dns.message.make_query(name, kind)
    wire = server._handle(query.to_wire(), "127.0.0.1", "tcp")
    if not isinstance(wire, bytes):
        return None  # somebody else is asked
    found = dns.message.from_wire(wire)
    return found.rcode(), [
        {
            (rrset.name, rrset.rdtype, rrset.ttl, _data(record))
            for rrset in section
            for record in rrset
        }
        for section in (found.answer, found.authority, found.additional)
    ]


def _data(record: Any) -> Any:
    if record.rdtype == dns.rdatatype.SOA:
        return record.replace(serial=0)
    return record


def serving(names: Names) -> DnsServer:
    return DnsServer(Resolver(names, Forwarder([])), rate=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CHANGES)
def test_what_is_kept_is_what_is_so(changes: list[tuple[ServiceRef, Any, Any]]) -> None:
    names = Names()
    server = serving(names)
    now: dict[ServiceRef, list[dict[str, Any]]] = {}
    for ref, spec, endpoints in changes:
        now[ref] = objects(ref, spec, endpoints)
        service, *slices = [found for each in now[ref] for found in decode_value(each)] or [None]
        before = names.serial
        names.replace(ref, service, slices)
        whole = serving(names_of([each for held in now.values() for each in held]))
        for name, kind in QUESTIONS:
            wanted = said(whole, name, kind)
            for _ in range(2):  # made, and kept
                assert said(server, name, kind) == wanted, (name, kind)
        names.replace(ref, service, slices)
        assert names.serial - before in (0, 1)
        wire = server._handle(dns.message.make_query(ZONE, "SOA").to_wire(), "127.0.0.1", "tcp")
        assert isinstance(wire, bytes)
        assert dns.message.from_wire(wire).answer[0][0].serial == names.serial

"""Kubernetes' DNS schema 1.1.0, as a table: what a cluster's names are, and what is no name."""

from __future__ import annotations

from typing import Any

import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from dnslab import SVC, ZONE, names_of
from kube_objects import case, endpoint, endpoints, port, service

from svcdp.discovery.names import TTL, Answer, Names
from svcdp.errors import ConfigError
from svcdp.kube.decode import decode_value
from svcdp.kube.model import ServiceRef


def headless(name: str = "db", **more: Any) -> dict[str, Any]:
    return service(name, "None", ipFamilies=["IPv4"], ports=[port(5432, "pg")], **more)


def hosted(address: str, hostname: str, *conditions: str) -> dict[str, Any]:
    return {**endpoint(address, *conditions), "hostname": hostname}


PEERS = endpoints(
    hosted("10.1.0.7", "db-0"),
    endpoint("10.1.0.8", "ready"),
    hosted("10.1.0.9", "db-2", "-ready"),
    of="db",
    ports=[port(15432, "pg"), port(9, None)],
)
PEERS6 = endpoints(hosted("fd01::7", "db-0"), of="db", name="db-6", ports=[port(15432, "pg")])

CLUSTER = [
    service(ports=[port(), port(53, "dns", "UDP")]),
    service("dual", "10.96.0.20", "fd00:96::20"),
    headless(),
    PEERS,
    PEERS6,
    headless("none"),
    endpoints(endpoint("10.1.0.9", "-ready"), of="none"),
    headless("early", publishNotReadyAddresses=True),
    endpoints(endpoint("10.1.0.9", "-ready"), of="early"),
    headless("mirror", labels={"service.kubernetes.io/headless": ""}),
    endpoints("10.1.0.7", of="mirror", labels={"service.kubernetes.io/headless": ""}),
    service("mesh", "10.96.0.30", labels={"service.kubernetes.io/service-proxy-name": "other"}),
    {
        **service("remote", type="ExternalName", externalName="Remote.server.url.com"),
        "spec": {"type": "ExternalName", "externalName": "Remote.server.url.com"},
    },
    {
        **service("numbers", type="ExternalName"),
        "spec": {"type": "ExternalName", "externalName": "192.0.2.7"},
    },
    service("pending", "", ipFamilies=None, clusterIPs=None),
    service("nameless", "10.96.0.60", ports=[port(name=None)]),
    service("a.b", "10.96.0.40"),
    service("peers", "10.96.0.70"),
    endpoints(
        hosted("10.1.0.21", "peer-0"),
        hosted("10.1.0.22", "peer-1", "-ready"),
        endpoint("10.1.0.23", "ready"),
        of="peers",
    ),
]


def ask(names: Names, name: str, kind: str) -> Answer:
    answer = names.lookup(dns.name.from_text(name), dns.rdatatype.from_text(kind))
    assert answer is not None
    return answer


def is_foreign(names: Names, name: str) -> bool:
    return names.lookup(dns.name.from_text(name), dns.rdatatype.A) is None


def texts(answer: Answer) -> list[str]:
    return sorted(record.to_text() for rrset in answer.answer for record in rrset)


@pytest.fixture(scope="module")
def names() -> Names:
    return names_of(CLUSTER, addresses=["10.96.0.10", "fd00:96::10"])


RECORDS = [
    case("cluster IP", f"web.shop.{SVC}", "A", ["10.96.0.10"]),
    case("case does not count", f"WEB.Shop.SVC.{ZONE}", "A", ["10.96.0.10"]),
    case("two families, one", f"dual.shop.{SVC}", "A", ["10.96.0.20"]),
    case("two families, other", f"dual.shop.{SVC}", "AAAA", ["fd00:96::20"]),
    case("named port", f"_http._tcp.web.shop.{SVC}", "SRV", [f"0 1 80 web.shop.{SVC}"]),
    case("named UDP port", f"_dns._udp.web.shop.{SVC}", "SRV", [f"0 1 53 web.shop.{SVC}"]),
    case("reverse", "10.0.96.10.in-addr.arpa.", "PTR", [f"web.shop.{SVC}"]),
    case(
        "reverse, IPv6",
        "0.2.0.0." + "0.0.0.0." * 5 + "6.9.0.0.0.0.d.f.ip6.arpa.",
        "PTR",
        [f"dual.shop.{SVC}"],
    ),
    case("headless", f"db.shop.{SVC}", "A", ["10.1.0.7", "10.1.0.8"]),
    case("headless, IPv6", f"db.shop.{SVC}", "AAAA", ["fd01::7"]),
    case("hostname", f"db-0.db.shop.{SVC}", "A", ["10.1.0.7"]),
    case("hostname, IPv6", f"db-0.db.shop.{SVC}", "AAAA", ["fd01::7"]),
    case("no hostname", f"10-1-0-8.db.shop.{SVC}", "A", ["10.1.0.8"]),
    case(
        "headless port: the endpoint's",
        f"_pg._tcp.db.shop.{SVC}",
        "SRV",
        [f"0 1 15432 10-1-0-8.db.shop.{SVC}", f"0 1 15432 db-0.db.shop.{SVC}"],
    ),
    case(
        "reverse of an endpoint: all that have it",
        "7.0.1.10.in-addr.arpa.",
        "PTR",
        [f"10-1-0-7.mirror.shop.{SVC}", f"db-0.db.shop.{SVC}"],
    ),
    case(
        "all ports, by the name alone: CoreDNS's",
        f"web.shop.{SVC}",
        "SRV",
        [f"0 1 53 web.shop.{SVC}", f"0 1 80 web.shop.{SVC}"],
    ),
    case("a port without name", f"nameless.shop.{SVC}", "SRV", [f"0 1 80 nameless.shop.{SVC}"]),
    case(
        "all ports of endpoints",
        f"db.shop.{SVC}",
        "SRV",
        [
            *(f"0 1 15432 {each}.db.shop.{SVC}" for each in ("10-1-0-8", "db-0")),
            *(f"0 1 9 {each}.db.shop.{SVC}" for each in ("10-1-0-8", "db-0")),
        ],
    ),
    case("hostname, of a cluster IP: CoreDNS's", f"peer-0.peers.shop.{SVC}", "A", ["10.1.0.21"]),
    case("and its reverse", "21.0.1.10.in-addr.arpa.", "PTR", [f"peer-0.peers.shop.{SVC}"]),
    case("and the Service itself", f"peers.shop.{SVC}", "A", ["10.96.0.70"]),
    case("publishNotReadyAddresses", f"early.shop.{SVC}", "A", ["10.1.0.9"]),
    case("hidden from proxies", f"mirror.shop.{SVC}", "A", ["10.1.0.7"]),
    case("of another proxy", f"mesh.shop.{SVC}", "A", ["10.96.0.30"]),
    case("external name", f"remote.shop.{SVC}", "A", ["Remote.server.url.com."]),
    case("external name, itself", f"remote.shop.{SVC}", "CNAME", ["Remote.server.url.com."]),
    case("version", f"dns-version.{ZONE}", "TXT", ['"1.1.0"']),
    case("name server", ZONE, "NS", [f"ns.dns.{ZONE}"]),
    case("its address", f"ns.dns.{ZONE}", "AAAA", ["fd00:96::10"]),
]


@pytest.mark.parametrize(("name", "kind", "expected"), RECORDS)
def test_records(names: Names, name: str, kind: str, expected: list[str]) -> None:
    answer = ask(names, name, kind)
    assert answer.rcode == dns.rcode.NOERROR
    assert texts(answer) == expected
    assert [rrset.name.to_text() for rrset in answer.answer] == [name]
    assert [rrset.ttl for rrset in answer.answer] == [TTL]
    assert answer.authority == ()


NODATA, NXDOMAIN = dns.rcode.NOERROR, dns.rcode.NXDOMAIN
NOTHING = [
    case("another type", f"web.shop.{SVC}", "AAAA", NODATA),
    case("alias of a name that is none", f"web.shop.{SVC}", "CNAME", NODATA),
    case("between: protocol", f"_tcp.web.shop.{SVC}", "A", NODATA),
    case("between: namespace", f"shop.{SVC}", "A", NODATA),
    case("between: svc", SVC, "A", NODATA),
    case("between: dns", f"dns.{ZONE}", "A", NODATA),
    case("the zone has no address", ZONE, "A", NODATA),
    case("no Service", f"nosuch.shop.{SVC}", "A", NXDOMAIN),
    case("no namespace", f"web.nosuch.{SVC}", "A", NXDOMAIN),
    case("no port", f"_https._tcp.web.shop.{SVC}", "SRV", NXDOMAIN),
    case("wrong protocol", f"_http._udp.web.shop.{SVC}", "SRV", NXDOMAIN),
    case("a port without name", f"_._tcp.nameless.shop.{SVC}", "SRV", NXDOMAIN),
    case("no endpoint is ready", f"none.shop.{SVC}", "A", NXDOMAIN),
    case("an endpoint that is not ready", f"db-2.db.shop.{SVC}", "A", NXDOMAIN),
    case("below a cluster IP", f"web-0.web.shop.{SVC}", "A", NXDOMAIN),
    case("below a cluster IP, not ready", f"peer-1.peers.shop.{SVC}", "A", NXDOMAIN),
    case("below a cluster IP, no hostname", f"10-1-0-23.peers.shop.{SVC}", "A", NXDOMAIN),
    case("below an external name", f"_http._tcp.remote.shop.{SVC}", "SRV", NXDOMAIN),
    case("external name like an address: CoreDNS's", f"numbers.shop.{SVC}", "A", NXDOMAIN),
    case("no address yet", f"pending.shop.{SVC}", "A", NXDOMAIN),
    case("a dot in a label", rf"a\.b.shop.{SVC}", "A", NXDOMAIN),
    case("two labels for one", f"a.b.shop.{SVC}", "A", NXDOMAIN),
    case("Pods, of schema 1.0", f"10-1-0-7.shop.pod.{ZONE}", "A", NXDOMAIN),
    case("reverse, another type", "10.0.96.10.in-addr.arpa.", "A", NODATA),
]


@pytest.mark.parametrize(("name", "kind", "rcode"), NOTHING)
def test_what_is_no_name_and_what_has_no_record(
    names: Names, name: str, kind: str, rcode: int
) -> None:
    answer = ask(names, name, kind)
    assert (answer.rcode, answer.answer) == (rcode, ())
    [soa] = answer.authority
    assert soa.rdtype == dns.rdatatype.SOA
    assert dns.name.from_text(name).is_subdomain(soa.name)
    assert (soa.ttl, soa[0].minimum) == (TTL, TTL)


@pytest.mark.parametrize(
    "name", ["example.com.", ".", "local.", "notcluster.local.", "9.0.96.10.in-addr.arpa."]
)
def test_what_is_not_the_clusters(names: Names, name: str) -> None:
    assert is_foreign(names, name)


def test_targets_come_with_their_addresses(names: Names) -> None:
    answer = ask(names, f"_pg._tcp.db.shop.{SVC}", "SRV")
    found = {(each.name.to_text(), str(each[0])) for each in answer.additional}
    assert found == {
        (f"db-0.db.shop.{SVC}", "10.1.0.7"),
        (f"db-0.db.shop.{SVC}", "fd01::7"),
        (f"10-1-0-8.db.shop.{SVC}", "10.1.0.8"),
    }


def test_an_address_comes_once_for_all_ports() -> None:
    ports = [{"name": name, "port": number} for name, number in (("http", 80), ("https", 443))]
    answer = ask(names_of([service(ports=ports)]), f"web.shop.{SVC}", "SRV")
    assert len(answer.answer[0]) == 2
    assert [str(each[0]) for each in answer.additional] == ["10.96.0.10"]


def test_of_many_targets_no_addresses_come() -> None:
    """They cost more than the answer, and rarely fit beside it."""
    many = [{"addresses": [f"10.1.1.{n}"], "hostname": f"db-{n}"} for n in range(1, 101)]
    same = [{"addresses": [f"10.1.1.{n}"], "hostname": "db"} for n in range(1, 101)]
    for listed, targets in ((many, 100), (same, 1)):
        answer = ask(
            names_of([headless(), {**PEERS, "endpoints": listed}]),
            f"_pg._tcp.db.shop.{SVC}",
            "SRV",
        )
        assert len(answer.answer[0]) == targets
        assert answer.additional == ()


def test_names_follow_their_service() -> None:
    names = names_of([service(), headless(), PEERS])
    web, db = ServiceRef("shop", "web"), ServiceRef("shop", "db")
    before = ask(names, ZONE, "SOA")
    names.replace(web, None, [])
    assert ask(names, f"web.shop.{SVC}", "A").rcode == NXDOMAIN
    assert is_foreign(names, "10.0.96.10.in-addr.arpa.")
    after = ask(names, ZONE, "SOA")
    assert after.answer[0][0].serial == before.answer[0][0].serial + 1

    # Endpoints that have no names change nothing.
    [dual] = decode_value(service("dual", "10.96.0.20"))
    names.replace(dual.ref, dual, [])
    serial = names.serial
    [slice_] = decode_value(endpoints("10.1.0.1", of="dual"))
    names.replace(dual.ref, dual, [slice_])
    assert names.serial == serial
    names.replace(dual.ref, None, [])

    [moved] = decode_value(service("db", "10.96.0.50"))
    names.replace(db, moved, [])
    assert texts(ask(names, f"db.shop.{SVC}", "A")) == ["10.96.0.50"]
    assert ask(names, f"db-0.db.shop.{SVC}", "A").rcode == NXDOMAIN
    names.replace(db, None, [])
    # The last name of a namespace takes it along.
    assert ask(names, f"shop.{SVC}", "A").rcode == NXDOMAIN


def test_another_zone() -> None:
    names = names_of([service()], zone="Example.Org")
    assert texts(ask(names, "web.shop.svc.example.org.", "A")) == ["10.96.0.10"]
    assert is_foreign(names, f"web.shop.{SVC}")


@pytest.mark.parametrize("zone", ["", ".", "a..b", f"{'x' * 64}.y", "ab." * 20 + "c", "é" * 99])
def test_what_is_no_zone(zone: str) -> None:
    with pytest.raises(ConfigError):
        Names(zone)

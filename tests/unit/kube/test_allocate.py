"""Who gets which cluster IP and node port. The numbers are KEP-3070's and KEP-3668's."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
import pytest

from svcdp.errors import CapacityError, ConflictError
from svcdp.kube.allocate import Allocator, Band
from svcdp.kube.model import Service, ServiceRef

CIDR = "10.96.0.0/24"
CIDRS = (CIDR, "fd00:96::/112")


def service(name: str, *ports: dict[str, Any], created: str = "", **spec: Any) -> Service:
    metadata = {"name": name} | ({"creationTimestamp": created} if created else {})
    value = {"metadata": metadata, "spec": {"ports": list(ports or [{"port": 80}]), **spec}}
    return msgspec.convert(value, Service)


def ref(name: str) -> ServiceRef:
    return ServiceRef("default", name)


def given(allocator: Allocator, *services: Service, gone: tuple[str, ...] = ()) -> list[Service]:
    changed = allocator.update(services, [ref(name) for name in gone])
    return [changed[each.ref] for each in services]


def address(allocator: Allocator, one: Service) -> str | None:
    return given(allocator, one)[0].spec.cluster_ip


def messages(allocator: Allocator) -> list[str]:
    return [str(problem) for problem in allocator.problems]


@pytest.mark.parametrize(
    ("cidr", "first", "last", "dynamic"),
    [
        ("10.96.0.0/24", "10.96.0.1", "10.96.0.254", "10.96.0.17"),
        ("10.96.0.0/20", "10.96.0.1", "10.96.15.254", "10.96.1.1"),
        ("10.96.0.0/16", "10.96.0.1", "10.96.255.254", "10.96.1.1"),
        ("10.96.0.0/29", "10.96.0.1", "10.96.0.6", "10.96.0.1"),
        ("10.96.0.8/31", "10.96.0.8", "10.96.0.9", "10.96.0.8"),
        ("fd00::/112", "fd00::1", "fd00::ffff", "fd00::101"),
        ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00::101"),
    ],
)
def test_bands_of_addresses(cidr: str, first: str, last: str, dynamic: str) -> None:
    band = Band.of_network(cidr)
    lowest, highest, least = (int(ipaddress.ip_address(each)) for each in (first, last, dynamic))
    assert (band.first, band.last) == (lowest, highest)
    count = min(highest - least + 1, 3000)
    picked = {band.pick(f"holder {number}") for number in range(count)}
    assert len(picked) == count
    assert least <= min(picked) <= max(picked) <= highest


def test_the_upper_band_goes_first_then_the_lower_one() -> None:
    band = Band.of_ports(30000, 32767)
    upper = {band.pick(f"holder {number}") for number in range(32767 - 30086 + 1)}
    assert upper == {*range(30086, 32768)}
    lower = {band.pick(f"late {number}") for number in range(86)}
    assert lower == {*range(30000, 30086)}
    with pytest.raises(CapacityError, match="range is full"):
        band.pick("last")
    band.release(31000)
    band.release(31000)
    assert band.pick("last") == 31000


def test_a_number_has_one_holder() -> None:
    band = Band(1, 9)
    band.take(4, "Service a/b")
    band.take(4, "Service a/b")
    with pytest.raises(ConflictError, match="already allocated to Service a/b"):
        band.take(4, "Service c/d")


def test_what_a_manifest_says_goes_first() -> None:
    allocator = Allocator([CIDR])
    picked = address(Allocator([CIDR]), service("a"))
    a, b = given(allocator, service("a"), service("b", clusterIP=picked))
    assert b.spec.cluster_ip == picked
    assert b.spec.cluster_ips == (picked,)
    assert b.spec.ip_families == ("IPv4",)
    assert a.spec.cluster_ip != picked
    assert not allocator.problems


def test_who_had_it_first_keeps_it_and_the_next_follows() -> None:
    allocator = Allocator([CIDR])
    (first,) = given(allocator, service("z"))
    held = first.spec.cluster_ip
    assert address(allocator, service("a", clusterIP=held)) is None
    assert messages(allocator) == [
        f"Service default/a: $.spec.clusterIP: {held} is already allocated to Service default/z"
    ]
    changed = allocator.update((), [ref("z")])
    assert changed[ref("a")].spec.cluster_ip == held
    assert not allocator.problems


def test_of_two_at_the_same_time_the_older_one_gets_it() -> None:
    allocator = Allocator([CIDR])
    new = service("a", clusterIP="10.96.0.5", created="2026-02-01T00:00:00Z")
    old = service("b", clusterIP="10.96.0.5", created="2026-01-01T00:00:00Z")
    got = given(allocator, new, old)
    assert [each.spec.cluster_ip for each in got] == [None, "10.96.0.5"]


@pytest.mark.parametrize("text", ["10.96.0.0", "10.96.0.255", "10.97.0.1"])
def test_an_address_out_of_range_is_not_served(text: str) -> None:
    allocator = Allocator([CIDR])
    assert address(allocator, service("a", clusterIP=text)) is None
    assert messages(allocator) == [
        f"Service default/a: $.spec.clusterIP: {text} is not in the range 10.96.0.1-10.96.0.254"
    ]


def test_without_networks_manifests_are_right() -> None:
    allocator = Allocator()
    one, other = given(
        allocator, service("a", clusterIP="10.0.0.1"), service("b", clusterIP="10.0.0.1")
    )
    assert (one.spec.cluster_ip, other.spec.cluster_ip) == ("10.0.0.1", "10.0.0.1")
    assert address(allocator, service("c")) is None
    assert not allocator.problems


def test_a_full_network_is_told_of_and_the_next_one_used() -> None:
    allocator = Allocator(["10.96.0.0/30"])
    got = given(allocator, *(service(name) for name in "abc"))
    assert {each.spec.cluster_ip for each in got} == {"10.96.0.1", "10.96.0.2", None}
    assert messages(allocator) == [
        "Service default/c: $.spec.clusterIP: range is full: 10.96.0.1-10.96.0.2"
    ]
    grown = Allocator(["10.96.0.0/30", "10.97.0.0/30"], remembered=allocator.holdings)
    again = given(grown, *(service(name) for name in "abc"))
    assert again[:2] == got[:2]
    assert again[2].spec.cluster_ip in {"10.97.0.1", "10.97.0.2"}


def test_networks_that_overlap_have_each_address_once() -> None:
    allocator = Allocator(["10.96.0.4/30", "10.96.0.0/28"])
    got = given(allocator, *(service(f"s{number}") for number in range(14)))
    assert len({each.spec.cluster_ip for each in got} - {None}) == 14
    allocator.update((), [each.ref for each in got])
    assert address(allocator, service("a", clusterIP="10.96.0.5")) == "10.96.0.5"
    assert address(allocator, service("b", clusterIP="10.96.0.5")) is None


def test_what_services_go_without_is_an_event() -> None:
    allocator = Allocator(["10.96.0.0/30"], node_ports=(30000, 30000))
    node_port = {"type": "NodePort", "clusterIP": "10.96.0.1"}
    given(
        allocator,
        service("a", {"port": 80, "nodePort": 30000}, **node_port),
        service("b", {"port": 80, "nodePort": 30000}, **node_port),
        service("c", {"port": 80, "nodePort": 1}, type="NodePort", clusterIP="10.97.0.1"),
        service("d"),
        service("e", type="NodePort"),
    )
    assert [(each.regarding.name, each.reason) for each in allocator.events] == [
        ("b", "ClusterIPAlreadyAllocated"),
        ("b", "PortAlreadyAllocated"),
        ("c", "ClusterIPOutOfRange"),
        ("c", "PortOutOfRange"),
        ("e", "ServiceCIDRFull"),
        ("e", "PortRangeFull"),
    ]
    assert allocator.events[0].message == (
        "$.spec.clusterIP: 10.96.0.1 is already allocated to Service default/a"
    )


def test_what_is_remembered_is_given_again() -> None:
    before = Allocator(CIDRS)
    services = [
        service(f"s{number}", type="NodePort", ipFamilyPolicy="PreferDualStack")
        for number in range(50)
    ]
    got = given(before, *services)
    remembered = {ref: dict(slots) for ref, slots in before.holdings.items()}
    after = Allocator(CIDRS, remembered=remembered)
    # They come one by one, the last first, and somebody new before all.
    given(after, service("new", type="NodePort"))
    assert [given(after, each)[0] for each in reversed(services)] == got[::-1]
    # Out of range now: as if it had not been.
    moved = Allocator(["10.200.0.0/16"], (20000, 21000), remembered)
    (one,) = given(moved, services[0])
    assert one.spec.cluster_ip
    assert one.spec.cluster_ip.startswith("10.200.")
    assert one.spec.ports
    assert one.spec.ports[0].node_port in range(20032, 21001)
    assert not moved.problems


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        ({}, ["IPv4"]),
        ({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}, ["IPv6"]),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"]),
        ({"ipFamilies": ["IPv6", "IPv4"]}, ["IPv6", "IPv4"]),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"]),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, ["IPv6", "IPv4"]),
        ({"ipFamilyPolicy": "PreferDualStack", "clusterIP": "fd00:96::7"}, ["IPv6", "IPv4"]),
    ],
)
def test_families(spec: dict[str, Any], families: list[str]) -> None:
    allocator = Allocator(CIDRS)
    (got,) = given(allocator, service("a", **spec))
    assert list(got.spec.ip_families or ()) == families
    assert got.spec.cluster_ips is not None
    versions = [f"IPv{ipaddress.ip_address(each).version}" for each in got.spec.cluster_ips]
    assert versions == families
    assert (
        got.spec.cluster_ip == got.spec.cluster_ips[0] == spec.get("clusterIP", got.spec.cluster_ip)
    )
    assert not allocator.problems


def test_two_families_where_one_network_is() -> None:
    allocator = Allocator([CIDR])
    preferring, requiring = given(
        allocator,
        service("a", ipFamilyPolicy="PreferDualStack"),
        service("b", ipFamilyPolicy="RequireDualStack"),
    )
    assert preferring.spec.ip_families == requiring.spec.ip_families == ("IPv4",)
    assert messages(allocator) == [
        "Service default/b: $.spec.clusterIP: there is no network for cluster IPs of IPv6: add one"
    ]


@pytest.mark.parametrize(
    "spec", [{"clusterIP": "None"}, {"type": "ExternalName", "externalName": "a.example"}]
)
def test_some_need_nothing(spec: dict[str, Any]) -> None:
    allocator = Allocator(CIDRS)
    one = service("a", {"port": 80, "nodePort": 30080}, **spec)
    assert given(allocator, one) == [one]
    assert not allocator.holdings


@pytest.mark.parametrize(
    ("spec", "has_port"),
    [
        ({"type": "ClusterIP"}, False),
        ({"type": "NodePort"}, True),
        ({"type": "LoadBalancer"}, True),
        ({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False}, False),
    ],
)
def test_who_gets_node_ports(spec: dict[str, Any], *, has_port: bool) -> None:
    (got,) = given(Allocator(CIDRS), service("a", **spec))
    assert got.spec.ports
    assert bool(got.spec.ports[0].node_port) is has_port
    assert not got.spec.health_check_node_port


def test_protocols_of_one_port_share_a_node_port() -> None:
    allocator = Allocator(CIDRS)
    ports = (
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        {"name": "web", "port": 80},
    )
    (got,) = given(allocator, service("dns", *ports, type="NodePort"))
    numbers = [port.node_port for port in got.spec.ports or ()]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0]
    # It is free only when both let go.
    given(allocator, service("dns", *ports[1:], type="NodePort"))
    given(allocator, service("other", {"port": 1, "nodePort": numbers[0]}, type="NodePort"))
    assert messages(allocator) == [
        "Service default/other: $.spec.ports[0].nodePort:"
        f" {numbers[0]} is already allocated to Service default/dns"
    ]
    allocator.update([service("dns", *ports[2:], type="NodePort")])
    assert not allocator.problems


def test_an_asked_for_node_port_is_the_other_protocols_too() -> None:
    ports = ({"name": "udp", "port": 53, "protocol": "UDP"}, {"port": 53, "nodePort": 30053})
    (got,) = given(Allocator(), service("dns", *ports, type="NodePort"))
    assert [port.node_port for port in got.spec.ports or ()] == [30053, 30053]


def test_a_node_port_out_of_range() -> None:
    allocator = Allocator(CIDRS)
    (got,) = given(allocator, service("a", {"port": 80, "nodePort": 80}, type="NodePort"))
    assert got.spec.cluster_ip
    assert got.spec.ports
    assert got.spec.ports[0].node_port is None
    assert messages(allocator) == [
        "Service default/a: $.spec.ports[0].nodePort: 80 is not in the range 30000-32767"
    ]


def test_health_check_node_ports() -> None:
    allocator = Allocator(CIDRS)
    local = service("a", type="LoadBalancer", externalTrafficPolicy="Local")
    (got,) = given(allocator, local)
    assert got.spec.ports
    assert got.spec.health_check_node_port
    assert got.spec.health_check_node_port != got.spec.ports[0].node_port
    (got,) = given(
        allocator,
        service(
            "a",
            {"port": 80, "nodePort": 30100},
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=30100,
        ),
    )
    assert got.spec.health_check_node_port is None
    assert "30100 is already allocated to Service default/a" in messages(allocator)[0]
    given(allocator, service("a", type="LoadBalancer"))
    assert {*allocator.holdings[ref("a")]} == {"IPv4", "80/TCP"}


def test_what_a_service_lets_go_of_is_free() -> None:
    allocator = Allocator(CIDRS)
    given(allocator, service("a", {"port": 80, "nodePort": 30080}, type="NodePort"))
    given(allocator, service("b", {"port": 80, "nodePort": 30080}, type="NodePort"))
    assert allocator.problems
    changed = allocator.update([service("a")])
    assert {each.name for each in changed} == {"a", "b"}
    ports = changed[ref("b")].spec.ports
    assert ports
    assert ports[0].node_port == 30080
    assert not allocator.problems
    assert allocator.update([service("a")]) == {}


def test_only_what_changes_is_looked_at() -> None:
    allocator = Allocator(["10.96.0.0/12"], (30000, 30009))
    given(allocator, *(service(f"s{number}", type="NodePort") for number in range(3000)))
    assert len(allocator.problems) == 2990
    changed = allocator.update([service("another")])
    assert {each.name for each in changed} == {"another"}
    assert len({slots["IPv4"] for slots in allocator.holdings.values()}) == 3001

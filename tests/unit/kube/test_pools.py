"""Who gets which load-balancer address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from svcdp.errors import ManifestError
from svcdp.kube import decode, pools
from svcdp.kube.decode import decode_value
from svcdp.kube.model import LoadBalancerPool, Service, ServiceRef
from svcdp.kube.pools import (
    ADDRESSES_ANNOTATION,
    POOL_CLASS,
    SHARING_ANNOTATION,
    Allocation,
    allocate,
    held_addresses,
    parse_span,
    usages,
    with_addresses,
)

CRD = Path(__file__).parents[3] / "deploy" / "loadbalancerpools.yaml"
DUAL: dict[str, Any] = {"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack"}


def service(
    name: str,
    *ports: int,
    ip: str = "",
    sharing: str = "",
    created: str | None = None,
    labels: dict[str, str] | None = None,
    namespace: str = "default",
    **spec: Any,
) -> Service:
    annotations = {SHARING_ANNOTATION: sharing, ADDRESSES_ANNOTATION: ip}
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": labels,
        "annotations": {key: value for key, value in annotations.items() if value},
        "creationTimestamp": created,
    }
    listed = [{"name": f"p{port}", "port": port} for port in ports or (80,)]
    value = {"metadata": metadata, "spec": {"type": "LoadBalancer", "ports": listed} | spec}
    return msgspec.convert(value, Service)


def pool(*addresses: str, name: str = "pool", **spec: Any) -> LoadBalancerPool:
    value = {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": name},
        "spec": {"addresses": list(addresses), **spec},
    }
    [found] = decode_value(value)
    assert isinstance(found, LoadBalancerPool)
    return found


def got(allocation: Allocation) -> dict[str, str]:
    return {ref.name: " ".join(texts) for ref, texts in allocation.addresses.items()}


def reasons(allocation: Allocation) -> dict[str, str]:
    assert len(allocation.events) == len(allocation.problems)
    return {event.regarding.name: event.reason for event in allocation.events}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("192.0.2.0/28", 14),
        ("192.0.2.7/32", 1),
        ("192.0.2.0/31", 2),
        ("192.0.2.10-192.0.2.19", 10),
        ("192.0.2.10 - 192.0.2.10", 1),
        ("2001:db8::/64", 2**64 - 1),
        ("2001:db8::10-2001:db8::1f", 16),
    ],
)
def test_spans(text: str, size: int) -> None:
    span = parse_span(text)
    assert span.last - span.first + 1 == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1",
        "192.0.2.0/33",
        "192.0.2.9-192.0.2.1",
        "192.0.2.1-2001:db8::1",
        "192.0.2.1-192.0.2.2-192.0.2.3",
        "a-b",
        "224.0.0.0/24",
        "127.0.0.0/30",
        "169.254.0.0/16",
        "fe80::/64",
        "::1/128",
        "0.0.0.0/0",
        "120.0.0.0-130.0.0.0",
        "192.0.2.1-255.255.255.254",
        "::/0",
        "::ffff:192.0.2.0/120",
    ],
)
def test_bad_spans(text: str) -> None:
    with pytest.raises(ManifestError):
        parse_span(text)
    manifest = {
        "apiVersion": "svcdp.io/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": "lan"},
        "spec": {"addresses": [text]},
    }
    decoded = decode(yaml.safe_dump(manifest).encode(), "pool.yaml")
    assert not decoded.objects
    [error] = decoded.errors
    assert (error.field, error.object) == ("$.spec.addresses[0]", "LoadBalancerPool lan")


def test_only_services_of_type_load_balancer_and_of_this_class() -> None:
    services = [
        service("plain"),
        service("own", loadBalancerClass=POOL_CLASS),
        service("cloud", loadBalancerClass="example.com/cloud"),
        service("port", type="NodePort"),
    ]
    pools = [pool("192.0.2.0/24")]
    assert got(allocate(services, pools)).keys() == {"plain", "own"}
    assert got(allocate(services, pools, without_class=False)).keys() == {"own"}


def test_an_address_of_ones_own_the_same_in_any_order() -> None:
    services = [service(f"s{number}") for number in range(20)]
    found = allocate(services, [pool("192.0.2.0/27")])
    assert len(set(found.addresses.values())) == 20
    assert not found.problems
    assert allocate(reversed(services), [pool("192.0.2.0/27")]) == found


@pytest.mark.parametrize(
    "asked", [{"ip": "192.0.2.9"}, {"loadBalancerIP": "192.0.2.9"}], ids=["annotation", "field"]
)
def test_who_asks_goes_before_who_takes_any(asked: dict[str, Any]) -> None:
    pools = [pool("192.0.2.9-192.0.2.10")]
    assert got(allocate([service("a"), service("b", **asked)], pools)) == {
        "a": "192.0.2.10",
        "b": "192.0.2.9",
    }


def test_who_had_it_keeps_it() -> None:
    pools = [pool("192.0.2.9-192.0.2.10")]
    had = {ServiceRef("default", "z"): ("192.0.2.9",)}
    found = allocate([service("a", ip="192.0.2.9"), service("z")], pools, had)
    assert got(found) == {"z": "192.0.2.9"}
    assert reasons(found) == {"a": "LoadBalancerIPAlreadyAllocated"}
    assert str(found.problems[0]) == (
        "Service default/a: $.spec.loadBalancerIP: 192.0.2.9 is already allocated to "
        "Service default/z"
    )
    # It is gone, or is not of that type any more.
    for others in ([], [service("z", type="ClusterIP")]):
        assert got(allocate([service("a", ip="192.0.2.9"), *others], pools, had)) == {
            "a": "192.0.2.9"
        }


@pytest.mark.parametrize("changed", [{"ip": "192.0.2.10"}, {"labels": {"pool": "no"}}])
def test_what_is_not_right_any_more_is_not_kept(changed: dict[str, Any]) -> None:
    chosen = {"matchExpressions": [{"key": "pool", "operator": "DoesNotExist"}]}
    pools = [pool("192.0.2.9/32", serviceSelector=chosen), pool("192.0.2.10/32", name="other")]
    had = {ServiceRef("default", "a"): ("192.0.2.9",)}
    assert got(allocate([service("a", **changed)], pools, had)) == {"a": "192.0.2.10"}


def test_of_two_who_ask_the_older_one_gets_it() -> None:
    found = allocate(
        [
            service("a", ip="192.0.2.5", created="2026-02-01T00:00:00Z"),
            service("b", ip="192.0.2.5", created="2026-01-01T00:00:00Z"),
        ],
        [pool("192.0.2.0/24")],
    )
    assert got(found) == {"b": "192.0.2.5"}


@pytest.mark.parametrize(
    ("one", "reason", "words"),
    [
        (service("a", ip="198.51.100.1"), "LoadBalancerIPOutOfRange", "in no LoadBalancerPool"),
        (service("a", ip="192.0.2.300"), "InvalidLoadBalancerIP", "not an IP address"),
        (service("a", ip="192.0.2.1, 192.0.2.2"), "InvalidLoadBalancerIP", "second IPv4"),
        (service("a", ipFamilies=["IPv6"]), "LoadBalancerPoolFull", "has IPv6 addresses"),
    ],
)
def test_what_cannot_be_had(one: Service, reason: str, words: str) -> None:
    found = allocate([one], [pool("192.0.2.0/24")])
    assert not found.addresses
    assert reasons(found) == {"a": reason}
    assert words in str(found.problems[0])


def test_an_address_of_a_family_that_the_service_does_not_have() -> None:
    asked = service("a", ip="2001:db8::1", ipFamilies=["IPv4"])
    found = allocate([asked], [pool("192.0.2.1/32", "2001:db8::/64")])
    assert got(found) == {"a": "192.0.2.1"}
    assert reasons(found) == {"a": "InvalidLoadBalancerIP"}


def test_exhaustion_and_release() -> None:
    pools = [pool("192.0.2.1-192.0.2.2")]
    services = [service(name) for name in "abc"]
    full = allocate(services, pools)
    assert full.addresses.keys() == {each.ref for each in services[:2]}
    assert reasons(full) == {"c": "LoadBalancerPoolFull"}
    after = allocate(services[1:], pools, full.addresses)
    assert got(after) == {"b": got(full)["b"], "c": got(full)["a"]}
    assert not after.problems


def test_pools_are_for_namespaces_and_labels() -> None:
    pools = [
        pool("192.0.2.1/32", name="a", namespaces=["shop"]),
        pool("192.0.2.2/32", name="b", serviceSelector={"matchLabels": {"tier": "web"}}),
        pool("192.0.2.3/32", name="c", autoAssign=False),
    ]
    found = allocate(
        [
            service("x", namespace="shop"),
            service("y", labels={"tier": "web", "more": "1"}),
            service("z"),
            service("asks", ip="192.0.2.3"),
        ],
        pools,
    )
    assert got(found) == {"x": "192.0.2.1", "y": "192.0.2.2", "asks": "192.0.2.3"}
    assert reasons(found) == {"z": "LoadBalancerPoolFull"}


@pytest.mark.parametrize(
    ("operator", "values", "chosen"),
    [
        ("In", ["web", "api"], {"web"}),
        ("NotIn", ["web"], {"db", "none"}),
        ("Exists", None, {"web", "db"}),
        ("DoesNotExist", None, {"none"}),
    ],
)
def test_label_expressions(operator: str, values: list[str] | None, chosen: set[str]) -> None:
    rule = {"key": "tier", "operator": operator, "values": values}
    one = pool("192.0.2.0/24", serviceSelector={"matchExpressions": [rule]})
    services = [service(tier, labels={"tier": tier}) for tier in ("web", "db")]
    assert got(allocate([*services, service("none")], [one])).keys() == chosen


def test_dual_stack() -> None:
    both = pool("2001:db8::1/128", "192.0.2.1/32")
    assert got(allocate([service("a", **DUAL)], [both])) == {"a": "192.0.2.1 2001:db8::1"}
    prefers = allocate([service("a", **DUAL)], [pool("192.0.2.1/32")])
    assert got(prefers) == {"a": "192.0.2.1"}
    assert not prefers.problems
    needs = service("a", ipFamilies=DUAL["ipFamilies"], ipFamilyPolicy="RequireDualStack")
    requires = allocate([needs], [pool("192.0.2.1/32")])
    assert got(requires) == {"a": "192.0.2.1"}
    assert reasons(requires) == {"a": "LoadBalancerPoolFull"}
    asked = service("a", ip="2001:db8::7,192.0.2.7", **DUAL)
    wide = pool("192.0.2.0/24", "2001:db8::/64")
    assert got(allocate([asked], [wide])) == {"a": "192.0.2.7 2001:db8::7"}


def test_a_pool_for_those_who_ask_gives_nobody_else_any() -> None:
    found = allocate([service("a")], [pool("192.0.2.3/32", autoAssign=False)])
    assert not found.addresses
    assert reasons(found) == {"a": "LoadBalancerPoolFull"}


def test_the_order_of_pools_does_not_matter() -> None:
    pools = [pool("192.0.2.1/32", name="a"), pool("192.0.2.2/32", name="b")]
    assert got(allocate([service("x")], pools)) == {"x": "192.0.2.1"}
    assert got(allocate([service("x")], reversed(pools))) == {"x": "192.0.2.1"}


def test_without_families_it_has_those_of_what_it_asks_for() -> None:
    asked = service("a", ip="2001:db8::7")
    assert got(allocate([asked], [pool("192.0.2.0/24", "2001:db8::/64")])) == {"a": "2001:db8::7"}


LOCAL: dict[str, Any] = {"externalTrafficPolicy": "Local"}


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (service("a", 80, sharing="k"), service("b", 443, sharing="k"), True),
        (service("a", 80, sharing="k"), service("b", 80, 443, sharing="k"), False),
        (service("a", 80, sharing="k"), service("b", 443, sharing="other"), False),
        (service("a", 80), service("b", 443), False),
        (service("a", 80, sharing="k"), service("b", 443, sharing="k", **LOCAL), False),
        (
            service("a", 80, sharing="k", selector={"run": "x"}, **LOCAL),
            service("b", 443, sharing="k", selector={"run": "x"}, **LOCAL),
            True,
        ),
        (
            service("a", 80, sharing="k", selector={"run": "x"}, **LOCAL),
            service("b", 443, sharing="k", selector={"run": "y"}, **LOCAL),
            False,
        ),
    ],
)
def test_sharing(first: Service, second: Service, shared: bool) -> None:
    found = allocate([first, second], [pool("192.0.2.1/32")])
    assert got(found) == {"a": "192.0.2.1"} | ({"b": "192.0.2.1"} if shared else {})
    # Who need not share does not, and who may does.
    wide = got(allocate([first, second], [pool("192.0.2.0/24")]))
    assert (wide["a"] == wide["b"]) is shared
    # Nor does who asks for just that address.
    asking = [_asking(each, "192.0.2.1") for each in (first, second)]
    found = allocate(asking, [pool("192.0.2.0/24")])
    assert reasons(found) == ({} if shared else {"b": "LoadBalancerIPAlreadyAllocated"})


def _asking(each: Service, address: str) -> Service:
    spec = msgspec.structs.replace(each.spec, load_balancer_ip=address)
    return msgspec.structs.replace(each, spec=spec)


def test_a_port_of_another_protocol_is_another_one() -> None:
    both = [
        service(name, sharing="k", ports=[{"port": 53, "protocol": protocol}])
        for name, protocol in (("a", "TCP"), ("b", "UDP"))
    ]
    assert got(allocate(both, [pool("192.0.2.1/32")])) == dict.fromkeys("ab", "192.0.2.1")


def test_pods_of_two_namespaces_are_not_the_same() -> None:
    """However alike the labels are, by which a node has some of them."""
    services = [
        service(namespace, port, namespace=namespace, sharing="k", selector={"run": "x"}, **LOCAL)
        for port, namespace in enumerate(("shop", "web"), 80)
    ]
    found = allocate(services, [pool("192.0.2.1-192.0.2.2")])
    assert len(set(got(found).values())) == 2


def test_an_address_of_a_pool_for_others_is_not_shared() -> None:
    pools = [pool("192.0.2.1/32", name="a", namespaces=["a"]), pool("192.0.2.2/32", name="b")]
    services = [service("x", 80, namespace="a", sharing="k"), service("y", 81, sharing="k")]
    assert got(allocate(services, pools)) == {"x": "192.0.2.1", "y": "192.0.2.2"}


def test_the_first_address_with_room_is_shared() -> None:
    services = [
        service(name, *ports, sharing="k")
        for name, ports in (("a", [80]), ("b", [80, 443]), ("c", [443, 53]), ("d", [53]))
    ]
    found = got(allocate(services, [pool("192.0.2.0/24")]))
    assert found["a"] == found["c"]
    assert found["b"] == found["d"] != found["a"]


def test_sharing_costs_no_comparison_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many who would share, and all have the same port."""
    asked = 0
    obstacle = pools._Holders.obstacle

    def counted(holders: Any, other: Service) -> str:
        nonlocal asked
        asked += 1
        return obstacle(holders, other)

    monkeypatch.setattr(pools._Holders, "obstacle", counted)
    services = [service(f"s{number}", 80, sharing="k") for number in range(100)]
    found = got(allocate(services, [pool("192.0.2.0/24")]))
    assert len(set(found.values())) == len(services)
    assert asked == len(services)


def test_a_full_range_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many go without."""
    looks: list[int | None] = []
    free = pools.Span.free

    def counted(*arguments: Any) -> int | None:
        looks.append(free(*arguments))
        return looks[-1]

    monkeypatch.setattr(pools.Span, "free", counted)
    services = [service(f"s{number}") for number in range(20)]
    found = allocate(services, [pool("192.0.2.1-192.0.2.2", "192.0.2.9/32")])
    assert len(found.addresses) == 3
    assert looks.count(None) == 2


def test_the_status_that_proxies_go_by() -> None:
    status = with_addresses(service("a"), ["192.0.2.1", "2001:db8::1"]).status
    assert msgspec.to_builtins(status) == {
        "loadBalancer": {
            "ingress": (
                {"ip": "192.0.2.1", "ipMode": "VIP"},
                {"ip": "2001:db8::1", "ipMode": "VIP"},
            )
        }
    }
    without = with_addresses(service("a"), []).status
    assert msgspec.to_builtins(without) == {"loadBalancer": {"ingress": None}}


def test_the_definition_has_the_fields_that_are_read() -> None:
    crd = yaml.safe_load(CRD.read_text())
    [version] = crd["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    read = msgspec.json.schema(LoadBalancerPool)["$defs"]
    assert spec.keys() == read["LoadBalancerPoolSpec"]["properties"].keys()
    selector = spec["serviceSelector"]["properties"]
    assert selector.keys() == read["LabelSelector"]["properties"].keys()
    rule = selector["matchExpressions"]["items"]["properties"]
    assert rule.keys() == read["LabelRequirement"]["properties"].keys()
    assert set(rule["operator"]["enum"]) == {
        *read["LabelRequirement"]["properties"]["operator"]["enum"]
    }
    assert (crd["spec"]["group"], version["name"]) == ("svcdp.io", "v1alpha1")


def test_what_others_have_is_taken() -> None:
    other = with_addresses(service("z", loadBalancerClass="example.com/cloud"), ["192.0.2.9"])
    lan = pool("192.0.2.9-192.0.2.10")
    found = allocate([service("a"), service("b")], [lan], others=[other])
    assert sorted(got(found).values()) == ["192.0.2.10"]
    # Whoever remembers it does not keep it, nor is it shared.
    had = {ServiceRef("default", "a"): ("192.0.2.9",)}
    assert got(allocate([service("a", sharing="x")], [lan], had, others=[other])) == {
        "a": "192.0.2.10"
    }


def test_what_others_share_is_shared_with_them() -> None:
    """As with one that is being deleted, and is given nothing more."""
    others = [
        with_addresses(service(name, port, sharing="x"), ["192.0.2.9"])
        for name, port in (("y", 81), ("z", 82))
    ]
    lan = pool("192.0.2.9-192.0.2.10")
    ports = {"a": 80, "b": 81, "c": 82}
    services = [service(name, port, sharing="x") for name, port in ports.items()]
    had = {ServiceRef("default", name): ("192.0.2.9",) for name in ports}
    found = allocate(services, [lan], had, others=others)
    assert got(found) == {"a": "192.0.2.9", "b": "192.0.2.10", "c": "192.0.2.10"}


@pytest.mark.parametrize("sharing", [("", "x"), ("x", ""), ("x", "y")])
def test_who_shares_is_not_offered_what_others_do_not(sharing: tuple[str, str]) -> None:
    others = [
        with_addresses(service("y", 81, sharing=sharing[0]), ["192.0.2.9"]),
        with_addresses(service("z", 82, sharing=sharing[1]), ["192.0.2.9"]),
    ]
    lan = pool("192.0.2.9-192.0.2.10")
    had = {ServiceRef("default", "a"): ("192.0.2.9",)}
    for remembered in ({}, had):
        found = allocate([service("a", sharing="x")], [lan], remembered, others=others)
        assert got(found) == {"a": "192.0.2.10"}


def test_held_addresses() -> None:
    ingress = [
        {"ip": "192.0.2.9", "ipMode": "VIP"},
        {"ip": "192.0.2.10", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"},
        {"ip": "2001:DB8::1"},
        {"ip": "192.0.2.09"},
        {"ip": "nonsense"},
    ]
    found = msgspec.convert(
        {
            "metadata": {"name": "a"},
            "spec": {"type": "LoadBalancer"},
            "status": {"loadBalancer": {"ingress": ingress}},
        },
        Service,
    )
    assert held_addresses(found) == ("192.0.2.9", "2001:db8::1")
    assert held_addresses(service("b")) == ()


@pytest.mark.parametrize(
    ("spans", "size", "used"),
    [
        (["192.0.2.0/28"], 14, 2),
        (["192.0.2.0/28", "192.0.2.8-192.0.2.19"], 19, 2),
        (["192.0.2.0/28", "192.0.2.2-192.0.2.3"], 14, 2),
        (["192.0.2.16/28"], 14, 0),
        (["2001:db8::/64"], 2**64 - 1, 1),
        (["192.0.2.9/32", "2001:db8::1-2001:db8::2"], 3, 2),
    ],
)
def test_usages(spans: list[str], size: int, used: int) -> None:
    services = [
        with_addresses(service("a"), ["192.0.2.9", "2001:db8::1"]),
        with_addresses(service("b", 81), ["192.0.2.9"]),
        with_addresses(service("c", loadBalancerClass="example.com/cloud"), ["192.0.2.10"]),
        with_addresses(service("d", type="ClusterIP"), ["192.0.2.11"]),
    ]
    lan = pool(*spans)
    assert usages([lan], services) == [(lan, size, used)]

"""Objects of several origins, and what a change touches."""

from __future__ import annotations

import pytest

from svcdp.errors import ConfigError
from svcdp.kube import Change, NodeContext
from svcdp.kube.model import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
)
from svcdp.kube.tracker import Tracker


def service(name: str, cluster_ip: str = "10.96.0.1", created: str | None = None) -> Service:
    return Service(
        metadata=ObjectMeta(name=name, creation_timestamp=created),
        spec=ServiceSpec(cluster_ip=cluster_ip, ports=(ServicePort(name="http", port=80),)),
    )


def endpoints(of: str, *addresses: str, name: str = "") -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(name=name or of, labels={"kubernetes.io/service-name": of}),
        address_type="IPv4",
        endpoints=tuple(Endpoint(addresses=(address,)) for address in addresses),
        ports=(EndpointPort(name="http", port=8080),),
    )


@pytest.fixture
def tracker() -> Tracker:
    return Tracker(NodeContext())


KEY = ("10.96.0.1", 80, "tcp")


def served(tracker: Tracker) -> dict[str, list[str]]:
    return {
        spec.name: [destination.address for destination in spec.destinations]
        for spec in tracker.claims
    }


def test_objects_come_in_any_order(tracker: Tracker) -> None:
    assert tracker.apply([(0, "a", Change(objects=(endpoints("web", "10.1.0.1"),)))]) == set()
    assert tracker.apply([(0, "a", Change(objects=(service("web"),)))]) == {KEY}
    assert served(tracker) == {"default/web:http": ["10.1.0.1"]}
    assert tracker.apply([(0, "a", Change(deleted=(service("web").key,)))]) == {KEY}
    assert tracker.spec(KEY) is None


def test_a_slice_can_move_to_another_service(tracker: Tracker) -> None:
    first = (service("a", "10.96.0.1"), service("b", "10.96.0.2"))
    tracker.apply([(0, "s", Change(objects=(*first, endpoints("a", "10.1.0.1", name="x"))))])
    keys = tracker.apply([(0, "s", Change(objects=(endpoints("b", "10.1.0.1", name="x"),)))])
    assert len(keys) == 2
    assert served(tracker) == {"default/a:http": [], "default/b:http": ["10.1.0.1"]}


def test_what_is_the_same_touches_nothing(tracker: Tracker) -> None:
    everything = Change(objects=(service("web"), endpoints("web", "10.1.0.1")), replace=True)
    assert tracker.apply([(0, "a", everything)])
    assert tracker.apply([(0, "a", everything)]) == set()


def test_replace_removes_what_the_origin_had(tracker: Tracker) -> None:
    tracker.apply([(0, "s", Change("a.yaml", (service("a"),), replace=True))])
    tracker.apply([(0, "s", Change("b.yaml", (service("b", "10.96.0.2"),), replace=True))])
    tracker.apply([(0, "s", Change("a.yaml", replace=True))])
    assert served(tracker) == {"default/b:http": []}


def test_of_two_files_the_first_by_name_counts_until_it_goes(tracker: Tracker) -> None:
    tracker.apply([(0, "s", Change("b.yaml", (service("web", "10.96.0.2"),), replace=True))])
    tracker.apply([(0, "s", Change("a.yaml", (service("web", "10.96.0.1"),), replace=True))])
    assert [spec.address for spec in tracker.claims] == ["10.96.0.1"]
    assert [str(problem) for problem in tracker.problems()] == [
        "Service default/web is in s/a.yaml and in s/b.yaml; the one in s/a.yaml counts"
    ]
    tracker.apply([(0, "s", Change("a.yaml", replace=True))])
    assert [spec.address for spec in tracker.claims] == ["10.96.0.2"]
    assert tracker.problems() == []


def test_of_two_sources_the_one_followed_first_counts(tracker: Tracker) -> None:
    tracker.apply([(1, "a", Change(objects=(service("web", "10.96.0.2"),)))])
    tracker.apply([(0, "b", Change(objects=(service("web", "10.96.0.1"),)))])
    assert [spec.address for spec in tracker.claims] == ["10.96.0.1"]


def test_who_lost_an_address_takes_over(tracker: Tracker) -> None:
    old, new = service("old", created="2024"), service("new", created="2025")
    tracker.apply([(0, "s", Change(objects=(new,)))])
    assert served(tracker) == {"default/new:http": []}
    tracker.apply([(0, "s", Change(objects=(old,)))])
    assert served(tracker) == {"default/old:http": []}
    [problem] = tracker.problems()
    assert "held by Service default/old:http; Service default/new:http goes" in str(problem)
    tracker.apply([(0, "s", Change(deleted=(old.key,)))])
    assert served(tracker) == {"default/new:http": []}
    assert tracker.problems() == []


def test_deleting_what_is_not_there(tracker: Tracker) -> None:
    assert tracker.apply([(0, "s", Change(deleted=(service("web").key,)))]) == set()


def test_one_endpoint_among_many_services(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = [service(f"s{i}", f"10.96.{i // 250}.{i % 250 + 1}") for i in range(10_000)]
    slices = [endpoints(f"s{i}", "10.1.0.1", "10.1.0.2") for i in range(10_000)]
    assert len(tracker.apply([(0, "s", Change(objects=(*services, *slices)))])) == 10_000

    from svcdp.kube import tracker as module

    resolved = []

    def counting(service, *rest):  # type: ignore[no-untyped-def]
        resolved.append(service.metadata.name)
        return original(service, *rest)

    original = module.resolve_service
    monkeypatch.setattr(module, "resolve_service", counting)
    changed = Change(objects=(endpoints("s7777", "10.1.0.1"),))
    [key] = tracker.apply([(0, "s", changed)])
    assert resolved == ["s7777"]
    spec = tracker.spec(key)
    assert spec is not None
    assert [destination.address for destination in spec.destinations] == ["10.1.0.1"]


def test_the_zone_is_what_the_own_node_says_now() -> None:
    def node(zone: str) -> Change:
        labels = {"topology.kubernetes.io/zone": zone}
        return Change(objects=(Node(metadata=ObjectMeta(name="n1", labels=labels)),))

    tracker = Tracker(NodeContext(name="n1"))
    tracker.apply([(0, "", node("a"))])
    assert tracker.node.zone == "a"
    tracker.apply([(0, "", node("b"))])
    assert tracker.node.zone == "b"
    said = Tracker(NodeContext(name="n1", zone="c"))
    said.apply([(0, "", node("a"))])
    assert said.node.zone == "c"


def test_node_ports_follow_the_addresses_of_the_node() -> None:
    spec = ServiceSpec(
        type="NodePort",
        cluster_ip="10.96.0.1",
        ports=(ServicePort(name="http", port=80, node_port=30080),),
    )
    tracker = Tracker(NodeContext(name="n1", addresses=["192.0.2.1"]))
    web = Service(metadata=ObjectMeta(name="web"), spec=spec)
    tracker.apply([(0, "", Change(objects=(web, endpoints("web", "10.1.0.1"))))])
    old, new = ("192.0.2.1", 30080, "tcp"), ("192.0.2.2", 30080, "tcp")
    assert tracker.spec(old) is not None
    tracker.renumber(["192.0.2.2"])
    assert {old, new} <= tracker.apply([])
    assert tracker.spec(old) is None
    served = tracker.spec(new)
    assert served is not None
    assert served.masquerade_address == "192.0.2.2"
    assert tracker.apply([]) == set()
    with pytest.raises(ConfigError, match="addresses"):
        tracker.renumber(["192.0.2.256"])
    assert tracker.node.addresses == ("192.0.2.2",)


def test_an_address_of_the_node_that_its_node_object_knew_before() -> None:
    """The Node tells its primary address before the interface has it."""
    status = NodeStatus(addresses=(NodeAddress(type="InternalIP", address="192.0.2.7"),))
    node = Node(metadata=ObjectMeta(name="n1"), status=status)
    tracker = Tracker(NodeContext(name="n1", addresses=["192.0.2.1"]))
    tracker.apply([(0, "", Change(objects=(node,)))])
    assert tracker.node.primary_address("IPv4") == "192.0.2.1"
    tracker.renumber(["192.0.2.1", "192.0.2.7"])
    tracker.apply([])
    assert tracker.node.primary_address("IPv4") == "192.0.2.7"


def test_a_bug_in_one_service_is_its_own(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps what it had, and others get what they want."""
    from svcdp.kube import tracker as module

    def failing(service, *rest):  # type: ignore[no-untyped-def]
        if service.metadata.name == "bad" and broken:
            raise ZeroDivisionError("a bug")
        return original(service, *rest)

    original, broken = module.resolve_service, False
    monkeypatch.setattr(module, "resolve_service", failing)
    bad, good = service("bad", "10.96.0.1"), service("good", "10.96.0.2")
    tracker.apply([(0, "s", Change(objects=(bad, good)))])
    broken = True
    change = Change(objects=(endpoints("bad", "10.1.0.1"), endpoints("good", "10.1.0.2")))
    tracker.apply([(0, "s", change)])
    assert served(tracker) == {"default/bad:http": [], "default/good:http": ["10.1.0.2"]}
    assert "ZeroDivisionError" in str(tracker.problems())
    assert "default/bad" in caplog.text
    broken = False
    tracker.apply([(0, "s", Change(objects=(endpoints("bad", "10.1.0.3"),)))])
    assert served(tracker)["default/bad:http"] == ["10.1.0.3"]
    assert tracker.problems() == []

"""What a Service may ask for beyond Kubernetes: annotations, and what becomes of bad ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import wire
from kube_objects import case, endpoints, port, service

from svcdp import Dataplane, schedulers
from svcdp.dataplane import TIMEOUTS
from svcdp.kube import NodeContext, resolve_all
from svcdp.kube import annotations as reading
from svcdp.kube.resolve import Resolution
from svcdp.types import DestinationSpec, PassiveHealth, ServiceSpec, TunnelSpec, Verdict

ADDRESSES = ["192.0.2.1", "2001:db8::1"]
PORTS = [port(8080, "http"), port(53, "dns", "UDP")]
SLICE_PORTS = [port(8080, "http"), port(53, "dns", "UDP")]


def served(annotations: dict[str, str], **fields: Any) -> Resolution:
    """A Service of two ports and both families. What comes of it is good for a dataplane."""
    asked = {f"svcdp.io/{key}": value for key, value in annotations.items()}
    found = resolve_all(
        [
            service(
                "web", "10.96.0.10", "fd00::10", annotations=asked, **{"ports": PORTS, **fields}
            ),
            endpoints("10.1.0.1", "10.1.0.2", ports=SLICE_PORTS),
            endpoints("fd01::1", name="web-6", ports=SLICE_PORTS),
        ],
        NodeContext(addresses=ADDRESSES),
    )
    Dataplane(1000, seed=1).apply(found.specs)
    return found


def test_names_are_those_of_the_dataplane() -> None:
    assert set(reading.STATES) == set(TIMEOUTS)
    assert {name: set(flags) for name, flags in reading.FLAGS.items()} == {
        name: set(flags) for name, flags in schedulers.FLAGS.items()
    }


def test_names_are_those_of_the_reference() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `svcdp.io/")]
    assert set(re.findall(r"`svcdp\.io/([a-z-]+)`", " ".join(cells))) == reading.NAMES


def test_a_name_that_nobody_knows_is_told_of() -> None:
    """Unless it is somebody else's."""
    asked = {"svcdp.io/sheduler": "wlc", "svcdp.io/colour": "red", "example.org/scheduler": "x"}
    found = resolve_all([service(annotations=asked)], NodeContext())
    assert sorted(map(str, found.problems)) == [
        "Service shop/web: $.metadata.annotations['svcdp.io/colour']: no annotation is called so",
        "Service shop/web: $.metadata.annotations['svcdp.io/sheduler']: no annotation is called so:"
        " did you mean svcdp.io/scheduler?",
    ]


def by_key(found: Resolution) -> dict[tuple[str, int, str], ServiceSpec]:
    return {spec.key: spec for spec in found.specs}


HTTP, HTTP6 = ("10.96.0.10", 8080, "tcp"), ("fd00::10", 8080, "tcp")
DNS, DNS6 = ("10.96.0.10", 53, "udp"), ("fd00::10", 53, "udp")
STICKY = {"sessionAffinity": "ClientIP"}

FIELDS = [
    # annotation, its value, more of the Service, the field, what it is of each spec
    case(
        "flags",
        {"scheduler": "sh", "scheduler-flags": "sh-port, sh-fallback"},
        {},
        "scheduler_flags",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), ("sh-fallback", "sh-port")),
    ),
    case(
        "one packet",
        {"one-packet": "true"},
        {},
        "one_packet",
        {HTTP: False, HTTP6: False, DNS: True, DNS6: True},
    ),
    case(
        "timeouts",
        {"timeouts": "udp=30,established=7200"},
        {},
        "timeouts",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), (("established", 7200.0), ("udp", 30.0))),
    ),
    case(
        "removal",
        {"on-endpoint-removal": "expire"},
        {},
        "on_removal",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), "expire"),
    ),
    case(
        "drain",
        {"on-endpoint-removal": "drain = 30s"},
        {},
        "removal_grace",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), 30),
    ),
    case(
        "passive health",
        {"passive-health": "true"},
        {},
        "passive_health",
        {HTTP: PassiveHealth(), HTTP6: PassiveHealth(), DNS: None, DNS6: None},
    ),
    case(
        "passive health by numbers",
        {"passive-health": "failures=5,max-ejection=20"},
        {},
        "passive_health",
        {HTTP: PassiveHealth(5, 10, 20), HTTP6: PassiveHealth(5, 10, 20), DNS: None, DNS6: None},
    ),
    case(
        "no passive health",
        {"passive-health": "false"},
        {},
        "passive_health",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6)),
    ),
    case(
        "time of affinity",
        {},
        STICKY,
        "persistence_timed",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), True),
    ),
    case(
        "reset",
        {"on-endpoint-removal": "reset"},
        {},
        "on_removal",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), "reset"),
    ),
    case(
        "netmask",
        {"persistence-netmask": "ipv4=24, ipv6=64"},
        STICKY,
        "persistence_netmask",
        {HTTP: 24, HTTP6: 64, DNS: 24, DNS6: 64},
    ),
    case(
        "netmask without affinity",
        {"persistence-netmask": "ipv4=24"},
        {},
        "persistence_netmask",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6)),
    ),
    case(
        "engine",
        {"persistence-engine": "sip"},
        STICKY,
        "persistence_engine",
        {HTTP: "", HTTP6: "", DNS: "sip", DNS6: "sip"},
    ),
    case("helper", {"helper": "ftp"}, {}, "helper", {HTTP: "ftp", HTTP6: "ftp", DNS: "", DNS6: ""}),
    case(
        "tunnels clamp",
        {"forwarding": "tunnel"},
        {},
        "mss_clamp",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), True),
    ),
    case(
        "unless told",
        {"forwarding": "tunnel", "mss-clamp": "false"},
        {},
        "mss_clamp",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), False),
    ),
    case(
        "dr does not",
        {"forwarding": "dr"},
        {},
        "mss_clamp",
        dict.fromkeys((HTTP, HTTP6, DNS, DNS6), False),
    ),
]


@pytest.mark.parametrize(("annotations", "more", "field", "expected"), FIELDS)
def test_fields(annotations: dict, more: dict, field: str, expected: dict) -> None:
    found = served(annotations, **more)
    assert found.problems == []
    assert {key: getattr(spec, field) for key, spec in by_key(found).items()} == expected


@pytest.mark.parametrize(
    ("annotations", "tunnel"),
    [
        ({}, TunnelSpec("ipip")),
        ({"tunnel-type": "gre", "tunnel-checksum": "true"}, TunnelSpec("gre", checksum=True)),
        ({"tunnel-type": "gue"}, TunnelSpec("gue", port=6080)),
        ({"tunnel-type": "gue", "tunnel-port": "7000"}, TunnelSpec("gue", port=7000)),
        ({"tunnel-port": "7000"}, TunnelSpec("ipip")),
    ],
)
def test_tunnels(annotations: dict, tunnel: TunnelSpec) -> None:
    found = served({"forwarding": "tunnel", **annotations})
    assert found.problems == []
    for spec in found.specs:
        source = ADDRESSES[":" in spec.address]
        for each in spec.destinations:
            assert each.method == "tunnel"
            assert each.tunnel == TunnelSpec(tunnel.type, source, tunnel.port, tunnel.checksum)


def test_thresholds_are_those_of_each_endpoint() -> None:
    found = served({"thresholds": "upper=100, lower=80"})
    assert by_key(found)[HTTP].destinations == (
        DestinationSpec("10.1.0.1", 8080, upper=100, lower=80),
        DestinationSpec("10.1.0.2", 8080, upper=100, lower=80),
    )


def test_a_port_range() -> None:
    """Endpoints that serve the first port serve all; others have one port for all."""
    ports = [port(30000, "rtp", "UDP"), port(8000, "http")]
    asked = {"svcdp.io/port-range": "rtp=30000-30100, http=8000-8009"}
    slice_ports = [port(30000, "rtp", "UDP"), port(80, "http")]
    found = resolve_all(
        [service(annotations=asked, ports=ports), endpoints("10.1.0.1", ports=slice_ports)],
        NodeContext(),
    )
    rtp, http = sorted(found.specs, key=lambda spec: spec.protocol, reverse=True)
    assert (rtp.port, rtp.last_port, rtp.destinations[0].port) == (30000, 30100, 0)
    assert (http.port, http.last_port, http.destinations[0].port) == (8000, 8009, 80)
    Dataplane(1000, seed=1).apply(found.specs)


def test_a_port_range_of_the_only_port_needs_no_name() -> None:
    asked = {"svcdp.io/port-range": "8080-8089"}
    found = resolve_all([service(annotations=asked, ports=[port(8080)])], NodeContext())
    assert found.specs[0].last_port == 8089


def test_node_ports_are_masqueraded_whatever_the_method() -> None:
    """Endpoints do not have the node's address."""
    ports = [port(8080, nodePort=30080)]
    asked = {"svcdp.io/forwarding": "dr", "svcdp.io/port-range": "8080-8090"}
    found = resolve_all(
        [service(annotations=asked, type="NodePort", ports=ports), endpoints("10.1.0.1")],
        NodeContext(addresses=ADDRESSES),
    )
    at_cluster_ip, at_node = found.specs
    assert (at_cluster_ip.last_port, at_node.last_port) == (8090, 0)
    assert [spec.destinations[0].method for spec in found.specs] == ["dr", "masq"]


def test_external_addresses_go_by_the_method() -> None:
    """Endpoints can have them, as they can have the cluster IP: nobody is masqueraded."""
    asked = {"svcdp.io/forwarding": "dr"}
    balanced = service(
        annotations=asked, type="LoadBalancer", ports=[port(8080)], externalIPs=["192.0.2.80"]
    )
    balanced["status"] = {"loadBalancer": {"ingress": [{"ip": "192.0.2.81"}]}}
    found = resolve_all([balanced, endpoints("10.1.0.1")], NodeContext(addresses=ADDRESSES))
    assert found.problems == []
    assert {spec.address: spec.destinations[0].method for spec in found.specs} == dict.fromkeys(
        ("10.96.0.10", "192.0.2.80", "192.0.2.81"), "dr"
    )
    dataplane = Dataplane(1000, seed=1)
    dataplane.apply(found.specs)
    for each in ("192.0.2.80", "192.0.2.81"):
        flow = f"tcp 198.51.100.4:40000 -> {each}:8080"
        [destination] = dataplane.explain(flow).destinations
        assert (destination.method, destination.masquerade) == ("dr", False)
        result = dataplane.process(wire.packet("tcp", "198.51.100.4", 40000, each, 8080, "S"))
        assert (result.verdict, result.next_hop) == (Verdict.FORWARD, "10.1.0.1")


def test_a_port_that_changes_is_told_once_for_all_addresses() -> None:
    found = resolve_all(
        [
            service(annotations={"svcdp.io/forwarding": "dr"}, externalIPs=["192.0.2.80"]),
            endpoints("10.1.0.1"),
        ],
        NodeContext(addresses=ADDRESSES),
    )
    assert [each.destinations[0].method for each in found.specs] == ["masq", "masq"]
    assert len(found.problems) == 1


MISTAKES = [
    # annotations, what is said
    case("scheduler", {"scheduler": "best"}, "'best' is not one of"),
    case("flag", {"scheduler-flags": "sh-port"}, "'sh-port': flags of scheduler rr are none"),
    case("flag of another", {"scheduler": "mh", "scheduler-flags": "sh-port"}, "mh-fallback"),
    case("type", {"tunnel-type": "vxlan"}, "'vxlan' is not one of gre, gue, ipip; 'ipip' stays"),
    case("port", {"tunnel-type": "gue", "tunnel-port": "0"}, "from 1 to 65535; 6080 stays"),
    case("checksum", {"tunnel-checksum": "yes"}, "'yes' is neither true nor false; False stays"),
    case("clamp", {"mss-clamp": ""}, "'' is neither true nor false; tunnels have it"),
    case("state", {"timeouts": "tcp=30"}, "'tcp' is not one of"),
    case("no timeout", {"timeouts": "udp"}, "'udp' is not of the form udp=30, established=7200"),
    case("timeout 0", {"timeouts": "udp=0"}, "'0' is not a number from 1"),
    case("two timeouts", {"timeouts": "udp=1,udp=2"}, "'udp' is given twice"),
    case("removal", {"on-endpoint-removal": "keep"}, "drain, drop, expire, reset; 'drain' stays"),
    case(
        "time", {"on-endpoint-removal": "drain=soon"}, "'drain=soon' is not of the form drain=30s"
    ),
    case("no time", {"on-endpoint-removal": "drain=0s"}, "'0' is not a number from 1"),
    case("expire", {"on-endpoint-removal": "expire=3s"}, "'expire=3s' is not of the form"),
    case("health", {"passive-health": "yes"}, "'yes' is not of the form failures=3, ejection=10"),
    case("failures", {"passive-health": "failures=0"}, "'0' is not a number from 1"),
    case(
        "ejection", {"passive-health": "ejection=301"}, "ejection is above max-ejection; it is off"
    ),
    case("helped", {"helper": "ftp", "passive-health": "true"}, "not with helper ftp; it is off"),
    case("one packet", {"one-packet": "1"}, "'1' is neither true nor false"),
    case("netmask", {"persistence-netmask": "ipv4=33"}, "'33' is not a number from 1 to 32"),
    case("family", {"persistence-netmask": "24"}, "'24' is not of the form ipv4=24, ipv6=64"),
    case("thresholds", {"thresholds": "upper=1,lower=2"}, "lower is above upper; there are none"),
    case("threshold", {"thresholds": "most=1"}, "'most' is not one of lower, upper"),
    case("range", {"port-range": "8080-8090"}, "'8080-8090' is not of the form rtp=30000-30100"),
    case("range's name", {"port-range": "web=8080-8090"}, "'web' is no port of this Service"),
    case("range's begin", {"port-range": "http=8000-8090"}, "no range that begins at port 8080"),
    case("range's end", {"port-range": "http=8080-80"}, "no range that begins at port 8080"),
    case("range of text", {"port-range": "http=8080-x"}, "'x' is not a number"),
    case("engine", {"persistence-engine": "http"}, "'http' is not one of sip; '' stays"),
    case("helper", {"helper": "irc"}, "'irc' is not one of ftp"),
]


@pytest.mark.parametrize(("annotations", "message"), MISTAKES)
def test_a_mistake_keeps_the_default(annotations: dict, message: str) -> None:
    found = served(annotations)
    [problem] = found.problems
    assert message in str(problem)
    *_, name = annotations
    assert f"Service shop/web: $.metadata.annotations['svcdp.io/{name}']" in str(problem)
    right = {key: value for key, value in annotations.items() if key != name}
    assert found.specs == served(right).specs


@pytest.mark.parametrize("method", ["dr", "tunnel"])
def test_a_port_cannot_change_on_the_way(method: str) -> None:
    asked = {"svcdp.io/forwarding": method}
    found = resolve_all(
        [service(annotations=asked), endpoints("10.1.0.1")], NodeContext(addresses=ADDRESSES)
    )
    assert found.specs[0].destinations == (DestinationSpec("10.1.0.1", 8080),)
    [problem] = found.problems
    reason = "leaves the port as it is, but endpoint 10.1.0.1 serves 8080, not 80"
    assert f"http: {method} {reason}; 'masq' stays in force" in str(problem)


def test_a_tunnel_needs_an_address_to_come_from() -> None:
    asked = {"svcdp.io/forwarding": "tunnel"}
    found = resolve_all(
        [service(annotations=asked, ports=[port(8080)]), endpoints("10.1.0.1")],
        NodeContext(addresses=["2001:db8::1"]),
    )
    assert found.specs[0].destinations[0].method == "masq"
    assert "this node has no IPv4 address for tunnels to come from" in str(found.problems[0])


def test_the_ftp_helper_needs_masq() -> None:
    found = served({"forwarding": "dr", "helper": "ftp"})
    assert {each.method for each in by_key(found)[HTTP].destinations} == {"masq"}
    assert {each.method for each in by_key(found)[DNS].destinations} == {"dr"}
    assert "helper ftp needs masq, not dr" in str(found.problems[0])

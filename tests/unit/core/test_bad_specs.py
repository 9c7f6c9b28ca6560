"""What a spec may not say: a ConfigError that names the service and the field; nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from bench import VIRTUAL, Bench

from svcdp import ConfigError, Dataplane, DestinationSpec, ServiceSpec, TunnelSpec, Verdict
from svcdp._core.engine import plain_members
from svcdp.records import check_destination

GOOD = ServiceSpec(VIRTUAL[4], 80, "tcp", (DestinationSpec("10.1.1.1", 8080),))
SERVER = DestinationSpec("10.1.1.1", 99)
TUNNEL = replace(SERVER, method="tunnel", tunnel=TunnelSpec(source="192.0.2.1"))

#: What the core finds the service of a Bench by.
RECORD = SimpleNamespace(address=bytes([10, 96, 0, 10]), port=80, protocol=6, words=1)

#: (fields of a service, what the error says).
SERVICES: list[tuple[dict[str, Any], str]] = [
    ({"last_port": -1}, "last_port"),
    ({"last_port": 98}, "last_port"),
    ({"last_port": 65536}, "last_port"),
    ({"last_port": "100"}, "last_port"),
    ({"port": 0, "last_port": 5}, "last_port"),
    ({"address": "0.0.0.0", "protocol": "fwmark", "last_port": 100}, "last_port"),
    ({"address": "0.0.0.0", "protocol": "fwmark", "port": 0}, "mark"),
    ({"address": "0.0.0.0", "protocol": "fwmark", "port": 1 << 32}, "mark"),
    ({"address": "10.0.0.1", "protocol": "fwmark"}, "fwmark"),
    ({"scheduler_flags": ("sh-port",)}, "flag"),
    ({"scheduler": "sh", "scheduler_flags": ("mh-port",)}, "flag"),
    ({"scheduler": "sh", "scheduler_flags": ("SH-PORT",)}, "flag"),
    ({"scheduler": "sh", "scheduler_flags": "sh-port"}, "scheduler_flags"),
    ({"scheduler": "sh", "scheduler_flags": (7,)}, "flag"),
    ({"scheduler": "sh", "scheduler_flags": ([],)}, "flag"),
    ({"scheduler": "mh", "mh_table_size": 250}, "mh_table_size"),
    ({"scheduler": "mh", "mh_table_size": 655374}, "mh_table_size"),
    ({"scheduler": "mh", "mh_table_size": 256}, "mh_table_size"),
    ({"scheduler": "mh", "mh_table_size": "251"}, "mh_table_size"),
    ({"persistence": 9, "persistence_netmask": 0}, "persistence_netmask"),
    ({"persistence": 9, "persistence_netmask": 33}, "persistence_netmask"),
    ({"address": "::1", "persistence_netmask": 129, "destinations": ()}, "persistence_netmask"),
    ({"persistence_netmask": "24"}, "persistence_netmask"),
    ({"persistence_engine": "sip"}, "persistence_engine"),
    ({"protocol": "udp", "persistence_engine": "sip"}, "persistence_engine"),
    ({"protocol": "udp", "persistence": 9, "persistence_engine": "h323"}, "persistence_engine"),
    ({"protocol": "udp", "persistence": 9, "persistence_engine": None}, "persistence_engine"),
    ({"protocol": "udp", "persistence": 9, "persistence_engine": []}, "persistence_engine"),
    ({"persistence_group": 5}, "persistence_group"),
    ({"one_packet": 1}, "one_packet"),
    ({"one_packet": True}, "one_packet"),
    ({"protocol": "sctp", "one_packet": True}, "one_packet"),
    ({"timeouts": {"udp": 5}}, "timeouts"),
    ({"timeouts": ("udp", 5)}, "timeouts"),
    ({"timeouts": (("udp",),)}, "timeouts"),
    ({"timeouts": ((["udp"], 5),)}, "timeouts"),
    ({"timeouts": (("udp", []),)}, "timeouts"),
    ({"timeouts": (("forever", 5),)}, "timeouts"),
    ({"on_removal": "keep"}, "on_removal"),
    ({"kept": {"10.1.1.1": 80}}, "kept"),
    ({"kept": ("10.1.1.1",)}, "kept"),
    ({"kept": (("10.1.1.1", 80, 1),)}, "kept"),
    ({"kept": (("10.1.1", 80),)}, "kept"),
    ({"kept": ((b"10.1.1.1", 80),)}, "kept"),
    ({"kept": (("10.1.1.1", -1),)}, "kept"),
    ({"kept": (("10.1.1.1", "80"),)}, "kept"),
    ({"on_removal": None}, "on_removal"),
    ({"on_removal": []}, "on_removal"),
    ({"mss_clamp": "yes"}, "mss_clamp"),
    ({"address": VIRTUAL[6], "destinations": (SERVER,)}, "other IP family"),
    ({"helper": "tftp"}, "helper"),
    ({"helper": []}, "helper"),
    ({"protocol": "udp", "helper": "ftp"}, "helper"),
    ({"name": 5}, "name"),
]

#: What ip_vs_ctl.c refuses as a server's.
NOBODYS = ["0.0.0.0", "224.0.0.1", "239.1.2.3", "255.255.255.255"]
NOBODYS6 = ["::", "ff02::1", "fe80::1", "febf::1"]

DESTINATIONS: list[tuple[DestinationSpec, str]] = [
    *((replace(SERVER, address=address), "unicast") for address in NOBODYS),
    (replace(SERVER, upper=-1), "upper"),
    (replace(SERVER, upper="5"), "upper"),  # type: ignore[arg-type]
    (replace(SERVER, upper=1 << 31), "upper"),
    (replace(SERVER, upper=5, lower=6), "lower"),
    (replace(SERVER, lower=-1), "lower"),
    (replace(SERVER, mtu=-1), "mtu"),
    (replace(SERVER, mtu=65536), "mtu"),
    (replace(SERVER, mtu=1.5), "mtu"),  # type: ignore[arg-type]
    (replace(SERVER, mark=-1), "mark"),
    (replace(SERVER, mark=1 << 32), "mark"),
    (replace(SERVER, method="nat"), "method"),
    (replace(SERVER, method=None), "method"),  # type: ignore[arg-type]
    (replace(SERVER, method=[]), "method"),  # type: ignore[arg-type]
    (replace(SERVER, method="dr", port=8080), "port"),
    (replace(SERVER, method="local", port=8080), "port"),
    (replace(TUNNEL, port=8080), "port"),
    (replace(SERVER, address="fd01::1", method="dr"), "family"),
    (replace(SERVER, method="tunnel"), "TunnelSpec"),
    (replace(SERVER, method="tunnel", tunnel="ipip"), "TunnelSpec"),  # type: ignore[arg-type]
    (replace(SERVER, tunnel=TunnelSpec(source="192.0.2.1")), "tunnel"),
    (replace(TUNNEL, tunnel=TunnelSpec()), "tunnel source"),
    (replace(TUNNEL, tunnel=TunnelSpec(source="::1")), "tunnel source"),
    (replace(TUNNEL, tunnel=TunnelSpec("vxlan", "192.0.2.1")), "tunnel type"),  # type: ignore[arg-type]
    (replace(TUNNEL, tunnel=TunnelSpec([], "192.0.2.1")), "tunnel type"),  # type: ignore[arg-type]
    (replace(TUNNEL, tunnel=TunnelSpec("gue", "192.0.2.1")), "port"),
    (replace(TUNNEL, tunnel=TunnelSpec("gue", "192.0.2.1", 65536)), "port"),
    (replace(TUNNEL, tunnel=TunnelSpec("gre", "192.0.2.1", 6080)), "port"),
    (replace(TUNNEL, tunnel=TunnelSpec("gre", "192.0.2.1", checksum=1)), "checksum"),  # type: ignore[arg-type]
]

CASES = [*SERVICES, *(({"destinations": (spec,)}, says) for spec, says in DESTINATIONS)]


@pytest.mark.parametrize(("fields", "says"), CASES, ids=str)
def test_a_bad_spec_changes_nothing(fields: dict[str, Any], says: str) -> None:
    bench = Bench()
    bench.dp.apply([GOOD])
    spec = ServiceSpec(**{"address": "10.96.0.99", "port": 99, "name": "web", **fields})
    is_named = fields.get("name") is None and fields.get("protocol") != "fwmark"
    for wanted in ([spec, replace(GOOD, scheduler="lc")], [replace(GOOD, scheduler="lc"), spec]):
        for change in (bench.dp.apply, bench.dp.update):
            with pytest.raises(ConfigError, match=says) as caught:
                change(wanted)
            assert not is_named or "web" in str(caught.value)
            assert [service.spec for service in bench.dp.services()] == [GOOD]

    def transact() -> None:
        with bench.dp.transaction() as tx:
            tx.service(VIRTUAL[4], 80, scheduler="lc")
            own = {k: v for k, v in fields.items() if k not in ("address", "port", "protocol")}
            tx.service(spec.address, spec.port, spec.protocol, **own)

    with pytest.raises(ConfigError, match=says):
        transact()
    assert [service.spec for service in bench.dp.services()] == [GOOD]
    assert bench.send().verdict.name == "FORWARD"


@pytest.mark.parametrize(("spec", "says"), DESTINATIONS, ids=str)
def test_a_bad_destination_in_a_transaction(spec: DestinationSpec, says: str) -> None:
    """The service that is staged goes on as if it had not been tried."""
    bench = Bench()
    with bench.dp.transaction() as tx:
        service = tx.service("10.96.0.99", 99)
        service.add(SERVER.address, 99)
        fields = {
            name: getattr(spec, name)
            for name in ("weight", "method", "upper", "lower", "tunnel", "mtu", "mark")
        }
        if (spec.address, spec.port) == (SERVER.address, SERVER.port):
            with pytest.raises(ConfigError, match=says):
                service.update(spec.address, spec.port, **fields)
        with pytest.raises(ConfigError, match=says):
            service.add(spec.address, spec.port, **fields)
    assert bench.dp.services()[0].spec.destinations == (SERVER,)


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 1, "last_port": 65535, "destinations": (replace(SERVER, port=0),)},
        {"last_port": 99},
        {"port": 0, "destinations": (replace(SERVER, port=0),)},
        {"destinations": (replace(SERVER, upper=5, lower=5),)},
        {"destinations": (replace(SERVER, mtu=65535, mark=(1 << 32) - 1),)},
        {"destinations": (replace(SERVER, method="dr", port=0),)},
        {"destinations": (replace(TUNNEL, address="::1", tunnel=TunnelSpec(source="::2")),)},
        {"destinations": (replace(TUNNEL, tunnel=TunnelSpec("gue", "192.0.2.1", 6080, True)),)},
        {"scheduler": "sh", "scheduler_flags": ("sh-port", "sh-fallback")},
        {"scheduler": "mh", "scheduler_flags": ("mh-fallback",), "mh_table_size": 251},
        {"protocol": "udp", "persistence": 9, "persistence_engine": "sip", "one_packet": True},
        {"address": "::", "protocol": "fwmark", "port": 1, "destinations": (), "helper": "ftp"},
    ],
    ids=str,
)
def test_the_edges_of_what_is_good(fields: dict[str, Any]) -> None:
    bench = Bench()
    spec = ServiceSpec(**{"address": "10.96.0.99", "port": 99, "destinations": (SERVER,), **fields})
    bench.dp.apply([spec])
    assert [service.spec for service in bench.dp.services()] == [spec]


@pytest.mark.parametrize("address", [*NOBODYS6, "::1", "fd00::1", "fec0::1", "2001:db8::1"])
def test_addresses_of_servers(address: str) -> None:
    bench = Bench()
    if address in NOBODYS6:
        with pytest.raises(ConfigError, match="link-local"):
            bench.serve((address, 80), address=VIRTUAL[6])
    else:
        bench.serve((address, 80), address=VIRTUAL[6])


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.7.7", "240.0.0.1", "223.255.255.255"])
@pytest.mark.parametrize("method", ["masq", "local"])
def test_unusual_addresses_of_servers(address: str, method: str) -> None:
    """This host's own, a node's cache of names, and what was reserved."""
    bench = Bench()
    bench.serve(DestinationSpec(address, 80, method=method))


#: Servers of which it takes a second look to know whether they are right.
NOT_PLAIN = [
    *(spec for spec, _ in DESTINATIONS),
    *(replace(SERVER, **{field: True}) for field in ("port", "weight")),  # type: ignore[arg-type]
    *(replace(SERVER, **{field: 1}) for field in ("upper", "mtu", "mark")),  # type: ignore[arg-type]
    *(replace(SERVER, **{field: 0.0}) for field in ("weight", "upper", "mark")),  # type: ignore[arg-type]
    *(replace(SERVER, port=port) for port in (-1, 0, 65536, 1 << 70)),
    *(replace(SERVER, weight=weight) for weight in (-1, 1 << 31, 1 << 70)),
    *(
        replace(SERVER, address=address)
        for address in ("", "10.1.1", "10.1.1.1\0", "10.1.1.1\0x", "\ud800", "10.1.1.\u0661", "::1")
    ),
    replace(SERVER, address=b"10.1.1.1"),  # type: ignore[arg-type]
    "10.1.1.1",
]


@pytest.mark.parametrize("odd", NOT_PLAIN, ids=repr)
def test_what_is_not_plain_is_looked_at(odd: Any) -> None:
    assert plain_members([SERVER, odd]) is None


def test_plain_servers_are_right_as_they_are() -> None:
    addresses = ("1.0.0.0", "10.1.1.1", "127.0.0.1", "223.255.255.255")
    specs = [
        replace(SERVER, address=address, port=port, weight=weight)
        for address in addresses
        for port, weight in ((1, 0), (80, 1), (65535, (1 << 31) - 1))
    ]
    found = plain_members(specs)
    assert found == {(spec.address, spec.port): spec for spec in specs}
    assert [check_destination(spec, GOOD) for spec in specs] == specs
    assert plain_members([*specs, specs[3]]) is None  # it is the caller's to say what is twice
    assert plain_members([]) == {}


ODD_CALLS: list[Callable[[Dataplane], object]] = [
    lambda dp: dp.new_destination("1" * 1000, 80),
    lambda dp: dp.new_destination("", 80),
    lambda dp: dp.new_destination("\ud800", 80),
    lambda dp: dp.connection_rows(7, 1, 100),  # type: ignore[arg-type]
    lambda dp: dp.state_rows(9, 1, 1000),  # type: ignore[arg-type]
    lambda dp: dp.inspect(6, b"", 1, b"", 1, 0, 0),
    lambda dp: dp.inspect(6, bytes(4), 1, bytes(16), 1, 0, 0),
    lambda dp: dp.service_key(b"", 80, 6, 0),
    lambda dp: dp.set_timeouts(0, [1]),
    lambda dp: dp.traffic(1 << 21),
    lambda dp: dp.import_template(RECORD, b"", 1, 0, False, False, 0),
    lambda dp: dp.import_template(RECORD, bytes(4), 1 << 21, 0, False, False, 0),
    lambda dp: dp.import_record(
        RECORD, 6, b"", 1, bytes(4), 1, bytes(4), 1, 1, 1, 1, 1, 0, None, 0
    ),
    lambda dp: dp.import_record(
        RECORD, 6, bytes(4), 1, bytes(4), 1, bytes(4), 1, 1 << 21, 1, 1, 1, 0, None, 0
    ),
    lambda dp: dp.import_record(
        RECORD, 6, bytes(4), 1, bytes(4), 1, bytes(4), 1, 1, 99, 1, 1, 0, None, 0
    ),
]


@pytest.mark.parametrize("call", ODD_CALLS)
def test_odd_calls_of_what_is_not_for_everybody(call: Callable[[Dataplane], object]) -> None:
    """A dataplane has the methods of its core, too."""
    bench = Bench()
    bench.serve(("10.1.1.1", 80), persistence=9)
    with pytest.raises((ValueError, IndexError)):
        call(bench.dp)
    assert bench.send().verdict == Verdict.FORWARD

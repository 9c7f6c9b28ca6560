"""What settings make of the DNS server."""

from __future__ import annotations

from pathlib import Path

import pytest

from svcdp.discovery.upstream import Upstream
from svcdp.errors import ConfigError
from svcdp.node.capture import capture_plan
from svcdp.node.config import NodeConfig, load
from svcdp.node.dns import host_upstreams
from svcdp.node.values import Server


def config(**flags: object) -> NodeConfig:
    return load(environ={}, flags=flags).config


def test_where_it_answers() -> None:
    cidrs = "10.96.0.0/12,fd00:96::/112,192.0.2.0/29"
    assert config(service_cidrs=cidrs).dns_servers == ()
    assert config(dns=True, service_cidrs=cidrs).dns_servers == ("10.96.0.10", "fd00:96::a")
    given = config(dns=True, dns_addresses="169.254.20.10", service_cidrs=cidrs)
    assert given.dns_servers == ("169.254.20.10",)
    assert capture_plan(given, ["192.0.2.1"]).hosted == (("169.254.20.10", 53),)
    with pytest.raises(ConfigError, match="dns needs addresses"):
        config(dns=True)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("192.0.2.1", ("192.0.2.1", 53)),
        ("192.0.2.1:5300", ("192.0.2.1", 5300)),
        ("2001:db8::1", ("2001:db8::1", 53)),
        ("[2001:db8::1]:5300", ("2001:db8::1", 5300)),
    ],
)
def test_servers(text: str, place: tuple[str, int]) -> None:
    assert Server(text).place == place


@pytest.mark.parametrize(
    "text", ["", "ns.example", "192.0.2.1:", "192.0.2.1:0", "[::1]", "1.2:3:4"]
)
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Server(text)


def test_the_resolvers_of_the_host(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(
        "# nameserver 192.0.2.9\nsearch example\nnameserver 10.96.0.10\n"
        "  nameserver\t192.0.2.1 \nnameserver fe80::1%eth0\nnameserverx 192.0.2.2\nnameserver"
    )
    found = host_upstreams(["10.96.0.10"], str(file))
    assert found == [Upstream("192.0.2.1"), Upstream("fe80::1%eth0")]
    assert host_upstreams([], str(tmp_path / "none")) == []


def test_what_is_no_resolver_of_the_host(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name would be looked up by itself, and hold all others up meanwhile."""
    file = tmp_path / "resolv.conf"
    file.write_text(
        "nameserver ns.example\nnameserver 999.1.1.1\nnameserver 2001:DB8::1 # one\n"
        "nameserver 192.0.2.1;two\nnameserver 0x01\nnameserver 192.0.2.2 192.0.2.3\n"
    )
    found = host_upstreams(["2001:db8:0::1"], str(file))
    assert found == [Upstream("192.0.2.1"), Upstream("192.0.2.2")]
    assert [record.__dict__["nameserver"] for record in caplog.records] == (
        ["ns.example", "999.1.1.1", "0x01"]
    )

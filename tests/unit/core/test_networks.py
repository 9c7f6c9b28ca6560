"""Services of networks: what nobody else serves there is turned away."""

from __future__ import annotations

import pytest
from bench import CLIENT, VIRTUAL, Bench

import svcdp
from svcdp import Reason, ServiceSpec, SourceRule, Verdict

WEB = ServiceSpec(VIRTUAL[4], 80, "tcp", (svcdp.DestinationSpec("10.1.0.1", 8080),))


def turned(address: str, on_empty: str = "reject", *sources: str) -> ServiceSpec:
    rule = SourceRule(sources=sources, on_empty=on_empty)  # type: ignore[arg-type]
    return ServiceSpec(address, 0, "any", rules=(rule,))


def verdict(bench: Bench, address: str, port: int = 81, protocol: str = "tcp") -> Verdict:
    """What becomes of a first packet; AssertionError unless explain() says the same."""
    client = CLIENT[6 if ":" in address else 4]
    result = bench.send(client=client, to=(address, port), protocol=protocol)
    ends = [f"[{a}]" if ":" in a else a for a in (client, address)]
    said = bench.dp.explain(f"{protocol} {ends[0]}:4 -> {ends[1]}:{port}").action
    assert said == Verdict(result.verdict).name.lower()
    return result.verdict


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_the_smallest_network_wins_and_a_service_before_it(bench: Bench, protocol: str) -> None:
    bench.dp.apply([
        WEB, turned("10.96.0.0/12", "drop"), turned(VIRTUAL[4]), turned("10.96.1.0/24"),
        turned("fd96::/112", "drop"), turned("fd96::10"), turned("0.0.0.0/1", "drop"),
    ])  # fmt: skip
    expected = {
        VIRTUAL[4]: Verdict.REJECT,
        "10.96.0.11": Verdict.DROP,
        "10.96.1.7": Verdict.REJECT,
        "10.111.255.255": Verdict.DROP,
        "10.112.0.0": Verdict.DROP,
        "192.0.2.9": Verdict.PASS,
        "fd96::10": Verdict.REJECT,
        "fd96::ffff": Verdict.DROP,
        "fd96::1:0": Verdict.PASS,
    }
    assert {each: verdict(bench, each, protocol=protocol) for each in expected} == expected
    assert bench.send().destination == ("10.1.0.1", 8080)
    assert bench.send("A").reason == Reason.ESTABLISHED


def test_reasons(bench: Bench) -> None:
    bench.dp.apply([turned("10.96.0.0/12", "drop", "192.0.2.0/24")])
    assert bench.send().reason == Reason.NO_DESTINATION
    assert bench.send(client="198.51.100.1").reason == Reason.SOURCE_RANGE
    assert "10.96.0.0/12 (any port)" in str(bench.dp.explain("tcp 192.0.2.4:1 -> 10.96.0.9:80"))
    assert bench.connections() == []


@pytest.mark.parametrize("bits", [0, 1, 20, 21, 22, 31, 32])
def test_every_prefix(bench: Bench, bits: int) -> None:
    """21 bits are no port of FTP's."""
    network = f"10.96.0.0/{bits}" if bits > 7 else f"0.0.0.0/{bits}"
    bench.dp.apply([turned(network, "drop")])
    assert verdict(bench, "10.96.0.0", 21) == verdict(bench, "10.96.0.0") == Verdict.DROP
    assert verdict(bench, "255.0.0.1") == (Verdict.PASS if bits else Verdict.DROP)


@pytest.mark.parametrize("bits", [0, 1, 31, 32, 33, 64, 127, 128])
def test_every_prefix_of_ipv6(bench: Bench, bits: int) -> None:
    bench.dp.apply([turned(f"::/{bits}", "drop")])
    assert verdict(bench, "::", 9) == Verdict.DROP
    inside = bits < 128
    assert verdict(bench, "::1", 9) == (Verdict.DROP if inside else Verdict.PASS)
    assert verdict(bench, "ffff::", 9) == (Verdict.PASS if bits else Verdict.DROP)


def test_they_come_and_go(bench: Bench) -> None:
    bench.dp.apply([turned("10.96.0.0/12", "drop"), turned("10.96.0.0/16")])
    assert verdict(bench, "10.96.0.1") == Verdict.REJECT
    bench.dp.update([turned("10.96.0.0/12")], [("10.96.0.0/16", 0, "any")])
    assert verdict(bench, "10.96.0.1") == Verdict.REJECT
    bench.dp.update([turned("10.96.0.0/12", "drop")])
    assert verdict(bench, "10.96.0.1") == Verdict.DROP
    bench.dp.apply([WEB])
    assert verdict(bench, "10.96.0.1") == Verdict.PASS
    assert [each.spec for each in bench.dp.services()] == [WEB]


def test_many_of_them(bench: Bench) -> None:
    """More than the first table has room for."""
    bench.dp.apply([turned(f"10.96.{i}.0/24", "drop") for i in range(200)])
    bench.dp.update([turned("10.96.0.0/16")])
    assert verdict(bench, "10.96.199.3") == Verdict.DROP
    assert verdict(bench, "10.96.200.3") == Verdict.REJECT


def test_keys_are_normalised(bench: Bench) -> None:
    bench.dp.apply([turned("10.96.0.7/32"), turned("FD96::/112")])
    assert {each.spec.key for each in bench.dp.services()} == {
        ("10.96.0.7", 0, "any"),
        ("fd96::/112", 0, "any"),
    }
    with pytest.raises(svcdp.ConflictError):
        bench.dp.apply([turned("10.96.0.7/32"), turned("10.96.0.7")])


def test_what_is_captured(bench: Bench) -> None:
    bench.dp.apply([turned("10.96.0.0/12"), turned(VIRTUAL[6])])
    assert bench.dp.captures().virtual == {("any", "10.96.0.0/12", 0), ("any", VIRTUAL[6], 0)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (turned("10.96.0.1/12"), "is no network"),
        (turned("x"), "is no network"),
        (turned("fe80::%eth0/64"), "is no network"),
        (ServiceSpec("10.96.0.0/12", 80, "any"), "port 80"),
        (ServiceSpec("10.96.0.0/12", 80, "tcp"), "is no IP address"),
        (ServiceSpec("10.96.0.0", 0, "any", WEB.destinations), "has no destinations"),
        (ServiceSpec("10.96.0.0", 0, "any", last_port=80), "last_port"),
    ],
)
def test_what_is_refused(bench: Bench, spec: ServiceSpec, message: str) -> None:
    with pytest.raises(svcdp.ConfigError, match=message):
        bench.dp.apply([spec])

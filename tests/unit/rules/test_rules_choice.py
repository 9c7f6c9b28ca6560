"""Which backend is chosen, and what is said where there is none."""

from __future__ import annotations

import pytest

from svcdp.errors import ConfigError, FeatureUnavailable, MissingCapability
from svcdp.rules import choose
from svcdp.rules import probe as probing
from svcdp.rules.probe import Feature, Probe

QUEUE = Feature("nft", "queue", available=False, detail="No such file or directory")
NO_QUEUE = (Feature("iptables", "command ipset", available=True), QUEUE)
NO_IPSET = (Feature("iptables", "command ipset", available=False, detail="not installed"),)


def found(monkeypatch: pytest.MonkeyPatch, *features: Feature, net_admin: bool = True) -> None:
    monkeypatch.setattr(probing, "probe", lambda: Probe(net_admin, features))


@pytest.mark.parametrize(
    ("name", "features", "chosen"),
    [
        ("auto", (), "iptables"),
        ("auto", NO_QUEUE, "iptables"),
        ("auto", NO_IPSET, "nft"),
        ("iptables", NO_QUEUE, "iptables"),
        ("nft", NO_IPSET, "nft"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, name: str, features: tuple[Feature, ...], chosen: str
) -> None:
    found(monkeypatch, *features)
    assert choose(name).name == chosen


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto", "iptables lacks command ipset; nft lacks queue$"),
        ("iptables", ": iptables lacks command ipset$"),
        ("nft", ": nft lacks queue$"),
    ],
)
def test_nothing_works(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    found(monkeypatch, *NO_IPSET, QUEUE)
    with pytest.raises(FeatureUnavailable, match=message):
        choose(name)


def test_no_right(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, net_admin=False)
    with pytest.raises(MissingCapability, match="CAP_NET_ADMIN"):
        choose()


def test_no_such_backend() -> None:
    with pytest.raises(ConfigError, match="none of auto, iptables, nft"):
        choose("ipvs")


def test_a_host_without_any_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = probing.probe()
    assert "command ipset" in result.missing("iptables")
    assert "command nft" in result.missing("nft")
    # Nothing more is tried without them.
    assert {feature.detail for feature in result.features} == {"not installed"}

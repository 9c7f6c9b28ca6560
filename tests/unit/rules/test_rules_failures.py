"""When a step fails: what is raised, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakehost import Host

from svcdp.errors import FeatureUnavailable, MissingCapability, RulesError
from svcdp.rules import CapturePlan
from svcdp.rules.iptables import IptablesBackend
from svcdp.rules.nft import NftBackend
from svcdp.rules.plan import Element, Hop

SAVED = '*raw\n:SVCDP-OUTPUT - [0:0]\n-A OUTPUT -m comment --comment "svcdp" -j SVCDP-OUTPUT\n'


@pytest.mark.parametrize("tool", ["ip6tables-restore", "iptables-restore"])
def test_a_failed_step_takes_back_those_before(host: Host, tool: str) -> None:
    host.install()
    for save in ("iptables-save", "ip6tables-save"):
        host.prints(save, SAVED)
    host.fails(tool, "line 7 failed")
    with pytest.raises(RulesError, match="line 7 failed") as caught:
        IptablesBackend(None, host.run_dir).apply(CapturePlan())
    assert caught.value.argv[0] == tool
    assert caught.value.stderr == "line 7 failed"
    assert "-D OUTPUT" in " ".join(host.log())
    assert host.values() == "0 0"
    assert not Path(host.run_dir).exists()


@pytest.mark.parametrize("tool", ["ipset", "iptables-restore", "ip6tables-restore"])
def test_what_is_in_force_stays_when_it_cannot_be_renewed(host: Host, tool: str) -> None:
    """As when somebody else holds the lock of iptables: those who are served go on to be."""
    host.install()
    backend = IptablesBackend(None, host.run_dir)
    plan = CapturePlan(items=frozenset({Element("virtual", "10.96.0.11", "tcp", 80)}))
    backend.apply(plan)
    in_force = host.values()
    assert in_force != "0 0"
    host.log()
    host.fails(tool, "another app is currently holding the xtables lock")
    with pytest.raises(RulesError, match="holding the xtables lock"):
        backend.apply(plan)
    assert "ipset list -name" not in host.log(), "whoever takes back looks for what to destroy"
    assert host.values() == in_force
    host.works(tool)
    backend.apply(plan)
    # Once taken back, a failure leaves nothing again.
    backend.remove()
    assert host.values() == "0 0"
    host.log()
    host.fails(tool, "line 7 failed")
    with pytest.raises(RulesError):
        backend.apply(plan)
    assert "ipset list -name" in host.log()
    assert host.values() == "0 0"


def test_a_failed_route_takes_back_the_rules(host: Host) -> None:
    host.install()
    plan = CapturePlan(service_cidrs=("10.96.0.0/12",), addresses=("192.0.2.1",))
    with pytest.raises(RulesError, match=r"no interface has the address 192\.0\.2\.1"):
        NftBackend(None, host.run_dir).apply(plan)
    log = host.log()
    assert log[log.index("table inet svcdp") + 1] == "delete table inet svcdp"
    assert host.values() == "0 0"


def test_a_route_needs_an_address_of_its_family(host: Host) -> None:
    host.install()
    plan = CapturePlan(service_cidrs=("fd00:10:96::/112",), addresses=("192.0.2.1",))
    with pytest.raises(RulesError, match="no address of this node is IPv6: set addresses"):
        NftBackend(None, host.run_dir).apply(plan)


def test_a_failed_update_is_taken_back(host: Host) -> None:
    host.install()
    host.fails("ipset", "no such set")
    added = [Element("virtual", "10.96.0.11", "tcp", 80)]
    removed = [Element("real", "10.1.1.11", "tcp", 8080)]
    with pytest.raises(RulesError, match="no such set"):
        IptablesBackend(None, host.run_dir).update(CapturePlan(), added, removed)
    assert host.log()[-2:] == [
        "del SVCDP-VIRTUAL4 10.96.0.11,6:80",
        "add SVCDP-REAL4 10.1.1.11,6:8080",
    ]


def test_no_right(host: Host) -> None:
    host.install()
    host.fails("nft", "Error: Operation not permitted")
    with pytest.raises(MissingCapability, match="CAP_NET_ADMIN"):
        NftBackend(None, host.run_dir).show()


def test_no_tool(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(host.bin))
    with pytest.raises(FeatureUnavailable, match="nft is not installed"):
        NftBackend(None, host.run_dir).show()


def test_what_others_flushed(host: Host) -> None:
    host.install()
    backend = NftBackend(None, host.run_dir)
    host.prints("nft", "table inet svcdp {")
    assert backend.fault() == ""
    host.fails("nft", "Error: No such file or directory")
    assert backend.fault() == "somebody else removed them"
    host.fails("nft", "Error: Operation not permitted")
    with pytest.raises(MissingCapability):
        backend.fault()


def test_connections_that_are_tracked_since(host: Host) -> None:
    host.install()
    host.prints("nft", "table inet svcdp {")
    backend = NftBackend(None, host.run_dir)
    backend.apply(CapturePlan())
    assert backend.fault() == ""
    host.tracked.write_text("0\n")  # it could, but nobody asked for it
    assert backend.fault() == ""
    host.tracked.write_text("7\n")
    assert backend.fault() == "connections are tracked now"
    backend.apply(CapturePlan())
    assert backend.fault() == ""


LINK = '[{"ifname": "e", "mtu": 1, "dst": "10.1.0.1", "dev": "e", "via": "x", "metrics": 1}]'


@pytest.mark.parametrize("printed", ["[{", '[{"dst": "10.1.0.1"}]', "[1]", LINK, "[" * 9999])
def test_a_tool_that_is_not_understood(host: Host, printed: str) -> None:
    host.install()
    host.prints("ip", printed)
    with pytest.raises(RulesError, match="does not understand"):
        NftBackend(None, host.run_dir).paths(["10.1.0.1"])
    plan = CapturePlan(service_cidrs=("10.96.0.0/12",), addresses=("192.0.2.1",))
    host.prints("ip", "[1, [")
    with pytest.raises(RulesError, match="does not understand"):
        NftBackend(None, host.run_dir).apply(plan)


def test_a_refused_next_hop_is_news_once(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.install()
    backend = NftBackend(None, host.run_dir)
    plan = CapturePlan(items=frozenset({Hop(1 << 22, "10.1.0.1")}))
    for stderr in ("no such device", "no such device", "", "no such device"):
        host.fails("ip", stderr) if stderr else host.works("ip")
        backend.refresh(plan)
    assert [record.message for record in caplog.records] == ["a next hop cannot be reached"] * 2

"""Services as ipvsadm's lines."""

from __future__ import annotations

from dataclasses import replace

import ipvsadm
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svcdp.dataplane import TIMEOUTS
from svcdp.ipvs.names import NumericNames
from svcdp.ipvs.restore import new_service, parse
from svcdp.ipvs.save import save, unsaved
from svcdp.types import DestinationSpec, ServiceSpec, SourceRule, TunnelSpec


def test_as_ipvsadm_saves() -> None:
    """Which sorts, and leaves thresholds out: of what it saved, the same comes back."""
    saved = ipvsadm.golden("saved.rules")
    assert "".join(f"{line}\n" for line in save(ipvsadm.specs("saved.rules"))) == saved


addresses = st.sampled_from(["192.0.2.1", "10.0.0.9", "203.0.113.255"])
addresses6 = st.sampled_from(["2001:db8::1", "fd00::99", "2001:db8:1:2:3:4:5:6"])
ports = st.integers(1, 65535)
numbers = st.integers(0, (1 << 31) - 1)
tunnels = st.one_of(
    st.just(TunnelSpec()),
    st.builds(TunnelSpec, st.just("gre"), checksum=st.booleans()),
    st.builds(TunnelSpec, st.just("gue"), port=ports, checksum=st.booleans()),
)
FLAGS = {"sh": ("sh-fallback", "sh-port"), "mh": ("mh-fallback", "mh-port")}


@st.composite
def destinations(draw: st.DrawFn, service: ServiceSpec) -> DestinationSpec:
    upper = draw(numbers)
    is_mark = service.protocol == "fwmark"
    own_port = 0 if is_mark else service.port
    tunnel = draw(st.none() | tunnels)
    is_dr = tunnel is None and draw(st.booleans())
    is_6 = ":" in service.address
    if tunnel is not None:
        is_6 = draw(st.booleans())
    return DestinationSpec(
        draw(addresses6 if is_6 else addresses),
        own_port if tunnel or is_dr else draw(ports),
        draw(numbers),
        "tunnel" if tunnel else "dr" if is_dr else "masq",
        upper,
        draw(st.integers(0, upper)),
        tunnel,
    )


@st.composite
def services(draw: st.DrawFn) -> ServiceSpec:
    protocol = draw(st.sampled_from(["tcp", "udp", "sctp", "fwmark"]))
    is_6 = draw(st.booleans())
    if protocol == "fwmark":
        key = ("::" if is_6 else "0.0.0.0", draw(st.integers(1, (1 << 32) - 1)), protocol)
    else:
        key = (draw(addresses6 if is_6 else addresses), draw(st.just(0) | ports), protocol)
    scheduler = draw(st.sampled_from(["rr", "wlc", "sh", "mh", "lblcr"]))
    persistence = draw(st.integers(1, 2678400) | (st.none() if key[1] else st.nothing()))
    netmask = draw(st.none() | st.integers(1, 127 if is_6 else 31)) if persistence else None
    spec = replace(
        new_service(key),
        scheduler=scheduler,
        scheduler_flags=tuple(f for f in FLAGS.get(scheduler, ()) if draw(st.booleans())),
        persistence=persistence,
        persistence_netmask=netmask,
        persistence_engine="sip"
        if protocol == "udp" and persistence and draw(st.booleans())
        else "",
        one_packet=protocol in ("udp", "fwmark") and draw(st.booleans()),
    )
    servers = draw(
        st.lists(destinations(spec), max_size=4, unique_by=lambda each: (each.address, each.port))
    )
    return replace(
        spec, destinations=tuple(servers), mss_clamp=any(each.tunnel for each in servers)
    )


@given(st.lists(services(), max_size=4, unique_by=lambda spec: spec.key))
def test_what_is_saved_can_be_restored(specs: list[ServiceSpec]) -> None:
    text = "\n".join(save(specs))
    assert ipvsadm.parse_text(text) == specs
    assert [*save(ipvsadm.parse_text(text))] == text.splitlines()
    assert [*unsaved(specs)] == []


def test_timeouts_of_all_services() -> None:
    text = "--set 100 0 30\n-A -t 192.0.2.10:80 -s rr"
    specs, timeouts, _ = parse(text, NumericNames())
    assert "\n".join(save(specs, {**TIMEOUTS, **timeouts})) == text
    assert [*save([], {**TIMEOUTS, "udp": 0.4, "close": 7})] == ["--set 0 0 1"]


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"rules": (SourceRule(),)}, "rules"),
        ({"masquerade_address": "192.0.2.1"}, "masquerade_address"),
        ({"last_port": 90, "helper": "ftp"}, "last_port, helper"),
        ({"on_removal": "drop"}, "on_removal"),
        ({"mss_clamp": True}, "mss_clamp"),
        ({"scheduler": "mh", "mh_table_size": 65537}, "mh_table_size"),
        ({"timeouts": (("close", 5),)}, "timeouts"),
        ({"port": 0}, "all ports without persistence"),
    ],
)
def test_what_is_lost_is_said(fields: dict[str, object], lost: str) -> None:
    spec = replace(new_service(("192.0.2.10", 80, "tcp")), **fields)  # type: ignore[arg-type]
    assert [*unsaved([spec])] == [f"{spec}: {lost}"]


def test_what_nobody_misses() -> None:
    """Names, tables of other schedulers, and what is found out anew."""
    server = DestinationSpec("10.0.0.1", 80, method="local", mtu=1400, mark=7)
    spec = replace(
        new_service(("192.0.2.10", 80, "tcp")),
        name="default/web",
        mh_table_size=65537,
        destinations=(server,),
    )
    assert [*unsaved([spec])] == []
    assert [*save([spec])][1] == "-a -t 192.0.2.10:80 -r 10.0.0.1:80 -g -w 1"

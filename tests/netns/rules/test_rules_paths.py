"""What is read of the kernel's routes."""

from __future__ import annotations

from functools import partial

import pytest

from svcdp.lab import Lab, Namespace
from svcdp.rules.paths import Path, find_paths

pytestmark = pytest.mark.netns


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """It has a narrow link, and routes by gateways on it."""
    host, other = lab.namespace("host"), lab.namespace("other")
    lab.link(host, other)
    host.add_address("other", "192.0.2.1/24", "2001:db8::1/64")
    host.ip(
        "link set other mtu 1400",
        "route add 198.51.100.0/24 via 192.0.2.9",
        "route add 203.0.113.0/24 via 192.0.2.9 mtu 1300",
        "route add 10.1.0.0/16 via inet6 2001:db8::9 dev other",
        "route add 2001:db8:1::/64 via 2001:db8::9",
        "route add unreachable 10.2.0.0/16",
    )
    return host


PATHS = {
    "192.0.2.7": Path("other", "", "192.0.2.1", 1400),
    "198.51.100.7": Path("other", "192.0.2.9", "192.0.2.1", 1400),
    "203.0.113.7": Path("other", "192.0.2.9", "192.0.2.1", 1300),
    "10.1.0.7": Path("other", "2001:db8::9", "192.0.2.1", 1400),
    "2001:db8::7": Path("other", "", "2001:db8::1", 1400),
    "2001:db8:1::7": Path("other", "2001:db8::9", "2001:db8::1", 1400),
    "192.0.2.1": Path("lo", "", "192.0.2.1", 65536, is_local=True),
    "2001:db8::1": Path("lo", "", "2001:db8::1", 65536, is_local=True),
}


def test_paths(host: Namespace) -> None:
    """What has no route is missing, and does not keep the others."""
    lost = ["10.2.0.7", "10.3.0.7", "2001:db8:2::7"]
    assert host.call(partial(find_paths, [*lost, *PATHS])) == PATHS


def test_nothing_is_asked_for_nothing(host: Namespace) -> None:
    assert host.call(partial(find_paths, [])) == {}

"""Who holds a key that several Services want."""

from __future__ import annotations

import pytest

from svcdp import ServiceSpec
from svcdp.kube.claims import Claim, Claims
from svcdp.kube.model import ServiceRef

WEB = ServiceSpec("192.0.2.9", 80, "tcp")


def claim(name: str, created: str, spec: ServiceSpec = WEB) -> Claim:
    return Claim.of(ServiceRef("default", name), created, spec, node_port=False)


@pytest.fixture
def claims() -> Claims:
    claims = Claims()
    for each in (claim("new", "2026-02-01T00:00:00Z"), claim("old", "2026-01-01T00:00:00Z")):
        claims.replace(each.owner, [each])
    return claims


def test_the_older_one_goes_first(claims: Claims) -> None:
    [(owner, error)] = claims.contests()
    assert owner.name == "new"
    assert str(error).startswith("tcp 192.0.2.9:80 is held by Service")


@pytest.mark.parametrize("gone", [("old",), ("new",), ("old", "new")])
def test_who_is_alone_contends_with_nobody(claims: Claims, gone: tuple[str, ...]) -> None:
    for name in gone:
        claims.replace(ServiceRef("default", name), ())
    assert claims.conflicts() == []
    assert len(claims) == 2 - len(gone)


def test_nobody_is_told_of_networks(claims: Claims) -> None:
    """All protocols of an address are turned away for whomever it is."""
    network = ServiceSpec("192.0.2.9", 0, "any")
    for name, created in (("new", "2026-02-01"), ("old", "2026-01-01")):
        claims.replace(ServiceRef("default", name), [claim(name, created, network)])
    assert claims.conflicts() == []

"""Addresses of a cluster's Services: whatever it is like, nobody gets what another one has."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from svcdp.kube.assign import (
    MANAGER,
    ObservedService,
    decide,
    decode_pool,
    decode_service,
)
from svcdp.kube.model import LoadBalancerPool
from svcdp.kube.pools import ADDRESSES_ANNOTATION, CLEANUP_FINALIZER, POOL_CLASS, SHARING_ANNOTATION

CLOUD = "example.com/cloud"
ADDRESSES = ("192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2")
ROUNDS = 5


@dataclass(frozen=True)
class Given:
    """A Service, and whose address it has."""

    name: str
    type: str
    class_: str | None
    port: int
    sharing: str
    asks: str
    dual: bool
    addresses: tuple[str, ...]
    writer: str
    is_clouds: bool
    is_deleted: bool

    def observed(self) -> ObservedService:
        annotations = {SHARING_ANNOTATION: self.sharing, ADDRESSES_ANNOTATION: self.asks}
        status = {"f:status": {"f:loadBalancer": {"f:ingress": {}}}}
        families = ["IPv4", "IPv6"] if self.dual else ["IPv4"]
        value: dict[str, Any] = {
            "metadata": {
                "name": self.name,
                "annotations": {key: text for key, text in annotations.items() if text},
                "finalizers": [CLEANUP_FINALIZER] * self.is_clouds,
                "deletionTimestamp": "2026-01-01T00:00:00Z" if self.is_deleted else None,
                "managedFields": [{"manager": self.writer, "fieldsV1": status}],
            },
            "spec": {
                "type": self.type,
                "loadBalancerClass": self.class_,
                "ipFamilies": families,
                "ports": [{"port": self.port}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": text} for text in self.addresses]}},
        }
        return decode_service(json.dumps(value).encode())

    def may_share(self, other: Given) -> bool:
        return bool(self.sharing) and self.sharing == other.sharing and self.port != other.port


SERVICES = st.lists(
    st.builds(
        Given,
        name=st.sampled_from("abcdefgh"),
        type=st.sampled_from(("LoadBalancer", "LoadBalancer", "LoadBalancer", "ClusterIP")),
        class_=st.sampled_from((None, None, POOL_CLASS, CLOUD)),
        port=st.integers(80, 82),
        sharing=st.sampled_from(("", "", "x", "y")),
        asks=st.sampled_from(("", "", *ADDRESSES, "198.51.100.1")),
        dual=st.booleans(),
        addresses=st.lists(st.sampled_from(ADDRESSES), max_size=2, unique=True).map(tuple),
        writer=st.sampled_from((MANAGER, MANAGER, "cloud")),
        is_clouds=st.sampled_from((False, False, False, True)),
        is_deleted=st.sampled_from((False, False, False, True)),
    ),
    max_size=8,
    unique_by=lambda each: each.name,
)
SPANS = ("192.0.2.1-192.0.2.2", "192.0.2.3/32", "2001:db8::1-2001:db8::2")
POOLS = st.lists(st.sampled_from(SPANS), max_size=3, unique=True)


def pools(spans: list[str]) -> list[LoadBalancerPool]:
    found = []
    for number, text in enumerate(spans):
        value = {"metadata": {"name": f"p{number}"}, "spec": {"addresses": [text]}}
        pool = decode_pool(json.dumps(value).encode()).pool
        assert pool is not None
        found.append(pool)
    return found


@given(SERVICES, POOLS, st.booleans(), st.booleans())
def test_nobody_gets_what_another_one_has(
    services: list[Given], spans: list[str], class_only: bool, is_partial: bool
) -> None:
    before = {each.name: each for each in services}
    state = dict(before)
    known = pools(spans)
    for _ in range(ROUNDS):
        observed = [each.observed() for each in state.values()]
        decision = decide(observed, known, class_only=class_only, is_partial=is_partial)
        written = {each.service.metadata.name: each.after for each in decision.assignments}
        if not written:
            break
        after = {
            name: replace(each, addresses=written[name], writer=MANAGER)
            if name in written
            else each
            for name, each in state.items()
        }
        for name in written:
            gained = set(after[name].addresses) - set(state[name].addresses)
            for other in state.values():
                # In whatever order they are written.
                theirs = {*other.addresses, *after[other.name].addresses}
                if other.name != name and other.type == "LoadBalancer" and gained & theirs:
                    assert other.may_share(after[name])
        state = after
    assert not written, "it comes to no end"
    for name, each in before.items():
        is_own = each.writer == MANAGER and bool(each.addresses)
        is_served = each.type == "LoadBalancer" and each.class_ != CLOUD
        is_served = is_served and (each.class_ == POOL_CLASS or not class_only)
        if (is_served and each.is_deleted) or not (is_served or is_own):
            assert state[name] == each
        if each.is_clouds and not (is_served and each.class_ == POOL_CLASS):
            assert state[name] == each

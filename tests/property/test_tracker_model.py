"""The incremental tracker says what ``resolve`` and a plain model say from scratch.

The universe is small, so that objects, addresses and node ports clash all the time.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from svcdp.kube import Change, NodeContext, resolve, resolve_all
from svcdp.kube.decode import decode_value
from svcdp.kube.tracker import Tracker

NODE = NodeContext(name="n1", addresses=["10.96.0.1", "fd00::1"], pod_cidrs=["10.1.0.0/16"])
NAMES = st.sampled_from(["a", "b", "c"])
ORIGINS = st.sampled_from([(0, "first", "x"), (0, "first", "y"), (1, "second", "")])
HIDDEN = st.sampled_from([{}, {}, {}, {"service.kubernetes.io/headless": ""}])


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    cluster_ip = draw(st.sampled_from(["10.96.0.1", "10.96.0.2", "fd00::1", "None"]))
    metadata = {
        "name": draw(NAMES),
        "labels": draw(HIDDEN),
        "creationTimestamp": draw(st.sampled_from([None, "2024-01-01", "2025-01-01"])),
    }
    port = {
        "port": draw(st.sampled_from([80, 81])),
        "name": "http",
        "nodePort": draw(st.sampled_from([0, 80, 81])),
    }
    spec = {"clusterIP": cluster_ip, "ports": [port]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


@st.composite
def slices(draw: st.DrawFn) -> dict[str, Any]:
    flag = st.sampled_from([None, True, False])
    endpoint = st.fixed_dictionaries(
        {
            "addresses": st.sampled_from([["10.1.0.1"], ["10.1.0.2"], ["10.1.0.3"], ["fd01::1"]]),
            "conditions": st.fixed_dictionaries(
                {"ready": flag, "serving": flag, "terminating": flag}
            ),
            "nodeName": st.sampled_from([None, "n1", "n2"]),
        }
    )
    labels = {"kubernetes.io/service-name": draw(NAMES), **draw(HIDDEN)}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": draw(NAMES), "labels": labels},
        "addressType": draw(st.sampled_from(["IPv4", "IPv6"])),
        "endpoints": draw(st.lists(endpoint, max_size=3)),
        "ports": [{"name": "http", "port": draw(st.sampled_from([8080, 9090]))}],
    }


class Incremental(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker(NODE)
        self.sent: dict[tuple[str, int, str], Any] = {}
        self.held: dict[tuple[int, str, str], dict[tuple[str, str], dict[str, Any]]] = {}

    def change(self, origin: tuple[int, str, str], change: Change) -> None:
        for key in self.tracker.apply([(origin[0], origin[1], change)]):
            spec = self.tracker.spec(key)
            if spec is None:
                self.sent.pop(key, None)
            else:
                self.sent[key] = spec

    @rule(origin=ORIGINS, found=services() | slices())
    def put(self, origin: tuple[int, str, str], found: dict[str, Any]) -> None:
        self.held.setdefault(origin, {})[found["kind"], found["metadata"]["name"]] = found
        self.change(origin, Change(origin[2], tuple(decode_value(found))))

    @rule(origin=ORIGINS, data=st.data())
    def delete(self, origin: tuple[int, str, str], data: st.DataObject) -> None:
        held = self.held.get(origin)
        if held:
            found = held.pop(data.draw(st.sampled_from(sorted(held))))
            [record] = decode_value(found)
            self.change(origin, Change(origin[2], deleted=(record.key,)))

    @rule(origin=ORIGINS, found=st.lists(services() | slices(), max_size=3))
    def replace(self, origin: tuple[int, str, str], found: list[dict[str, Any]]) -> None:
        held = {(each["kind"], each["metadata"]["name"]): each for each in found}
        self.held[origin] = held
        records = tuple(record for each in held.values() for record in decode_value(each))
        self.change(origin, Change(origin[2], records, replace=True))

    def objects(self) -> list[dict[str, Any]]:
        """Of each object the one that counts."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for origin in sorted(self.held, reverse=True):
            found.update(self.held[origin])
        return list(found.values())

    @invariant()
    def same_as_from_scratch(self) -> None:
        scratch = resolve(self.objects(), NODE)
        assert self.sent == {spec.key: spec for spec in scratch}
        assert len(self.tracker.claims) == len(self.sent)

    @invariant()
    def same_as_the_model(self) -> None:
        """Owners and endpoints, worked out the long way."""
        objects = self.objects()
        claims: dict[tuple[str, int], list[tuple[bool, str, str]]] = {}
        for found in objects:
            metadata, spec = found["metadata"], found.get("spec")
            if spec is None or metadata["labels"] or spec["clusterIP"] == "None":
                continue
            [port] = spec["ports"]
            created = metadata["creationTimestamp"] or "9999"
            cluster_ip = spec["clusterIP"]
            at_node = "fd00::1" if ":" in cluster_ip else "10.96.0.1"
            claims.setdefault((cluster_ip, port["port"]), []).append(
                (False, created, metadata["name"])
            )
            if port["nodePort"]:
                claims.setdefault((at_node, port["nodePort"]), []).append(
                    (True, created, metadata["name"])
                )
        owners = {key: min(candidates)[2] for key, candidates in claims.items()}
        assert owners == {
            key[:2]: spec.name.split("/")[1].split(":")[0] for key, spec in self.sent.items()
        }
        lost = sum(len(candidates) - 1 for candidates in claims.values())
        assert len(resolve_all(objects, NODE).problems) == lost
        for (address, _), name in owners.items():
            [spec] = [spec for key, spec in self.sent.items() if key[0] == address][:1]
            if spec.name == f"default/{name}:http":
                assert {(each.address, each.port) for each in spec.destinations} == usable(
                    objects, name, "IPv6" if ":" in address else "IPv4"
                )


def usable(objects: list[dict[str, Any]], name: str, family: str) -> set[tuple[str, int]]:
    copies: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for found in sorted(objects, key=lambda each: each["metadata"]["name"]):
        labels = found["metadata"]["labels"]
        if labels != {"kubernetes.io/service-name": name} or found["addressType"] != family:
            continue
        for endpoint in found["endpoints"]:
            [address] = endpoint["addresses"]
            if (":" in address) == (family == "IPv6"):
                key = (address, found["ports"][0]["port"])
                copies.setdefault(key, []).append(endpoint)
    chosen = {
        key: next((each for each in all_ if each["nodeName"] == "n1"), all_[0])["conditions"]
        for key, all_ in copies.items()
    }
    ready = {key for key, one in chosen.items() if one["ready"] is not False}
    return ready or {
        key
        for key, one in chosen.items()
        if one["serving"] is not False and one["terminating"] is True
    }


TestIncremental = Incremental.TestCase
TestIncremental.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

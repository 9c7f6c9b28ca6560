"""Environment variables of Services beside those that kubelet's own code makes."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from typing import Any

from controlplane import PROGRAM

from svcdp.discovery.env import environment
from svcdp.kube.decode import decode_value

LISTS = 500
SEED = 11
UNNAMED = [{"port": 443, "protocol": "TCP"}]
PORTS = [
    {"name": "http", "port": 80, "protocol": "TCP"},
    {"name": "http-2", "port": 8080, "protocol": "TCP"},
    {"name": "a-b-c", "port": 65535, "protocol": "SCTP"},
    {"name": "dns", "port": 53, "protocol": "UDP"},
    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    {"name": "4x3", "port": 1, "protocol": "UDP"},
]
#: What API servers let through, and what those who write manifests may say.
ADDRESSES = ["10.96.0.1", "10.96.255.255", "fd00:10:96::a", "::1", "None", ""]
TYPES = ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]


def some_services(chance: random.Random) -> list[dict[str, Any]]:
    """Of one namespace, in no order."""
    names = ["web", "web-1", "a-b-c-d", "x", "web1", "kubernetes", "z-9"]
    return [some_service(chance, name) for name in chance.sample(names, chance.randint(0, 5))]


def some_service(chance: random.Random, name: str) -> dict[str, Any]:
    cluster_ips = chance.sample(ADDRESSES, 2)
    spec: dict[str, Any] = {
        "type": chance.choice(TYPES),
        "clusterIP": cluster_ips[0],
        "ports": chance.sample(PORTS, chance.randint(0, len(PORTS))) or UNNAMED,
    }
    if spec["type"] == "ExternalName":
        spec |= {"externalName": "remote.example", "clusterIP": ""}
    elif not {"None", ""} & set(cluster_ips) and chance.random() < 0.5:
        spec["clusterIPs"] = cluster_ips
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def by_kubelet(lists: Sequence[Sequence[dict[str, Any]]]) -> list[list[tuple[str, str]]]:
    """What ``envvars.FromServices()`` says of each list."""
    done = subprocess.run(
        [str(PROGRAM), "envvars"],
        input="\n".join(map(json.dumps, lists)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    answers = [json.loads(line) or [] for line in done.stdout.splitlines()]
    return [[(each["name"], each.get("value", "")) for each in answer] for answer in answers]


def test_variables_of_many_services() -> None:
    chance = random.Random(SEED)
    lists = [some_services(chance) for _ in range(LISTS)]
    ordered = [sorted(services, key=lambda each: each["metadata"]["name"]) for services in lists]
    expected = by_kubelet(ordered)
    assert len(expected) == LISTS
    assert sum(map(len, expected)) > LISTS
    for services, variables in zip(lists, expected, strict=True):
        objects = [found for each in services for found in decode_value(each)]
        # As a process has it: of two of one name the last counts.
        told = environment(objects, "shop")  # type: ignore[arg-type]
        assert list(told.items()) == list(dict(variables).items()), services

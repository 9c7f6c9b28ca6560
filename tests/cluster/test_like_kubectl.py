"""Tables and descriptions beside kubectl's, of the same objects."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from controlplane import ControlPlane

from svcdp import Dataplane
from svcdp.cli import describe
from svcdp.cli.kinds import KINDS
from svcdp.cli.printers import Item, shown
from svcdp.kube import ManifestSource, NodeContext
from svcdp.node import views
from svcdp.sync import Sync

PATHS = ("/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices")
#: Of ours only.
OWN = ("ENDPOINTS", "SCHEDULER")
OURS = ("Scheduler", "Problems")


def service(name: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"b": "2", "a": "1"}, "annotations": {"n.io/x": "y z"}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


PORTS = [{"name": "http", "port": 80, "targetPort": "web"}]
ANNOTATIONS = {
    "hostile": "\x1b]0;a\rb\x1b[2J",
    "lines": "one\n two\n",
    "long": "x" * 134,
    "longer": "x" * 134,
    "longest": "x" * 139 + "\n" + "y" * 138,
}
SERVICES = [
    service("plain", clusterIP="10.96.0.81", ports=PORTS, selector={"app": "web", "a": "b"}),
    service("external-ips", ports=PORTS, externalIPs=["192.0.2.9", "192.0.2.8"]),
    service(
        "node-port", type="NodePort", ports=[*PORTS, {"name": "x", "port": 9, "protocol": "UDP"}]
    ),
    service("pending", type="LoadBalancer", ports=PORTS, loadBalancerSourceRanges=["192.0.2.0/24"]),
    service("balanced", type="LoadBalancer", ports=PORTS, externalTrafficPolicy="Local"),
    service("named", type="LoadBalancer", ports=PORTS),
    service("asking", type="LoadBalancer", ports=PORTS, loadBalancerIP="192.0.2.8"),
    service("several", type="LoadBalancer", ports=PORTS, externalIPs=["192.0.2.5"]),
    service("near", ports=[{**PORTS[0], "appProtocol": "h2c"}], trafficDistribution="PreferClose"),
    {**service("told", ports=PORTS), "metadata": {"name": "told", "annotations": ANNOTATIONS}},
    service("headless", clusterIP="None", ports=PORTS),
    service("elsewhere", type="ExternalName", externalName="remote.example"),
    service("sticky", ports=[{"port": 7}], sessionAffinity="ClientIP"),
]
SLICE = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "plain-1", "labels": {"kubernetes.io/service-name": "plain"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    "endpoints": [{"addresses": [f"10.1.0.{number}"]} for number in range(1, 6)],
}


def known(plane: ControlPlane, folder: Path) -> tuple[list[Item], dict[str, Item]]:
    """What a daemon that follows this server would list, and say of each Service."""
    for number, path in enumerate(PATHS):
        (folder / f"{number}.json").write_text(json.dumps(plane.get(path)))

    async def ask() -> tuple[list[Item], dict[str, Item]]:
        dataplane = Dataplane(64)
        async with Sync(dataplane, NodeContext(name="n1")) as sync:
            sync.follow(ManifestSource(folder))
            await sync.ready()
            listed = list(views.services(sync, {"namespace": "default"}))
            described = {}
            for item in listed:
                request = {"namespace": "default", "name": item["name"]}
                (described[item["name"]],) = views.description(sync, dataplane.services(), request)
            return listed, described

    return asyncio.run(ask())


def test_as_kubectl_prints_them(plane: ControlPlane, tmp_path: Path) -> None:
    plane.apply(*SERVICES, SLICE)
    for name, ingress in {
        "balanced": [{"ip": "192.0.2.7", "ipMode": "VIP"}],
        "named": [{"hostname": "lb.example"}],  # as clouds have it whose addresses change
        "several": [{"ip": "192.0.2.4", "ipMode": "VIP"}, {"ip": "192.0.2.3", "ipMode": "VIP"}],
    }.items():
        status = json.dumps({"status": {"loadBalancer": {"ingress": ingress}}})
        plane.kubectl("patch", "service", name, "--subresource=status", "-p", status)
    listed, described = known(plane, tmp_path)

    for form in ([], ["-o", "wide"]):
        columns = [
            each
            for each in KINDS[0].shown(namespaces=False, wide=bool(form))
            if each.header not in (*OWN, "AGE")
        ]
        ours = [[str(each.cell(item)) for each in columns] for item in listed]
        lines = plane.kubectl("get", "services", *form).splitlines()
        theirs = [[*cells[:5], *cells[6:]] for cells in (line.split() for line in lines)]
        assert theirs[0] == [each.header for each in columns]
        assert ours == theirs[1:]

    for name in described:
        said = plane.kubectl("describe", "service", name, "--show-events=false").splitlines()
        wanted = [_words(line) for line in said if line]
        item = described[name]
        found = [
            _words(f"{label}: {shown(value)}" if label else shown(value))
            for label, value in describe._lines(item)
        ]
        assert [line for line in found if line.partition(":")[0] not in OURS] == wanted, name


def _words(line: str) -> str:
    return " ".join(line.split())

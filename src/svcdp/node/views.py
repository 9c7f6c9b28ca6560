"""What the admin socket tells: the daemon's objects as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from svcdp.discovery import env
from svcdp.errors import ConfigError, ManifestError
from svcdp.kube.apiserver import list_pools
from svcdp.kube.pools import usages

if TYPE_CHECKING:
    from svcdp.dataplane import Dataplane
    from svcdp.io.nfqueue import QueueWorkers
    from svcdp.kube.client import Client
    from svcdp.kube.model import LoadBalancerIngress, Service
    from svcdp.status import ServiceStatus as VirtualServiceStatus
    from svcdp.sync import ServiceStatus, Sync

__all__ = [
    "Item",
    "Request",
    "connections",
    "description",
    "endpoints",
    "environment",
    "explanation",
    "pods",
    "pools",
    "queues",
    "services",
    "status",
    "virtual_services",
]

Request = Mapping[str, Any]
Item = dict[str, Any]


def services(sync: Sync, request: Request) -> Iterator[Item]:
    """Services as Kubernetes has them, of one namespace or of all."""
    for service in sync.declared(request.get("namespace")):
        for status in sync.services(*service.ref):  # it may be gone by now
            yield _service(status)


def _service(status: ServiceStatus) -> Item:
    service = status.service
    spec = service.spec
    return {
        "namespace": service.ref.namespace,
        "name": service.ref.name,
        "type": spec.type or "ClusterIP",
        "clusterIPs": list(spec.cluster_ips or filter(None, [spec.cluster_ip])),
        "externalIPs": list(spec.external_ips or ()),
        "loadBalancerIPs": [each.ip for each in _ingress(service) if each.ip],
        "loadBalancerHostnames": [
            each.hostname for each in _ingress(service) if each.hostname and not each.ip
        ],
        "externalName": spec.external_name or "",
        "selector": spec.selector or {},
        "ports": [
            {
                "name": port.name or "",
                "port": port.port,
                "lastPort": None,
                "nodePort": port.node_port or None,
                "protocol": port.protocol or "TCP",
            }
            for port in spec.ports or ()
        ],
        "creationTimestamp": service.metadata.creation_timestamp,
        "schedulers": sorted({held.scheduler for held in status.specs}),
        "endpoints": status.endpoints,
        "endpointsReady": status.endpoints_ready,
    }


def description(
    sync: Sync,
    held: Iterable[VirtualServiceStatus],
    request: Request,
    owner: Callable[[str], str | None] = lambda address: None,
) -> Iterator[Item]:
    """All that is known of the Service of a ``namespace`` and ``name``; nothing if it is none.
    ``held`` are the virtual services of the dataplane; ``owner`` knows which node announces an
    address of load balancers.
    """
    for status in sync.services(str(request.get("namespace")), str(request.get("name"))):
        service = status.service
        ref, spec = service.ref, service.spec
        item = _service(status)
        ready: dict[tuple[str, str], list[str]] = {}
        for each in sync.endpoints(*ref):
            if each.ready:
                key = (each.port_name, each.protocol.upper())
                ready.setdefault(key, []).append(_place(each.address, each.port))
        for port, shown in zip(spec.ports or (), item["ports"], strict=True):
            shown["targetPort"] = port.target_port or port.port
            shown["appProtocol"] = port.app_protocol
            shown["endpoints"] = ready.get((shown["name"], shown["protocol"]), [])
        yield item | {
            "labels": service.metadata.labels or {},
            "annotations": service.metadata.annotations or {},
            "ipFamilyPolicy": spec.ip_family_policy,
            "ipFamilies": list(spec.ip_families or ()),
            "loadBalancerIP": spec.load_balancer_ip or "",
            "loadBalancerIngress": _load_balancer_ingress(service),
            "announcedBy": {
                each.ip: node for each in _ingress(service) if each.ip and (node := owner(each.ip))
            },
            "sessionAffinity": spec.session_affinity or "None",
            "externalTrafficPolicy": spec.external_traffic_policy,
            "internalTrafficPolicy": spec.internal_traffic_policy,
            "healthCheckNodePort": spec.health_check_node_port or None,
            "loadBalancerSourceRanges": list(spec.load_balancer_source_ranges or ()),
            "trafficDistribution": spec.traffic_distribution,
            "problems": [
                str(problem)
                for problem in sync.problems
                if isinstance(problem, ManifestError) and problem.object == str(service.key)
            ],
            "destinations": list(
                endpoints((each for each in held if _is_of(each, service)), request)
            ),
        }


def _is_of(held: VirtualServiceStatus, service: Service) -> bool:
    """A virtual service is called ``namespace/name:port``."""
    return held.spec.name.partition(":")[0] == str(service.ref)


def environment(sync: Sync, request: Request) -> Iterator[Item]:
    """The environment variables of a container that starts now in a namespace; ``serviceLinks``
    is its Pod's wish to be told.
    """
    links = request.get("serviceLinks") is not False
    found = env.environment(
        sync.declared(), str(request.get("namespace")), enable_service_links=links
    )
    return ({"name": name, "value": value} for name, value in found.items())


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ingress(service: Service) -> tuple[LoadBalancerIngress, ...]:
    status = service.status and service.status.load_balancer
    return (status and status.ingress) or ()


def _load_balancer_ingress(service: Service) -> list[str]:
    """Addresses, or names, and how packets to them come: ``192.0.2.7 (VIP)``."""
    return [
        f"{place} ({each.ip_mode})" if each.ip_mode else place
        for each in _ingress(service)
        if (place := each.ip or each.hostname)
    ]


def virtual_services(dataplane: Dataplane, request: Request) -> Iterator[Item]:
    """What a dataplane serves, in the form of :func:`services`. Of no namespace."""
    for status in dataplane.services():
        spec = status.spec
        yield {
            "namespace": "",
            "name": str(spec),
            "type": "IPVS",
            "clusterIPs": [] if spec.protocol == "fwmark" else [spec.address],
            "externalIPs": [],
            "loadBalancerIPs": [],
            "loadBalancerHostnames": [],
            "externalName": "",
            "selector": {},
            "ports": [
                {
                    "name": "",
                    "port": spec.port,
                    "lastPort": spec.last_port or None,
                    "nodePort": None,
                    "protocol": spec.protocol
                    if spec.protocol == "fwmark"
                    else spec.protocol.upper(),
                }
            ],
            "creationTimestamp": None,
            "schedulers": [spec.scheduler],
            "endpoints": len(spec.destinations),
            "endpointsReady": sum(each.weight > 0 for each in spec.destinations),
        }


def endpoints(held: Iterable[VirtualServiceStatus], request: Request) -> Iterator[Item]:
    """Destinations of virtual services, with their connections and counters."""
    for status in held:
        spec = status.spec
        namespace, _, name = spec.name.rpartition("/")
        # What was not made of a Service is in no namespace, and listed with each.
        if namespace and request.get("namespace") not in (None, namespace):
            continue
        for destination in status.destinations:
            yield {
                "namespace": namespace,
                "service": name or str(spec),
                "protocol": spec.protocol,
                "scheduler": spec.scheduler,
                "virtual": spec.address,
                "virtualPort": spec.port,
                "address": destination.address,
                "port": destination.port,
                "weight": destination.weight,
                "method": destination.method,
                "active": destination.active,
                "inactive": destination.inactive,
                "connections": destination.connections_total,
                "packetsIn": destination.packets_in,
                "packetsOut": destination.packets_out,
                "bytesIn": destination.bytes_in,
                "bytesOut": destination.bytes_out,
                "ejected": destination.ejected,
                "failures": destination.failures,
                "lastFailure": destination.last_failure,
            }


def connections(dataplane: Dataplane, request: Request) -> Iterator[Item]:
    """Live connections; with a namespace, those to its services."""
    wanted = request.get("namespace")
    names = {}
    if wanted is not None:
        names = {status.spec.key: status.spec.name for status in dataplane.services()}
    for connection in dataplane.connections():
        key = (connection.virtual, connection.virtual_port, connection.protocol)
        if wanted is not None and names.get(key, "").rpartition("/")[0] != wanted:
            continue
        yield {
            "protocol": connection.protocol,
            "client": connection.client,
            "clientPort": connection.client_port,
            "virtual": connection.virtual,
            "virtualPort": connection.virtual_port,
            "destination": connection.destination,
            "destinationPort": connection.destination_port,
            "source": connection.source,
            "sourcePort": connection.source_port,
            "state": connection.state,
            "expiresIn": connection.expires_in,
            "packets": connection.packets,
        }


def explanation(dataplane: Dataplane, request: Request) -> Iterator[Item]:
    """What would become of the first packet of the ``flow``, with a firewall ``mark``."""
    flow, mark = request.get("flow"), request.get("mark", 0)
    if not isinstance(flow, str) or not isinstance(mark, int) or not 0 <= mark < 1 << 32:
        raise ConfigError("say the flow as text, and the mark as a number of 32 bits")
    found = dataplane.explain(flow, mark)
    picked = found.picked
    yield {
        "action": found.action,
        "service": str(found.service) if found.service else None,
        "destinations": [
            {
                "address": destination.address,
                "port": destination.port,
                "weight": destination.weight,
                "method": destination.method,
                "masquerade": destination.masquerade,
            }
            for destination in found.destinations
        ],
        "picked": None if picked is None else {"address": picked.address, "port": picked.port},
        "reasons": list(found.reasons),
    }


def pods(sync: Sync, request: Request) -> Iterator[Item]:
    """Pods of manifests, of one namespace or of all."""
    for pod, services in sync.pods():
        namespace = pod.key.namespace
        if request.get("namespace") in (None, namespace):
            yield {
                "namespace": namespace,
                "name": pod.key.name,
                "phase": (pod.status and pod.status.phase) or "",
                "ready": pod.is_ready and not pod.has_ended,
                "ips": pod.addresses,
                "enableServiceLinks": pod.wants_service_links,
                "node": (pod.spec and pod.spec.node_name) or "",
                "services": [ref.name for ref in services],
            }


async def pools(sync: Sync, client: Client | None) -> list[Item]:
    """LoadBalancerPools of manifests, and those of an API server, which a node need not follow:
    addresses are given elsewhere. ApiError.
    """
    found = {each.metadata.name: each for each in await list_pools(client)} if client else {}
    found |= {each.metadata.name: each for each in sync.pools()}
    return [
        {
            "name": pool.metadata.name,
            "addresses": list(pool.spec.addresses),
            "size": size,
            "used": used,
            "free": size - used,
            "autoAssign": pool.spec.auto_assign is not False,
            "namespaces": list(pool.spec.namespaces or ()),
            "serviceSelector": msgspec.to_builtins(pool.spec.service_selector),
            "creationTimestamp": pool.metadata.creation_timestamp,
        }
        for pool, size, used in usages((found[name] for name in sorted(found)), sync.declared())
    ]


def queues(workers: QueueWorkers) -> Iterator[Item]:
    """What came through each queue."""
    for number, stats in workers.stats().items():
        yield {"queue": number, **asdict(stats)}


def status(dataplane: Dataplane, sync: Sync) -> Iterator[Item]:
    """The daemon as a whole."""
    stats = dataplane.stats()
    yield {
        "generation": sync.generation,
        "problems": [str(problem) for problem in sync.problems],
        "counts": sync.counts._asdict(),
        "packets": {
            f"{verdict.name}/{reason.name}": count
            for (verdict, reason), count in stats.packets.items()
            if count
        },
        "connections": stats.connections,
        "connectionsMax": stats.connections_max,
        "connectionsCreated": stats.connections_created,
        "connectionsExpired": stats.connections_expired,
        "persistenceTemplates": stats.persistence_templates,
        "schedulerErrors": stats.scheduler_errors,
        "ejections": stats.ejections,
        "retries": stats.retries,
    }

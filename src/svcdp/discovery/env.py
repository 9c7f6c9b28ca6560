"""Services by environment variables, as kubelet gives them to containers (pkg/kubelet/envvars)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from svcdp.kube.model import Service

__all__ = ["environment"]

#: The one Service that every Pod is told of.
API_SERVER = ("default", "kubernetes")


def environment(
    services: Iterable[Service], namespace: str, *, enable_service_links: bool = True
) -> dict[str, str]:
    """What a container that starts now in a namespace is told: name to value, by Service.

    Of Services with a cluster IP (the first one, where there are two), those of the namespace, and
    ``default/kubernetes``, which one of the same name in the namespace replaces.
    ``enable_service_links`` is the Pod's: without it only ``default/kubernetes`` counts.
    """
    told: dict[str, Service] = {}
    for service in services:
        ref, spec = service.ref, service.spec
        if spec.type == "ExternalName" or spec.cluster_ip in (None, "", "None"):
            continue
        if ref == API_SERVER:
            told.setdefault(ref.name, service)
        elif ref.namespace == namespace and enable_service_links:
            told[ref.name] = service
    return {
        name: value for _, service in sorted(told.items()) for name, value in _variables(service)
    }


def _variables(service: Service) -> Iterator[tuple[str, str]]:
    name, address = _name(service.ref.name), service.spec.cluster_ip or ""
    host = f"[{address}]" if ":" in address else address
    ports = service.spec.ports or ()
    yield f"{name}_SERVICE_HOST", address
    for first in ports[:1]:
        yield f"{name}_SERVICE_PORT", str(first.port)
    for port in ports:
        if port.name:
            yield f"{name}_SERVICE_PORT_{_name(port.name)}", str(port.port)
    # As Docker's links were.
    for number, port in enumerate(ports):
        protocol = port.protocol or "TCP"
        url = f"{protocol.lower()}://{host}:{port.port}"
        link = f"{name}_PORT_{port.port}_{protocol}"
        if number == 0:
            yield f"{name}_PORT", url
        yield link, url
        yield f"{link}_PROTO", protocol.lower()
        yield f"{link}_PORT", str(port.port)
        yield f"{link}_ADDR", address


def _name(text: str) -> str:
    return text.upper().replace("-", "_")

"""Endpoints of a Service: merged over its slices, and which of them may be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from svcdp.kube.context import NodeContext
from svcdp.kube.model import (
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointSlice,
    IPFamily,
    TransportProtocol,
    family_of,
    parse_address,
)

__all__ = ["EndpointInfo", "PortKey", "endpoints_by_port", "usable_endpoints"]

_NO_CONDITIONS = EndpointConditions()
_NO_HINTS = EndpointHints()
_Facts = tuple[bool, bool, bool, bool, str, str, tuple[str, ...], tuple[str, ...]]


class PortKey(NamedTuple):
    """What joins a port of a Service to ports of slices; ``targetPort`` does not."""

    family: IPFamily
    name: str
    protocol: TransportProtocol


class EndpointInfo(msgspec.Struct, frozen=True, gc=False):
    """One address and port that serves a port of a Service.

    ``local``: it is on this node. ``target`` is the name of its Pod, if known. The hints name
    zones and nodes whose clients it should serve.
    """

    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    local: bool
    node: str
    target: str
    hint_zones: tuple[str, ...] = ()
    hint_nodes: tuple[str, ...] = ()


def endpoints_by_port(
    slices: Iterable[EndpointSlice], node: NodeContext
) -> dict[PortKey, list[EndpointInfo]]:
    """All endpoints of a Service's slices, each once, sorted as kube-proxy sorts: as text.

    Of copies in several slices the first counts, but one on this node before one
    elsewhere (kube-proxy's ``addEndpoints``).
    """
    groups: dict[PortKey, dict[str, EndpointInfo]] = {}
    for endpoint_slice in slices:
        family = endpoint_slice.address_type
        if family == "FQDN" or endpoint_slice.metadata.hidden_from(node.service_proxy_name):
            continue
        ports = [
            (groups.setdefault(PortKey(family, port.name, port.protocol or "TCP"), {}), port.port)
            for port in endpoint_slice.ports or ()
            if port.name is not None and port.port
        ]
        for endpoint in endpoint_slice.endpoints or ():
            if not endpoint.addresses:
                continue
            address = parse_address(endpoint.addresses[0])
            if family_of(address) != family:
                continue
            host = f"[{address}]" if family == "IPv6" else address
            facts = _facts(endpoint, node.name)
            for group, number in ports:
                info = EndpointInfo(address, number, *facts)
                text = f"{host}:{number}"
                other = group.get(text)
                if other is None or (info.local and not other.local):
                    group[text] = info
    return {key: [group[text] for text in sorted(group)] for key, group in groups.items()}


def usable_endpoints(endpoints: Sequence[EndpointInfo]) -> list[EndpointInfo]:
    """The ready ones; if there are none, those that still serve while they terminate (KEP-1669)."""
    return [endpoint for endpoint in endpoints if endpoint.ready] or [
        endpoint for endpoint in endpoints if endpoint.serving and endpoint.terminating
    ]


def _facts(endpoint: Endpoint, node_name: str) -> _Facts:
    """The fields of EndpointInfo behind address and port."""
    conditions = endpoint.conditions or _NO_CONDITIONS
    node = endpoint.node_name or ""
    hints = endpoint.hints or _NO_HINTS
    return (
        conditions.ready is not False,
        conditions.serving is not False,
        conditions.terminating is True,
        bool(node) and node == node_name,
        node,
        (endpoint.target_ref and endpoint.target_ref.name) or "",
        tuple([each.name for each in hints.for_zones]) if hints.for_zones else (),
        tuple([each.name for each in hints.for_nodes]) if hints.for_nodes else (),
    )

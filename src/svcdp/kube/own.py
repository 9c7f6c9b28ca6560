"""What a cluster says of the node that a proxy runs on. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from svcdp.errors import ManifestError
from svcdp.kube.context import NodeContext
from svcdp.kube.model import Node, ServiceCIDR, family_of, parse_address, parse_cidr

__all__ = ["informed", "networks"]


def informed(
    node: NodeContext, own: Node | None, service_cidrs: Iterable[ServiceCIDR]
) -> NodeContext:
    """``node``, as settings say it, with what its Node ``own`` and ServiceCIDRs add: its zone, the
    addresses that it is known by, the Pods' CIDRs where those of this node tell who is one, and
    where cluster IPs are.
    """
    added: dict[str, object] = {"service_cidrs": networks(node.service_cidrs, service_cidrs)}
    if own is not None:
        added["zone"] = node.zone or own.metadata.zone
        if node.primary_addresses is None:
            added["primary_addresses"] = _primary_addresses(node, own)
        if node.detect_local == "NodeCIDR" and not node.pod_cidrs and own.spec:
            pods = own.spec.pod_cidrs or filter(None, [own.spec.pod_cidr])
            added["pod_cidrs"] = tuple(map(parse_cidr, pods))
    return replace(node, **added)  # type: ignore[arg-type]


def networks(given: Iterable[str], service_cidrs: Iterable[ServiceCIDR]) -> tuple[str, ...]:
    """Where cluster IPs are: the CIDRs of settings first, then those of ServiceCIDRs."""
    found = [
        parse_cidr(text) for each in service_cidrs if each.spec for text in each.spec.cidrs or ()
    ]
    return tuple(dict.fromkeys((*given, *found)))


def _primary_addresses(node: NodeContext, own: Node) -> tuple[str, ...] | None:
    """Internal addresses before external ones (kube-proxy's ``GetNodeHostIPs``). One that is on no
    interface, as behind a NAT, cannot be a packet's source.
    """
    listed = (own.status and own.status.addresses) or ()
    first: dict[str, str] = {}
    for kind in ("InternalIP", "ExternalIP"):
        for each in listed:
            if each.type != kind:
                continue
            try:
                address = parse_address(each.address)
            except ManifestError:
                continue
            if address in tuple(node.addresses):
                first.setdefault(family_of(address), address)
    return tuple(first.values()) or None

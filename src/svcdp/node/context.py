"""From the node's settings to what the resolver wants to know of a node."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from svcdp import schedulers
from svcdp.errors import ConfigError
from svcdp.kube import NodeContext
from svcdp.node.config import NodeConfig
from svcdp.node.values import IN_CLUSTER

if TYPE_CHECKING:
    from svcdp.kube.client import Client

__all__ = ["api_client", "node_context"]


def node_context(config: NodeConfig, addresses: Sequence[str]) -> NodeContext:
    """``addresses``: those of the node, set or discovered. ConfigError."""
    by_interface = config.detect_local_mode in ("BridgeInterface", "InterfaceNamePrefix")
    if by_interface and not config.pod_interface:
        raise ConfigError(f"detectLocalMode {config.detect_local_mode} needs podInterface")
    return NodeContext(
        name=config.node_name,
        addresses=tuple(addresses),
        # Addresses that settings name come before what a Node says.
        primary_addresses=config.primary_addresses or _first_of_each_family(config.addresses),
        zone=config.zone,
        pod_cidrs=config.pod_cidrs,
        detect_local=config.detect_local_mode,
        pod_mark=config.pod_mark,
        node_port_addresses=config.node_port_addresses,
        localhost_node_ports=config.localhost_node_ports,
        masquerade_all=config.masquerade_all,
        service_cidrs=config.service_cidrs,
        service_proxy_name=config.service_proxy_name,
        scheduler=config.scheduler,
        schedulers=schedulers.names(),
    )


def _first_of_each_family(addresses: Sequence[str]) -> tuple[str, ...] | None:
    """None: nothing is said."""
    others = [each for each in addresses if not ipaddress.ip_address(each).is_loopback]
    first = {":" in address: address for address in reversed(others)}
    return tuple(first.values()) or None


def api_client(config: NodeConfig) -> Client | None:
    """Who asks the API server, if there is one to ask."""
    if not config.kubeconfig:
        return None
    from svcdp.kube.client import Client

    return Client(None if config.kubeconfig == IN_CLUSTER else config.kubeconfig)

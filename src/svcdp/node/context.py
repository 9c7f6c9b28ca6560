"""From the node's settings to what the resolver wants to know of a node."""

from __future__ import annotations

from collections.abc import Sequence

from svcdp import schedulers
from svcdp.errors import ConfigError
from svcdp.kube import NodeContext
from svcdp.node.config import NodeConfig

__all__ = ["node_context"]


def node_context(config: NodeConfig, addresses: Sequence[str]) -> NodeContext:
    """``addresses``: those of the node, set or discovered. ConfigError."""
    by_interface = config.detect_local_mode in ("BridgeInterface", "InterfaceNamePrefix")
    if by_interface and not config.pod_interface:
        raise ConfigError(f"detectLocalMode {config.detect_local_mode} needs podInterface")
    return NodeContext(
        name=config.node_name,
        addresses=tuple(addresses),
        zone=config.zone,
        pod_cidrs=config.pod_cidrs,
        detect_local=config.detect_local_mode,
        pod_mark=config.pod_mark,
        node_port_addresses=config.node_port_addresses,
        masquerade_all=config.masquerade_all,
        service_cidrs=config.service_cidrs,
        schedulers=schedulers.names(),
    )

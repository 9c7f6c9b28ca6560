"""The node's part in the IPVS sync protocol, as its settings say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from svcdp.dataplane import Dataplane
from svcdp.ipvs.syncd import SyncConfig, SyncDaemon
from svcdp.node.config import NodeConfig

__all__ = ["peers", "sync_daemon"]


def sync_daemon(dataplane: Dataplane, config: NodeConfig) -> SyncDaemon | None:
    """The daemon to start, if connections are to be synchronised. ConfigError."""
    if config.sync_role == "none":
        return None
    return SyncDaemon(
        dataplane,
        SyncConfig(
            config.sync_role,
            config.sync_interface,
            config.sync_group,
            config.sync_port,
            config.sync_id,
            config.sync_ttl,
            config.sync_version,
            config.sync_maxlen,
            threshold=config.sync_threshold,
            period=config.sync_period,
            full_interval=config.sync_full_interval,
        ),
    )


def peers(daemon: SyncDaemon | None) -> Iterator[dict[str, Any]]:
    """For the admin socket: what was sent and heard."""
    if daemon is not None:
        yield asdict(daemon.stats())

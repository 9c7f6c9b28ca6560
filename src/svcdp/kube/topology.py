"""Which of a Service's endpoints a node may send to (kube-proxy's ``CategorizeEndpoints``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from svcdp.kube.context import NodeContext
from svcdp.kube.endpoints import EndpointInfo, usable_endpoints

__all__ = ["EndpointSets", "endpoint_sets"]


class EndpointSets(NamedTuple):
    """The endpoints of one port, as one node sees them.

    ``cluster`` are for traffic that may go anywhere, ``local`` for traffic that must not leave
    the node. ``has_any``: there are some, here or elsewhere; clients are turned away by silence
    then, not by a refusal.
    """

    cluster: list[EndpointInfo]
    local: list[EndpointInfo]
    has_any: bool

    @property
    def all(self) -> list[EndpointInfo]:
        """Those of both, each once."""
        known = {(each.address, each.port) for each in self.cluster}
        return self.cluster + [e for e in self.local if (e.address, e.port) not in known]


def endpoint_sets(endpoints: Sequence[EndpointInfo], node: NodeContext) -> EndpointSets:
    """Each set has its ready endpoints; if there are none, those that still serve while they
    terminate (KEP-1669). Hints apply to the ready ones of ``cluster`` alone.
    """
    usable = usable_endpoints(endpoints)
    return EndpointSets(
        cluster=_near(usable, node) if usable and usable[0].ready else usable,
        local=usable_endpoints([each for each in endpoints if each.local]),
        has_any=bool(usable),
    )


def _near(ready: list[EndpointInfo], node: NodeContext) -> list[EndpointInfo]:
    """Those with a hint for this node (KEP-3015), else for its zone (KEP-4444), else all.

    One without a hint turns that kind of hint off, and so does a place that no hint names.
    """
    if all(each.hint_nodes for each in ready):
        near = [each for each in ready if node.name in each.hint_nodes]
        if near:
            return near
    if node.zone and all(each.hint_zones for each in ready):
        near = [each for each in ready if node.zone in each.hint_zones]
        if near:
            return near
    return ready

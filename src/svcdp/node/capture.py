"""From the node's settings to who captures packets, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from svcdp.node.config import NodeConfig
from svcdp.rules import Backend, CapturePlan, choose
from svcdp.rules.paths import Path, find_paths
from svcdp.rules.plan import Item

__all__ = ["DNS_PORT", "NoRules", "capture_plan", "choose_backend"]

DNS_PORT = 53


class NoRules(Backend):
    """Stands in for a backend where somebody else installs the rules."""

    name = "none"

    def apply(self, plan: CapturePlan) -> None:
        """Nothing to do."""

    def update(self, plan: CapturePlan, added: Collection[Item], removed: Collection[Item]) -> None:
        """Nothing to do."""

    def fault(self) -> str:
        """Not to be known."""
        return ""

    def refresh(self, plan: CapturePlan) -> None:
        """Nothing to do."""

    def reroute(self, plan: CapturePlan) -> None:
        """Nothing to do."""

    def paths(self, addresses: Iterable[str]) -> Mapping[str, Path]:
        """As the kernel has them."""
        return find_paths(addresses)

    def remove(self) -> None:
        """Nothing to do."""

    def render(self, plan: CapturePlan) -> str:
        """Nothing would be done."""
        return ""

    def show(self) -> str:
        """Nothing is there."""
        return ""


def choose_backend(config: NodeConfig) -> Backend:
    """Who installs the rules, in this network namespace.

    Raises :class:`svcdp.FeatureUnavailable` or :class:`svcdp.MissingCapability`.
    """
    return NoRules() if config.rules == "none" else choose(config.rules, run_dir=config.run_dir)


def capture_plan(config: NodeConfig, addresses: Sequence[str]) -> CapturePlan:
    """How packets are captured on a node with these addresses."""
    return CapturePlan(
        queues=(config.queues.first, config.queues.last),
        tunnel_queues=(config.tunnel_queues.first, config.tunnel_queues.last),
        forward_mark=config.forward_mark,
        pass_mark=config.pass_mark,
        hop_marks=config.dr_marks,
        pod_mark=config.pod_mark,
        pod_interface=config.pod_interface,
        bypass=config.bypass,
        service_cidrs=config.service_cidrs,
        addresses=tuple(addresses),
        hosted=tuple((address, DNS_PORT) for address in config.dns_servers),
    )

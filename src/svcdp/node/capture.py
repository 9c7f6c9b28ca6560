"""From the node's settings to who captures packets, and how."""

from __future__ import annotations

from collections.abc import Sequence

from svcdp.dataplane import Captures
from svcdp.node.config import NodeConfig
from svcdp.rules import Backend, CapturePlan, choose

__all__ = ["NoRules", "capture_plan", "choose_backend"]


class NoRules(Backend):
    """Stands in for a backend where somebody else installs the rules."""

    name = "none"

    def apply(self, plan: CapturePlan) -> None:
        """Nothing to do."""

    def update(self, added: Captures, removed: Captures) -> None:
        """Nothing to do."""

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
        forward_mark=config.forward_mark,
        pass_mark=config.pass_mark,
        bypass=config.bypass,
        service_cidrs=config.service_cidrs,
        addresses=tuple(addresses),
    )
